"""The ways in which pipelines use encoders, on models that are shared without a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from tests.ranks import run_ranks
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed.parallel_state import (
    destroy_model_parallel,
    initialize_model_parallel,
)
from xfuser_runtime.encoders import calls, share_encoders

IDS = torch.tensor([[1, 2, 3]])
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}


def language_model() -> nn.Module:
    """A tiny decoder."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def text_and_image_model() -> nn.Module:
    """A tiny model of two towers."""
    torch.manual_seed(0)
    text = {"vocab_size": 20, "eos_token_id": 19, **SMALL}
    image = {"image_size": 16, "patch_size": 8, **SMALL}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=16)
    return CLIPModel(config).eval()


def sample(model: Any) -> list[torch.Tensor]:
    """Text drawn at random, and what the rank draws afterwards."""
    torch.manual_seed(3)
    found = model.generate(
        IDS, do_sample=True, max_new_tokens=5, min_new_tokens=5, pad_token_id=0
    )
    return [found, torch.rand(2)]


def step_by_step(model: Any) -> list[torch.Tensor]:
    """A loop of the pipeline's own, which hands keys and values back to the model."""
    ids, cache, found = IDS, None, []
    for _ in range(3):
        output = model(ids, past_key_values=cache, output_hidden_states=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        found += [ids, *output.hidden_states]
    assert cache.get_seq_length() == 5
    return found


def parts(model: Any) -> list[torch.Tensor]:
    """Submodules, at several depths."""
    words = model.get_input_embeddings()(IDS)
    block = model.transformer.h[0]
    return [words, block.ln_1(words), block.mlp(words), model.lm_head(words)]


def features(model: Any) -> list[torch.Tensor]:
    """Methods that a class adds, and a tower of two, as a tuple and as an object."""
    pixels = torch.ones(1, 3, 16, 16)
    pooled = model.get_text_features(IDS)
    pictures = model.vision_model(pixels, return_dict=False)
    return [
        getattr(pooled, "pooler_output", pooled),
        *pictures,
        model.text_projection(model.text_model(IDS).pooler_output),
        model.vision_model.post_layernorm(pictures[0]),
    ]


USES = {
    "sample": (language_model, sample),
    "step by step": (language_model, step_by_step),
    "parts": (language_model, parts),
    "features": (text_and_image_model, features),
}


def used(make: Callable[[], nn.Module], use: Callable[[Any], Any]) -> list[Any]:
    """What `use` returns on each of two ranks that share a model."""

    def rank_main(rank: int) -> Any:
        initialize_model_parallel(ParallelConfig(use_cfg_parallel=True))
        model = make()
        share_encoders({"encoder": model}, None)
        with torch.no_grad():
            return use(model)

    return run_ranks(rank_main, 2)


@pytest.mark.parametrize("name", USES)
def test_equal_to_a_model_of_ones_own(name: str) -> None:
    make, use = USES[name]
    with torch.no_grad():
        expected = use(make())
    for found in used(make, use):
        pairs = zip(found, expected, strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_result_of_ones_own_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the other rank changes what it receives."""
    receive = calls.receive
    monkeypatch.setattr(
        calls, "receive", lambda packed, group: receive(packed, group) + 1
    )
    with torch.no_grad():
        expected = parts(language_model())
    first, other = used(language_model, parts)
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_a_call_after_the_session_is_refused() -> None:
    """The rank with the weights goes on alone."""

    def leave(model: Any) -> str:
        destroy_model_parallel()
        try:
            return str(len(parts(model)))
        except Exception as error:
            return str(error)

    first, other = used(language_model, leave)
    assert first == "4"
    assert other.startswith(
        "a call of encoder.transformer.wte on rank 0 of a replica of 1"
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda model: cpu_offload(model, torch.device("cpu")),
        lambda model: model.state_dict(),
        lambda model: model.resize_token_embeddings(30),
        lambda model: model.transformer.wte.weight[0],
    ],
    ids=["offload", "state dict", "resize", "weight"],
)
def test_a_use_of_weights_is_refused(use: Callable[[Any], Any]) -> None:
    def told(model: Any) -> str:
        try:
            use(model)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    first, other = used(language_model, told)
    assert first == ""
    assert other.startswith("NotSupportedError: ") and "\n" not in other
    assert "which the first rank of the replica holds alone" in other
