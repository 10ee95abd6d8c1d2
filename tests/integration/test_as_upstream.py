"""A wrapped pipeline in diffusers' own machinery: saved, converted, copied, exchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

from tests.integration.workshop import (
    BATCHED,
    CAUGHT,
    GATE,
    JOINT,
    PIXART,
    Workshop,
    arguments,
    distance,
    engine,
    latents,
    only,
)
from tests.ranks import RankError
from tests.toys.joint_transformer import ToyJointAttnProcessor
from xfuser_runtime.base_wrapper import upstream_class, xFuserBaseWrapper
from xfuser_runtime.loader import load_upstream_class

NAMES = (PIXART, JOINT, BATCHED)
ULYSSES: dict[str, Any] = {"ulysses_degree": 2}
STAGES: dict[str, Any] = {
    "pipefusion_parallel_degree": 2,
    "num_pipeline_patch": 1,
    "warmup_steps": 4,
}


def call(pipe: Any, **changes: Any) -> torch.Tensor | None:
    """Final latents of one call, where this rank has them."""
    output = pipe(**arguments(pipe, **changes))
    return None if output is None else latents(output)


def is_port(pipe: Any) -> bool:
    """True for a wrapped pipeline."""
    return issubclass(type(pipe), xFuserBaseWrapper)


# -- saving ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_then_loaded_by_stock(
    workshop: Workshop, name: str, tmp_path: Path
) -> None:
    expected = call(workshop.stock(name))

    def body(rank: int, pipe: Any) -> None:
        call(pipe)
        pipe.save_pretrained(tmp_path / str(rank))
        pipe.transformer.save_pretrained(tmp_path / f"transformer{rank}")

    workshop.run(name, ULYSSES, body)
    cls = load_upstream_class(name)
    loaded = cls.from_pretrained(tmp_path / "0")
    transformer = type(loaded.transformer).from_pretrained(tmp_path / "transformer0")
    assert type(loaded) is cls and not is_port(loaded.transformer)
    loaded.set_progress_bar_config(disable=True)
    # Rounding depends on where the loader puts the weights in memory.
    assert distance(call(loaded), expected) < GATE
    loaded.transformer = transformer
    assert distance(call(loaded), expected) < GATE


def test_stages_refuse_to_save_their_part(workshop: Workshop, tmp_path: Path) -> None:
    def body(rank: int, pipe: Any) -> None:
        pipe.save_pretrained(tmp_path / str(rank))

    with pytest.raises(RankError, match="split into 2 pipeline stages, expected whole"):
        workshop.run(PIXART, STAGES, body)


def test_loaded_by_the_port(workshop: Workshop, tmp_path: Path) -> None:
    stock = workshop.stock(PIXART)
    expected = call(stock)
    stock.save_pretrained(tmp_path)
    wrapper = workshop.wrapper(PIXART)

    def body(rank: int, pipe: Any) -> Any:
        del pipe
        loaded = wrapper.from_pretrained(tmp_path, engine(ULYSSES))
        loaded.set_progress_bar_config(disable=True)
        assert is_port(loaded)
        return call(loaded)

    found = only(workshop.run(PIXART, ULYSSES, body, wrap=False))
    assert distance(found, expected) < GATE


# -- conversions -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_from_pipe_both_ways(workshop: Workshop, name: str) -> None:
    expected = call(workshop.stock(name))
    cls = load_upstream_class(name)

    def body(rank: int, pipe: Any) -> list[Any]:
        stock = cls.from_pipe(pipe)
        again = type(pipe).from_pipe(stock)
        third = type(pipe).from_pipe(pipe)
        assert type(stock) is cls and is_port(again) and is_port(third)
        assert again.transformer is pipe.transformer
        for made in (stock, again, third):
            made.set_progress_bar_config(disable=True)
        return [call(made) for made in (again, third, stock)]

    ranks = workshop.run(name, ULYSSES, body)
    for held in ranks[-1]:
        assert distance(held, expected) < GATE
    # Upstream's class is upstream's: each rank has the picture, and computes all of it.
    assert ranks[0][:2] == [None, None] and torch.equal(ranks[0][2], expected)


def test_stock_from_stages_is_refused(workshop: Workshop) -> None:
    cls = load_upstream_class(PIXART)

    def body(rank: int, pipe: Any) -> Any:
        return call(cls.from_pipe(pipe))

    with pytest.raises(RankError, match="outside of the port's denoising loop"):
        workshop.run(PIXART, STAGES, body)


def test_auto_pipeline_finds_upstreams_class(workshop: Workshop) -> None:
    assert AUTO_TEXT2IMAGE_PIPELINES_MAPPING["pixart-alpha"].__name__ == PIXART
    expected = call(workshop.stock(PIXART))

    def body(rank: int, pipe: Any) -> Any:
        made = AutoPipelineForText2Image.from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        assert type(made).__name__ == PIXART
        return call(made)

    for held in workshop.run(PIXART, ULYSSES, body):
        assert torch.equal(held, expected)


def test_copies_are_wrapped_and_their_own(workshop: Workshop) -> None:
    expected = call(workshop.stock(JOINT))

    def body(rank: int, pipe: Any) -> list[Any]:
        copied = copy.deepcopy(pipe)
        assert is_port(copied) and is_port(copied.transformer)
        with torch.no_grad():
            copied.transformer.proj_out.weight.mul_(0.5)
        return [call(pipe), call(copied)]

    same, halved = workshop.run(JOINT, ULYSSES, body)[-1]
    assert distance(same, expected) < GATE
    assert distance(halved, expected) > CAUGHT


@pytest.mark.parametrize("name", NAMES)
def test_wrapped_objects_are_upstreams_to_all_who_ask(
    workshop: Workshop, name: str
) -> None:
    stock = workshop.stock(name)
    keys, config = set(stock.transformer.state_dict()), dict(stock.config)

    def body(rank: int, pipe: Any) -> Any:
        assert set(pipe.transformer.state_dict()) == keys
        assert dict(pipe.config) == config
        for part in (pipe, pipe.transformer, pipe.scheduler):
            assert is_port(part)
            assert part.__class__ is upstream_class(type(part))
            assert isinstance(part, upstream_class(type(part)))
        return pipe.to_json_string(), set(pipe.components)

    expected = stock.to_json_string(), set(stock.components)
    assert workshop.run(name, ULYSSES, body) == [expected] * 2


# -- exchanged parts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (PIXART, DDIMScheduler),
        (PIXART, EulerDiscreteScheduler),
        (PIXART, DPMSolverMultistepScheduler),
        (BATCHED, FlowMatchHeunDiscreteScheduler),
    ],
)
@pytest.mark.parametrize("flags", [ULYSSES, STAGES], ids=["ulysses2", "pp2"])
def test_another_scheduler(
    workshop: Workshop, flags: dict[str, Any], name: str, other: Any
) -> None:
    def exchange(pipe: Any) -> Any:
        pipe.scheduler = other.from_config(pipe.scheduler.config)
        assert isinstance(pipe.scheduler, other)
        # Upstream's class answers `from_config` of the type of a scheduler, too.
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return call(pipe)

    expected = exchange(workshop.stock(name))
    warmup = {"warmup_steps": 8} if flags is STAGES else {}
    found = workshop.run(name, {**flags, **warmup}, lambda rank, pipe: exchange(pipe))
    assert distance(only(found), expected) < GATE


class UnportedProcessor(ToyJointAttnProcessor):
    """A processor that no port knows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As its parent, by calling diffusers' own attention."""
        return super().__call__(*args, **kwargs)


