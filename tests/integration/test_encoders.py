"""Encoders on the first rank of a replica: the others receive what stock would compute.

The option changes where weights are, never a bit of the result.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module

from tests.integration.workshop import (
    CAUGHT,
    MODES,
    PIXART,
    Workshop,
    arguments,
    distance,
    engine,
    latents,
    only,
)
from tests.ranks import run_ranks
from xfuser_runtime.encoders import calls, load_empty, results
from xfuser_runtime.encoders.absent import Absent
from xfuser_runtime.memory import bytes_of
from xfuser_runtime.proofs import UnprovenWarning

PAIR = "tests.toys.pair_pipeline:ToyPairPipeline"
ON: dict[str, Any] = {"text_encoders_on_first_rank": True}
CFG: dict[str, Any] = {**MODES["cfg2"], **ON}
FLAGS: Mapping[str, Mapping[str, Any]] = {
    "cfg2": MODES["cfg2"],
    "ulysses2": MODES["ulysses2"],
    "pipefusion": MODES["pipefusion"],
    "pp2 x dp2": {**MODES["pp2"], **MODES["dp2"]},
}


def call(pipe: Any, **changes: Any) -> torch.Tensor | None:
    """Final latents of one call, where this rank has them."""
    output = pipe(**arguments(pipe, **changes))
    return None if output is None else latents(output)


def encoders(pipe: Any) -> list[Any]:
    """The encoders of a pipeline."""
    return [part for name, part in pipe.components.items() if "text_encoder" in name]


def told(action: Callable[[], Any]) -> str:
    """Class and message of the error that `action` raises, empty without one."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_both(workshop: Workshop, action: Callable[[Any], Any]) -> list[str]:
    """What `action` raises on each of two ranks that share the encoder."""
    return workshop.run(PIXART, CFG, lambda rank, pipe: told(lambda: action(pipe)))


# -- results and memory ----------------------------------------------------------------


@pytest.mark.parametrize("mode", FLAGS)
@pytest.mark.parametrize("name", [PIXART, PAIR])
def test_equal_to_the_bit(workshop: Workshop, name: str, mode: str) -> None:
    """Each replica encodes its own prompts: two of them, one a replica."""
    batch = 2 if "data_parallel_degree" in FLAGS[mode] else 1

    def body(rank: int, pipe: Any) -> Any:
        held = [bytes_of(encoder) for encoder in encoders(pipe)]
        return call(pipe, batch_size=batch), held

    whole = workshop.run(name, FLAGS[mode], body)
    shared = workshop.run(name, {**FLAGS[mode], **ON}, body)
    for rank, (mine, theirs) in enumerate(zip(shared, whole, strict=True)):
        assert (mine[0] is None) == (theirs[0] is None)
        assert mine[0] is None or torch.equal(mine[0], theirs[0])
        assert all(theirs[1])
        # Of each replica's two ranks, that is.
        assert mine[1] == (theirs[1] if rank % 2 == 0 else [0] * len(theirs[1]))
    assert sum(mine[0] is not None for mine in shared) == batch


