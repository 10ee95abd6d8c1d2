"""What a user may pass and ask for: prompts, embeddings, generators, kinds of output."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.integration.workshop import (
    BATCHED,
    CAUGHT,
    GATE,
    JOINT,
    MODES,
    PIXART,
    STEPS,
    Workshop,
    arguments,
    distance,
    latents,
    only,
)
from xfuser_runtime.pipelines import base_pipeline, data_parallel

#: One mode that splits the batch of prompts, one the branches, one the tokens, one the blocks.
FOUR = ("dp2", "cfg2", "ulysses2", "pp2")


def outputs(pipe: Any, calls: list[dict[str, Any]]) -> list[Any]:
    """Latents of each call; None where this rank has none."""
    held = []
    for call in calls:
        output = pipe(**arguments(pipe, **call))
        held.append(None if output is None else latents(output))
    return held


def joined(ranks: list[list[Any]], call: int) -> torch.Tensor:
    """The rows of all replicas."""
    return torch.cat([held[call] for held in ranks if held[call] is not None])


@pytest.mark.parametrize("name", [PIXART, JOINT, BATCHED])
@pytest.mark.parametrize("mode", FOUR)
def test_what_comes_with_the_prompts(workshop: Workshop, mode: str, name: str) -> None:
    """Images per prompt, a generator for each image, latents given, no guidance."""
    seeds = [
        [torch.Generator().manual_seed(s + 7 * n) for s in range(4)] for n in (0, 1)
    ]
    stock = workshop.stock(name)
    start = outputs(stock, [{"batch_size": 2, "num_inference_steps": 2}])[0]

    def calls(generators: list[torch.Generator]) -> list[dict[str, Any]]:
        return [
            {
                "batch_size": 2,
                "num_images_per_prompt": 2,
                "generator": generators,
            },
            {"batch_size": 2, "latents": start.clone(), "height": 128},
            {"batch_size": 2, "guidance": False, "text": 1},
        ]

    expected = outputs(stock, calls(seeds[0]))
    fresh = [torch.Generator().manual_seed(s) for s in range(4)]
    ranks = workshop.run(name, mode, lambda rank, pipe: outputs(pipe, calls(fresh)))
    for call, held in enumerate(expected):
        assert distance(joined(ranks, call), held) < GATE
    other = outputs(workshop.stock(name), calls(seeds[1])[:1])[0]
    assert distance(other, expected[0]) > CAUGHT


@pytest.mark.parametrize("name", [PIXART, JOINT, BATCHED])
@pytest.mark.parametrize("mode", FOUR)
def test_embeddings_instead_of_prompts(
    workshop: Workshop, mode: str, name: str
) -> None:
    def with_embeddings(pipe: Any) -> dict[str, Any]:
        made = arguments(pipe, batch_size=2)
        prompts = {"prompt": made["prompt"], "negative_prompt": made["negative_prompt"]}
        if name == PIXART:
            names = (
                "prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_embeds",
                "negative_prompt_attention_mask",
            )
            values = pipe.encode_prompt(**prompts, max_sequence_length=48)
            given = dict(zip(names, values, strict=True))
        elif name == JOINT:
            given = {}
            for sign in ("", "negative_"):
                values = pipe.encode_prompt(
                    made[f"{sign}prompt"], max_sequence_length=48
                )
                given[f"{sign}prompt_embeds"] = values[0]
                given[f"{sign}prompt_embeds_mask"] = values[1]
        else:
            names = ("prompt_embeds", "negative_prompt_embeds")
            values = pipe.encode_prompt(**prompts)
            given = dict(zip(names, values, strict=True))
        return {**given, "prompt": None, "negative_prompt": None, "batch_size": 2}

    with torch.no_grad():
        stock = workshop.stock(name)
        expected = outputs(stock, [with_embeddings(stock)])[0]
        ranks = workshop.run(
            name, mode, lambda rank, pipe: outputs(pipe, [with_embeddings(pipe)])
        )
    assert distance(joined(ranks, 0), expected) < GATE


@pytest.mark.parametrize("mode", [*MODES, "dp2 x cfg2"])
def test_ranks_draw_alike_without_a_generator(workshop: Workshop, mode: str) -> None:
    """Each rank starts with a random state of its own; stock starts with the first one's."""
    flags = MODES.get(mode, {"data_parallel_degree": 2, "use_cfg_parallel": True})
    expected = unseeded(workshop.stock(PIXART), 0)
    ranks = workshop.run(PIXART, flags, lambda rank, pipe: unseeded(pipe, rank))
    found = torch.cat([held for held in ranks if held is not None])
    if mode == "pipefusion":
        # All rows near stock's: the noise of every patch is stock's.
        assert distance(found, expected) < 0.1
    else:
        assert distance(found, expected) < GATE
    assert distance(unseeded(workshop.stock(PIXART), 1), expected) > 0.5


