"""Reference runs of a stock pipeline: as it is, with permuted keys, and sabotaged.

The floor is what rounding alone does to this model on these inputs.  The sabotages at this
level need no port: they tell whether a case is lively enough to notice a lost key, a lost
mask or a doubled token at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from porter.verify.gate import relative_error
from porter.verify.hooks import AttentionCall, Replacement, denoiser_attention

#: Orders of the keys: a decoder behind the loop makes single pixels of some roundings alone.
_ORDERS, _ORDERS_WHEN_DECODED = 1, 4
#: Seed of torch's global generator before each call, here and in the ranks.
GLOBAL_SEED = 20


@dataclass(frozen=True)
class Reference:
    """Stock's answer to one call, and how much rounding moves it.

    Attributes:
        outputs: the final latents, one tensor an output.
        floor: largest relative error of the same run with its attention keys permuted.
        attends_to_itself: whether it has self attention by a kernel, whose keys can be lost.
    """

    outputs: tuple[torch.Tensor, ...]
    floor: float
    attends_to_itself: bool = True


def run_stock(
    pipeline: Any, call: Callable[[], Mapping[str, Any]]
) -> tuple[torch.Tensor, ...]:
    """The tensors that one call of the stock pipeline returns.

    Args:
        pipeline: the stock pipeline.
        call: makes fresh keyword arguments (a generator is used up by a run).
    """
    with seeded():
        return output_tensors(pipeline(**call()))


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Torch's global generator seeded as the ranks seed it, and put back afterwards.

    Some loops draw from it, whatever generator the caller gives.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(GLOBAL_SEED)
        yield


def reference(pipeline: Any, call: Callable[[], Mapping[str, Any]]) -> Reference:
    """Run stock as it is, and with permuted keys."""
    outputs = run_stock(pipeline, call)
    is_decoded = call().get("output_type") not in (None, "latent")
    orders = range(_ORDERS_WHEN_DECODED if is_decoded else _ORDERS)
    found = False

    def error(number: int) -> float:
        def permute(attention: AttentionCall) -> torch.Tensor:
            nonlocal found
            found |= _is_over_itself(attention)
            return permuted_keys(attention, number)

        return relative_error(run_replaced(pipeline, call, permute), outputs)

    return Reference(outputs, max(map(error, orders)), found)


def run_replaced(
    pipeline: Any, call: Callable[[], Mapping[str, Any]], replacement: Replacement
) -> tuple[torch.Tensor, ...]:
    """One stock call whose denoiser attends by `replacement`."""
    with denoiser_attention(pipeline, replacement):
        return run_stock(pipeline, call)


def output_tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """All tensors of a pipeline's output (an output object, a tuple or a list), in order.

    Raises:
        ValueError: it holds none.
    """
    found: list[torch.Tensor] = []
    _collect(output, found)
    if not found:
        raise ValueError(
            f"a pipeline returned {type(output).__name__} without a tensor, expected "
            'latents; call it with output_type="latent"'
        )
    return tuple(tensor.detach().clone() for tensor in found)


def permuted_keys(call: AttentionCall, number: int = 0) -> torch.Tensor:
    """The same attention with keys, values and mask columns in another order, by number."""
    if call.is_causal:
        return call.run()
    length = call.key.shape[-2]
    generator = torch.Generator().manual_seed(length + 1000 * number)
    order = torch.randperm(length, generator=generator)
    return call.select_keys(order.to(call.key.device)).run()


def lost_keys(call: AttentionCall) -> torch.Tensor:
    """Sabotage: self attention sees every second of its keys alone.

    Not the first half: the other one may be padding that masks hide anyway.
    """
    if not _is_over_itself(call):
        return call.run()
    half = torch.arange(0, call.key.shape[-2], 2, device=call.key.device)
    return call.select_keys(half).run()


def _is_over_itself(call: AttentionCall) -> bool:
    return not call.is_causal and call.query.shape[-2] == call.key.shape[-2]


def lost_mask(call: AttentionCall) -> torch.Tensor:
    """Sabotage: the mask is dropped."""
    return replace(call, attn_mask=None).run()


def doubled_key(call: AttentionCall) -> torch.Tensor:
    """Sabotage: the first key counts twice, as one doubled token would."""
    if call.is_causal:
        return call.run()
    rows = torch.arange(call.key.shape[-2], device=call.key.device)
    return call.select_keys(torch.cat([rows[:1], rows])).run()


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, Mapping):  # diffusers' BaseOutput is an OrderedDict
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
