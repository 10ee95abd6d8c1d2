"""Hooks, adapters and compilation around the transformer, before and after wrapping.

A hook that was installed first holds upstream's `forward`; were it called, every rank would
compute the whole picture, or this rank's keys alone, with no error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from tests.integration.workshop import (
    CAUGHT,
    GATE,
    JOINT,
    PIXART,
    Workshop,
    arguments,
    distance,
    latents,
    only,
)
from tests.ranks import RankError
from xfuser_runtime.transformers import base_transformer

CFG: dict[str, Any] = {"use_cfg_parallel": True}
ULYSSES: dict[str, Any] = {"ulysses_degree": 2}
STAGES: dict[str, Any] = {
    "pipefusion_parallel_degree": 2,
    "num_pipeline_patch": 1,
    "warmup_steps": 4,
}
FLAGS = {"cfg2": CFG, "ulysses2": ULYSSES, "pp2": STAGES}


def call(pipe: Any) -> torch.Tensor | None:
    """Final latents of one call, where this rank has them."""
    output = pipe(**arguments(pipe))
    return None if output is None else latents(output)


def changed_run(
    workshop: Workshop,
    name: str,
    flags: dict[str, Any],
    change: Callable[[Any], None],
    *,
    before: bool,
) -> Any:
    """Latents of a pipeline that `change` was applied to, before or after wrapping."""

    def body(rank: int, pipe: Any) -> Any:
        if not before:
            change(pipe)
        return call(pipe)

    first = (lambda rank, pipe: change(pipe)) if before else None
    return only(workshop.run(name, flags, body, before=first))


# -- offload ---------------------------------------------------------------------------


def offload_models(pipe: Any) -> None:
    """What `enable_model_cpu_offload` installs, between CPU and CPU."""
    for name in ("text_encoder", "transformer", "vae"):
        add_hook_to_module(getattr(pipe, name), CpuOffload("cpu"))


def offload_layers(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` installs: weights are on meta between calls."""
    for name in ("text_encoder", "transformer", "vae"):
        cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=False)


class Scaled(ModelHook):
    """A hook of diffusers that halves what the model returns."""

    def post_forward(self, module: Any, output: Any) -> Any:
        """The halved output."""
        return (output[0] * 0.5,)


def halve(pipe: Any) -> None:
    """Install `Scaled`."""
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(
        Scaled(), "scaled"
    )


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", [offload_models, offload_layers, halve])
@pytest.mark.parametrize("mode", FLAGS)
def test_hooks(workshop: Workshop, mode: str, change: Any, before: bool) -> None:
    stock = workshop.stock(PIXART)
    plain = call(stock)
    change(stock)
    expected = call(stock)
    found = changed_run(workshop, PIXART, FLAGS[mode], change, before=before)
    assert distance(found, expected) < GATE
    assert (distance(expected, plain) > CAUGHT) == (change is halve)


def test_hooks_can_be_removed(workshop: Workshop) -> None:
    """Removing a hook that came before leaves the port's forward, not upstream's."""
    expected = call(workshop.stock(PIXART))

    def body(rank: int, pipe: Any) -> Any:
        remove_hook_from_module(pipe.transformer)
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.remove_hook("scaled")
        return call(pipe)

    def hooks(rank: int, pipe: Any) -> None:
        halve(pipe)
        offload_models(pipe)

    found = only(workshop.run(PIXART, ULYSSES, body, before=hooks))
    assert distance(found, expected) < GATE


