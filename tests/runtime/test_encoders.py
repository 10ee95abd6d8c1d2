"""Pieces of shared encoders that need no ranks: packed results, absent weights, what counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPModel,
    DynamicCache,
    T5Config,
    T5EncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from xfuser_runtime.distributed.parallel_state import Group
from xfuser_runtime.encoders import is_encoder_class, names_before, results
from xfuser_runtime.encoders.absent import Absent, Sharing
from xfuser_runtime.encoders.calls import computing_methods
from xfuser_runtime.errors import NotSupportedError


def sent(result: Any, monkeypatch: pytest.MonkeyPatch, *, drop: bool = False) -> Any:
    """`result` as a second rank gets it; with `drop` nothing arrives."""
    wire: list[torch.Tensor] = []

    def send(x: torch.Tensor, group: Group) -> torch.Tensor:
        wire.append(x.clone())
        return x

    def take(x: torch.Tensor, group: Group) -> torch.Tensor:
        arrived = wire.pop(0)
        return x.fill_(0) if drop else x.copy_(arrived)

    packed, tensors = results.pack(result)
    monkeypatch.setattr(results, "broadcast", send)
    results.send_tensors(tensors, packed, Group())
    monkeypatch.setattr(results, "broadcast", take)
    received = results.receive(packed, Group())
    assert not wire
    return received


BASE = torch.arange(24.0).view(2, 3, 4) + 1


@pytest.mark.parametrize(
    "tensor",
    [
        BASE,
        BASE.transpose(0, 2),
        BASE[:, 0],
        BASE[:, 1:, ::2],
        torch.ones(3, 1).expand(3, 5),
        torch.tensor(3),
        torch.ones(2, 3, dtype=torch.bool),
        BASE.bfloat16(),
        torch.view_as_complex(torch.randn(3, 2)).conj(),
        torch.ones(4).requires_grad_() * 2,
    ],
    ids=[
        "dense",
        "transposed",
        "with gaps",
        "with more gaps",
        "expanded",
        "scalar",
        "bool",
        "bfloat16",
        "conjugate",
        "with gradient",
    ],
)
def test_a_tensor_arrives_as_it_lies(
    tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = sent((tensor,), monkeypatch)
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert found.stride() == tensor.resolve_conj().stride() and not found.requires_grad
    # The sabotage twin: nothing arrives.
    (dropped,) = sent((tensor,), monkeypatch, drop=True)
    assert not torch.equal(dropped, tensor)


def test_an_empty_tensor_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent(torch.ones(0, 3), monkeypatch).shape == (0, 3)


def test_a_models_output_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested containers, one tensor twice, None, and keys and values of a decoder."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    states = (BASE, BASE + 1)
    output = BaseModelOutputWithPast(
        last_hidden_state=states[-1], past_key_values=cache, hidden_states=states
    )
    found = sent({"out": output, "more": [1, "a", None]}, monkeypatch)
    assert type(found["out"]) is type(output) and found["more"] == [1, "a", None]
    assert found["out"].last_hidden_state is found["out"].hidden_states[-1]
    assert torch.equal(found["out"][0], states[-1]) and found["out"].attentions is None
    assert found["out"].past_key_values.get_seq_length() == 2


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ((nn.Linear(2, 2),), "a result with a module, Linear, expected tensors"),
        (torch.eye(2).to_sparse(), "a tensor of layout torch.sparse_coo on cpu"),
        ([lambda: None], "a list that cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_refused(result: Any, words: str) -> None:
    with pytest.raises(NotSupportedError, match=words):
        results.pack(result)


@pytest.fixture
def absent() -> Absent:
    """A weight that another rank holds."""
    sharing = Sharing("encoder", holds_weights=False, device=torch.device("cpu"))
    return Absent.of(nn.Parameter(torch.ones(2, 3)), "encoder.weight", sharing)


def test_an_absent_weight_answers_questions(absent: Absent) -> None:
    assert isinstance(absent, nn.Parameter) and absent.is_meta
    assert absent.device == torch.device("cpu") and absent.dtype == torch.float32
    assert (absent.shape, absent.numel(), absent.requires_grad) == ((2, 3), 6, True)
    absent.convert(lambda x: x.half())
    assert absent.dtype == torch.float16
    copied = copy.deepcopy(absent)
    assert copied.dtype == torch.float16 and copied.sharing is not absent.sharing
    assert "encoder.weight" in repr(absent)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: torch.nn.functional.linear(torch.ones(1, 3), x),
        lambda x: torch.cat([torch.ones(2, 3), x]),
        lambda x: x.to("cpu"),
        lambda x: x.detach(),
        lambda x: x.data,
        lambda x: x.T,
        lambda x: x[0],
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: torch.zeros_like(x),
        lambda x: torch.ones(2, 3).copy_(x),
    ],
)
def test_an_absent_weight_computes_nothing(absent: Absent, use: Any) -> None:
    with pytest.raises(NotSupportedError, match="of encoder.weight, which the first"):
        use(absent)


def test_which_components_are_encoders() -> None:
    assert is_encoder_class(T5EncoderModel)
    assert not is_encoder_class(AutoencoderKL) and not is_encoder_class(T5Config)
    sequence = "text_encoder->image_encoder->transformer->vae->vocoder"
    found = names_before(sequence, {"transformer"})
    assert found == {"text_encoder", "image_encoder"}
    assert (
        names_before(sequence, {"prior"}) is None and names_before(None, set()) is None
    )


def test_which_methods_compute() -> None:
    assert "get_text_features" in computing_methods(CLIPModel)
    assert computing_methods(nn.Linear) == ["__call__", "forward"]
    assert computing_methods(nn.ModuleList) == []
    assert not {"get_input_embeddings", "to", "eval"} & {*computing_methods(CLIPModel)}