@pytest.mark.parametrize("sabotage", ["dropped", "wrong root", "own prompts dropped"])
def test_results_not_received_are_caught(
    workshop: Workshop, sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: tensors that do not arrive, come from the wrong rank, or in another order."""
    broadcast = results.broadcast
    expected = only(workshop.run(PAIR, "cfg2", lambda rank, pipe: call(pipe)))

    def faulty(x: torch.Tensor, group: Any) -> torch.Tensor:
        if sabotage == "wrong root":
            # Zeros of the rank that has no result reach the one that has.
            return broadcast(x.zero_() if group.rank_in_group else x, group, source=1)
        received = broadcast(x, group)
        if group.rank_in_group == 0:
            return received
        if sabotage == "dropped":
            return received.zero_()
        values = received.view(torch.float32) if received.numel() % 4 == 0 else received
        return values.copy_(values.flip(0))

    def body(rank: int, pipe: Any) -> Any:
        monkeypatch.setattr(results, "broadcast", faulty)
        return call(pipe)

    assert distance(only(workshop.run(PAIR, CFG, body)), expected) > CAUGHT


def run_from(workshop: Workshop, name: str, folder: Path, **flags: Any) -> list[Any]:
    """Latents, types and bytes of the encoders of two ranks that load `folder`."""
    cls = workshop.wrapper(name)

    def rank_main(rank: int) -> Any:
        warnings.simplefilter("ignore", UnprovenWarning)
        source = folder / str(rank)
        config = engine({**MODES["pp2"], **flags})
        pipe = cls.from_pretrained(source, config, torch_dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        pipe.to("cpu", torch.float32)
        types = [encoder.dtype for encoder in encoders(pipe)]
        training = [encoder.training for encoder in encoders(pipe)]
        held = [bytes_of(encoder) for encoder in encoders(pipe)]
        return call(pipe), types, training, held

    return run_ranks(rank_main, 2)


@pytest.mark.parametrize("name", [PIXART, PAIR])
def test_other_ranks_do_not_read_the_weights(
    workshop: Workshop, name: str, tmp_path: Path
) -> None:
    """A checkpoint without the encoders' weights is enough for them."""
    for rank in (0, 1):
        workshop.stock(name).save_pretrained(tmp_path / str(rank))
    expected = only([found[0] for found in run_from(workshop, name, tmp_path)])
    for weights in (tmp_path / "1").glob("text_encoder*/*.safetensors"):
        weights.unlink()
    first, other = run_from(workshop, name, tmp_path, **ON)
    assert torch.equal(other[0], expected)
    assert (
        other[1:3]
        == first[1:3]
        == ([torch.float32] * len(first[1]), [False] * len(first[1]))
    )
    assert all(first[3]) and not any(other[3])


def test_what_cannot_be_made_empty_is_read_whole(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cls = type(workshop.stock(PIXART).text_encoder)
    workshop.stock(PIXART).text_encoder.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {},', 1))
    assert load_empty(cls, tmp_path) is None
    assert "its weights are quantised" in caplog.text


# -- an encoder without weights --------------------------------------------------------


def test_attributes_are_those_of_the_rank(workshop: Workshop) -> None:
    def body(rank: int, pipe: Any) -> Any:
        encoder = pipe.text_encoder
        weight = next(encoder.parameters())
        before = encoder.dtype, encoder.device, pipe.device, pipe._execution_device
        pipe.to(torch.bfloat16)
        after = encoder.dtype, pipe.dtype, encoder.encoder.device, weight.device
        copied = copy.deepcopy(encoder)
        found = copied.dtype, copied.device, encoder.num_parameters()
        assert isinstance(weight, torch.nn.Parameter)
        assert isinstance(weight, Absent) == bool(rank)
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        return before, after, found, encoder.config.d_model, str(encoder.__class__)

    first, other = workshop.run(PIXART, CFG, body)
    assert first == other


def test_placed_and_offloaded_after_wrapping(workshop: Workshop) -> None:
    """`to` and accelerate's offloading of whole models leave absent weights alone."""

    def offload(pipe: Any) -> None:
        pipe.to("cpu")
        for name in ("text_encoder", "transformer", "vae"):
            add_hook_to_module(getattr(pipe, name), CpuOffload("cpu"))

    def body(rank: int, pipe: Any) -> Any:
        offload(pipe)
        return call(pipe)

    expected = only(workshop.run(PIXART, "cfg2", body))
    assert torch.equal(only(workshop.run(PIXART, CFG, body)), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_after_wrapping(workshop: Workshop, in_place: bool) -> None:
    def body(rank: int, pipe: Any) -> Any:
        if in_place:
            pipe.text_encoder.compile(backend="eager")
        else:
            pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
        return call(pipe)

    expected = only(workshop.run(PIXART, "cfg2", body))
    assert torch.equal(only(workshop.run(PIXART, CFG, body)), expected)


def test_copies_compute_with_their_own_weights(workshop: Workshop) -> None:
    def body(rank: int, pipe: Any) -> list[Any]:
        copied = copy.deepcopy(pipe)
        for weight in copied.text_encoder.parameters() if rank == 0 else ():
            with torch.no_grad():
                weight.mul_(0.5)
        return [call(pipe), call(copied)]

    plain = only(workshop.run(PIXART, "cfg2", lambda rank, pipe: call(pipe)))
    same, halved = workshop.run(PIXART, CFG, body)[-1]
    assert torch.equal(same, plain) and distance(halved, plain) > CAUGHT


def test_wrapped_twice_and_from_pipe(workshop: Workshop) -> None:
    def body(rank: int, pipe: Any) -> Any:
        again = type(pipe).from_pipe(type(pipe)(pipe, engine(CFG)))
        again.set_progress_bar_config(disable=True)
        assert again.text_encoder is pipe.text_encoder
        return call(again)

    expected = only(workshop.run(PIXART, "cfg2", lambda rank, pipe: call(pipe)))
    assert torch.equal(only(workshop.run(PIXART, CFG, body)), expected)


# -- random numbers --------------------------------------------------------------------


def draws(encoder: Any, generator: torch.Generator) -> list[torch.Tensor]:
    """Numbers drawn after a call that draws itself, from both kinds of generators."""
    encoder(torch.ones(1, 2, dtype=torch.long), generator=generator)
    return [torch.rand(3), torch.rand(3, generator=generator)]


def drawing_ranks(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`draws` of each rank, of an encoder with noise."""
    cls = type(workshop.stock(PIXART).text_encoder)

    def forward(self: Any, ids: torch.Tensor, generator: torch.Generator) -> Any:
        return torch.rand(2) + torch.rand(2, generator=generator)

    monkeypatch.setattr(cls, "forward", forward)
    # Classes that were made before call the method that they found.
    calls._shared_class.cache_clear()
    try:
        return workshop.run(
            PIXART,
            CFG,
            lambda rank, pipe: draws(
                pipe.text_encoder, torch.Generator().manual_seed(5)
            ),
            before=lambda rank, pipe: torch.manual_seed(7) and None,
        )
    finally:
        calls._shared_class.cache_clear()


def test_random_states_stay_alike(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = drawing_ranks(workshop, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_random_states_not_taken_over_are_caught(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: the other rank goes on with its own states."""
    monkeypatch.setattr(calls, "set_random_states", lambda states, generators: None)
    first, other = drawing_ranks(workshop, monkeypatch)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# -- refusals: one line, and no rank waits for ever ------------------------------------


def test_a_weight_that_is_used_directly_is_refused(workshop: Workshop) -> None:
    def use(pipe: Any) -> None:
        torch.nn.functional.embedding(
            torch.ones(1).long(), pipe.text_encoder.shared.weight
        )

    first, other = on_both(workshop, use)
    assert first == ""
    assert other.startswith(
        "NotSupportedError: embedding of text_encoder.shared.weight,"
    )
    assert other.count("\n") == 0 and "text_encoders_on_first_rank" in other


def test_saved_by_the_first_rank_alone(workshop: Workshop, tmp_path: Path) -> None:
    first, other = on_both(workshop, lambda pipe: pipe.save_pretrained(tmp_path))
    assert first == ""
    assert "save_pretrained of text_encoder on rank 1, which holds no weights" in other


def test_a_failure_on_the_first_rank_reaches_all(workshop: Workshop) -> None:
    first, other = on_both(workshop, lambda pipe: pipe.text_encoder(input_ids="words"))
    assert first and other.startswith("StateError: text_encoder failed on rank 0 (")


def test_different_calls_are_refused(workshop: Workshop) -> None:
    ids = torch.ones(1, 2, dtype=torch.long)

    def body(rank: int, pipe: Any) -> str:
        encoder = pipe.text_encoder
        part = encoder.get_input_embeddings() if rank else encoder
        return told(lambda: part(ids))

    assert workshop.run(PIXART, CFG, body)[1].startswith(
        "StateError: a call of text_encoder.shared on rank 1 and of text_encoder on rank 0"
    )


def test_a_call_in_the_loop_is_refused(workshop: Workshop) -> None:
    def encode_in_loop(pipe: Any) -> None:
        ids = torch.ones(1, 2, dtype=torch.long)
        call(pipe, callback=lambda *args: pipe.text_encoder(ids))

    for found in on_both(workshop, encode_in_loop):
        assert "a call of text_encoder in the denoising loop or after it" in found


@pytest.mark.parametrize("method", ["register_forward_hook", "load_adapter"])
def test_changes_of_an_encoder_are_refused(workshop: Workshop, method: str) -> None:
    def change(pipe: Any) -> None:
        getattr(pipe.text_encoder, method)(lambda *args: None)

    for found in on_both(workshop, change):
        assert f"{method} on text_encoder, which runs on the first rank" in found