def test_processors_set_later(workshop: Workshop) -> None:
    """A fresh processor of a ported class is ported; another one is refused."""
    expected = call(workshop.stock(JOINT))

    def body(rank: int, pipe: Any) -> Any:
        for block in pipe.transformer.transformer_blocks:
            block.attn.set_processor(ToyJointAttnProcessor())
            assert type(block.attn.processor) is not ToyJointAttnProcessor
        with pytest.raises(
            ValueError, match="Attention Processor class UnportedProcessor is not supp"
        ):
            block.attn.set_processor(UnportedProcessor())
        return call(pipe)

    assert distance(only(workshop.run(JOINT, ULYSSES, body)), expected) < GATE


def test_projections_fused_later(workshop: Workshop) -> None:
    """PixArt's fused processor is not in its port: the manual's refusal, or a right picture."""

    def body(rank: int, pipe: Any) -> str:
        try:
            pipe.transformer.fuse_qkv_projections()
        except ValueError as error:
            return str(error)
        return "fused"

    for words in workshop.run(PIXART, ULYSSES, body):
        assert "is not supported by xFuser" in words


def test_an_unported_processor_before_wrapping(workshop: Workshop) -> None:
    def exchange(rank: int, pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            block.attn.set_processor(UnportedProcessor())

    with pytest.raises(RankError, match="Attention Processor class UnportedProcessor"):
        workshop.run(JOINT, ULYSSES, lambda rank, pipe: None, before=exchange)


def test_processors_not_converted_are_caught(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: a processor set later stays upstream's, which sees this rank's keys alone."""
    expected = call(workshop.stock(JOINT))

    def body(rank: int, pipe: Any) -> Any:
        place = "xfuser_runtime.layers.attention.fit_processor"
        monkeypatch.setattr(place, lambda processor: processor)
        for block in pipe.transformer.transformer_blocks:
            # The mask of all keys would not fit: the shapes alone would tell.
            block.attn.set_processor(_Maskless())
        return call(pipe)

    found = only(workshop.run(JOINT, ULYSSES, body))
    assert distance(found, expected) > CAUGHT


class _Maskless(ToyJointAttnProcessor):
    def __call__(  # type: ignore[override]
        self, attn: Any, hidden: Any, encoder: Any, mask: Any, rotary: Any
    ) -> Any:
        return super().__call__(attn, hidden, encoder, None, rotary)


def test_another_transformer(workshop: Workshop) -> None:
    """A transformer assigned later is wrapped; wrapping twice changes nothing."""
    stock = workshop.stock(PIXART)
    other = copy.deepcopy(stock.transformer)
    with torch.no_grad():
        other.proj_out.weight.mul_(0.5)
    original, stock.transformer = stock.transformer, other
    expected = call(stock)
    stock.transformer = original

    def body(rank: int, pipe: Any) -> Any:
        pipe = type(pipe)(pipe, engine(ULYSSES))
        pipe.transformer = copy.deepcopy(other)
        assert isinstance(pipe.transformer.transformer_blocks[0].attn1, Attention)
        return call(pipe)

    assert distance(only(workshop.run(PIXART, ULYSSES, body)), expected) < GATE