def unseeded(pipe: Any, seed: int) -> torch.Tensor | None:
    """Latents of two prompts by a scheduler that draws noise, from the global state."""
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    made = arguments(pipe, batch_size=2)
    made["generator"] = None
    torch.manual_seed(seed)
    output = pipe(**made)
    return None if output is None else latents(output)


@contextmanager
def _no_randomness(*_: Any) -> Any:
    yield


@pytest.mark.parametrize(
    ("mode", "place"), [("ulysses2", base_pipeline), ("dp2", data_parallel)]
)
def test_ranks_that_draw_for_themselves_are_caught(
    workshop: Workshop, mode: str, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: random states are not made alike."""
    monkeypatch.setattr(place, "same_randomness", _no_randomness)
    expected = unseeded(workshop.stock(PIXART), 0)
    ranks = workshop.run(PIXART, mode, lambda rank, pipe: unseeded(pipe, rank))
    found = torch.cat([held for held in ranks if held is not None])
    assert distance(found, expected) > CAUGHT


@pytest.mark.parametrize("name", [PIXART, JOINT])
@pytest.mark.parametrize("mode", ["cfg2", "pp2"])
def test_kinds_of_output(workshop: Workshop, mode: str, name: str) -> None:
    kinds = ("pil", "np", "pt", "latent")

    def all_kinds(pipe: Any) -> list[Any]:
        given = [{"output_type": kind, "return_dict": False} for kind in kinds]
        held = [pipe(**arguments(pipe, **call)) for call in given]
        return [None if output is None else output[0] for output in held]

    expected = all_kinds(workshop.stock(name))
    found = only(
        [
            None if held[0] is None else held
            for held in workshop.run(name, mode, lambda rank, pipe: all_kinds(pipe))
        ]
    )
    assert isinstance(found[0][0], PIL.Image.Image)
    levels = np.abs(np.int16(found[0][0]) - np.int16(expected[0][0]))
    assert levels.max() <= 1, "rounding may flip one level of 255"
    assert isinstance(found[1], np.ndarray)
    assert distance(torch.from_numpy(found[1]), torch.from_numpy(expected[1])) < GATE
    assert distance(found[2], expected[2]) < GATE
    assert distance(found[3], expected[3]) < GATE


@pytest.mark.parametrize("mode", ["ulysses2", "pp2"])
def test_half_precision(workshop: Workshop, mode: str) -> None:
    """The latents follow upstream's type, on every stage, after `to(dtype)`."""

    def in_half(pipe: Any) -> torch.Tensor | None:
        output = pipe.to(torch.bfloat16)(**arguments(pipe))
        return None if output is None else latents(output)

    expected = in_half(workshop.stock(BATCHED))
    found = only(workshop.run(BATCHED, mode, lambda rank, pipe: in_half(pipe)))
    assert found.dtype == expected.dtype
    assert distance(found.float(), expected.float()) < 0.05


class DoubleScheduler(FlowMatchEulerDiscreteScheduler):
    """Returns doubles, whatever the sample and the model's output are."""

    def step(  # type: ignore[override]
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        held = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (held.double(),)


def to_single(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook: the model itself works in fp32."""
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].float()}


@pytest.mark.parametrize("mode", ["pp2", "pipefusion"])
def test_latents_that_change_their_type(workshop: Workshop, mode: str) -> None:
    def in_doubles(pipe: Any) -> tuple[Any, list[torch.dtype]]:
        types = []

        def note(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> Any:
            types.append(kwargs["latents"].dtype)
            return kwargs

        pipe.scheduler = DoubleScheduler.from_config(pipe.scheduler.config)
        pipe.transformer.register_forward_pre_hook(to_single, with_kwargs=True)
        pipe(**arguments(pipe), callback_on_step_end=note)
        output = pipe(**arguments(pipe))
        return (None if output is None else latents(output)), types

    expected, types = in_doubles(workshop.stock(BATCHED))
    ranks = workshop.run(BATCHED, mode, lambda rank, pipe: in_doubles(pipe))
    found = only([held for held, _ in ranks])
    assert found.dtype == expected.dtype == torch.float64
    assert (
        [held for _, held in ranks] == [types, types] == [[torch.float64] * STEPS] * 2
    )
    assert distance(found, expected) < (GATE if mode == "pp2" else 0.5)