def test_a_hook_that_calls_upstream_is_caught(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: hooks keep the forward that they found."""
    monkeypatch.setattr(
        base_transformer, "rebind_forward", lambda module, original: None
    )
    with pytest.raises(RankError, match="no transformer call of this step entered the"):
        changed_run(workshop, PIXART, ULYSSES, offload_models, before=True)


def test_a_forward_of_unknown_origin_is_refused(workshop: Workshop) -> None:
    def patch(pipe: Any) -> None:
        forward = pipe.transformer.forward
        pipe.transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    with pytest.raises(
        RankError, match="with a forward of its own, expected the class"
    ):
        changed_run(workshop, PIXART, ULYSSES, patch, before=True)


# -- LoRA ------------------------------------------------------------------------------

TARGETS = ["to_q", "to_v"]


def lora_weights(pipe: Any, seed: int = 5) -> dict[str, torch.Tensor]:
    """A trained adapter for the joint transformer: every block, lively weights."""
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for path, module in pipe.transformer.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            rows, columns = module.weight.shape
            down = torch.randn(4, columns, generator=generator) / 4
            held[f"transformer.{path}.lora_A.weight"] = down
            up = torch.randn(rows, 4, generator=generator) / 4
            held[f"transformer.{path}.lora_B.weight"] = up
    return held


def inject(pipe: Any) -> None:
    """LoRA layers inside a transformer that has no loader of its own."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(5)
    inject_adapter_in_model(config, pipe.transformer)


def nest(pipe: Any) -> None:
    """The transformer inside of a model of adapters."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(5)
    pipe.transformer = PeftModel(pipe.transformer, config)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("mode", FLAGS)
def test_loaded_adapters(workshop: Workshop, mode: str, before: bool) -> None:
    stock = workshop.stock(JOINT)
    plain, weights = call(stock), lora_weights(stock)

    def load(pipe: Any) -> None:
        pipe.transformer.load_lora_adapter(dict(weights), adapter_name="fox")
        pipe.transformer.set_adapters("fox", 0.8)

    load(stock)
    expected = call(stock)
    found = changed_run(workshop, JOINT, FLAGS[mode], load, before=before)
    assert distance(found, expected) < GATE
    assert distance(expected, plain) > CAUGHT


def test_stages_take_their_own_blocks_weights(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights of all blocks are no news to any stage; a stage may have none."""
    stock = workshop.stock(JOINT)
    whole = lora_weights(stock)
    first = {key: value for key, value in whole.items() if "_blocks.0." in key}

    def load(pipe: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
        pipe.transformer.load_lora_adapter(dict(weights), adapter_name="fox")
        pipe.transformer.set_adapters("fox", 0.8)
        output = call(pipe)
        pipe.transformer.delete_adapters("fox")
        return output

    expected = [load(stock, weights) for weights in (whole, first)]
    capfd.readouterr()

    def body(rank: int, pipe: Any) -> list[Any]:
        return [load(pipe, weights) for weights in (whole, first)]

    found = workshop.run(JOINT, STAGES, body)[-1]
    for mine, theirs in zip(found, expected, strict=True):
        assert distance(mine, theirs) < GATE
    assert distance(expected[0], expected[1]) > CAUGHT
    assert "unexpected keys" not in capfd.readouterr().err


def test_adapters_switched_off_and_removed(workshop: Workshop) -> None:
    stock = workshop.stock(JOINT)
    expected, weights = call(stock), lora_weights(stock)

    def body(rank: int, pipe: Any) -> list[Any]:
        model = pipe.transformer
        model.load_lora_adapter(dict(weights), adapter_name="fox")
        model.disable_lora()
        off = call(pipe)
        model.enable_lora()
        model.fuse_lora(adapter_names=["fox"])
        fused = call(pipe)
        model.unfuse_lora()
        model.delete_adapters("fox")
        return [off, fused, call(pipe)]

    for flags in (ULYSSES, STAGES):
        off, fused, gone = workshop.run(JOINT, flags, body)[-1]
        assert distance(off, expected) < GATE
        assert distance(gone, expected) < GATE
        assert distance(fused, expected) > CAUGHT


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", [inject, nest])
def test_injected_adapters(workshop: Workshop, change: Any, before: bool) -> None:
    stock = workshop.stock(PIXART)
    plain = call(stock)
    change(stock)
    expected = call(stock)
    for flags in (CFG, ULYSSES):
        found = changed_run(workshop, PIXART, flags, change, before=before)
        assert distance(found, expected) < GATE
    assert distance(expected, plain) > CAUGHT


# -- torch.compile ---------------------------------------------------------------------


def compile_blocks(pipe: Any, **options: Any) -> None:
    """Compile each block by itself, as diffusers' `compile_repeated_blocks` does."""
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", **options)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_compiled_blocks(workshop: Workshop, before: bool) -> None:
    """No graph break inside a block under Ulysses."""
    name = JOINT if before else PIXART
    expected = call(workshop.stock(name))

    def change(pipe: Any) -> None:
        compile_blocks(pipe, fullgraph=True)

    found = changed_run(workshop, name, ULYSSES, change, before=before)
    assert distance(found, expected) < GATE


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_compiled_transformer(workshop: Workshop, before: bool) -> None:
    """Compiled once, not once a step; twice where the first call makes buffers."""
    expected = call(workshop.stock(PIXART))

    def compile_it(pipe: Any) -> None:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")

    def body(rank: int, pipe: Any) -> Any:
        if not before:
            compile_it(pipe)
        # The process that ranks are forked from may have compiled for other tests.
        counted = torch._dynamo.utils.counters["stats"]
        counted.clear()
        output = call(pipe)
        assert 1 <= counted["unique_graphs"] <= 2
        return output

    first = (lambda rank, pipe: compile_it(pipe)) if before else None
    flags = ULYSSES if before else CFG
    found = only(workshop.run(PIXART, flags, body, before=first))
    assert distance(found, expected) < GATE
