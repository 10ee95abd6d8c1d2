"""Guider objects over two CFG ranks: each computes every second entry.

A guider prepares one entry for each branch of guidance and combines what the transformer
makes of them.  Each rank goes through the loop over all entries, since guiders count them,
but the transformer runs for its own alone; then the ranks exchange the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.errors import InputError
from xfuser_runtime.pipelines.cfg import exchange, runs_whole, skipped_call


def entries(items: Iterable[Any], attribute: str) -> Iterator[Any]:
    """The entries, for a loop that computes `attribute` of each; complete after the last.

    An entry without a partner is computed by both ranks.
    """
    state, every = get_runtime_state(), list(items)
    ranks = parallel_state.get_classifier_free_guidance_world_size()
    rank = parallel_state.get_classifier_free_guidance_rank()
    paired = len(every) - len(every) % 2 if ranks == 2 else 0
    for number, entry in enumerate(every):
        state.cfg_entry_is_skipped = number < paired and number % 2 != rank
        yield entry
    state.cfg_entry_is_skipped = False
    if parallel_state.is_pipeline_last_stage():
        for first, second in zip(every[0:paired:2], every[1:paired:2], strict=True):
            both = exchange(getattr(first, attribute), getattr(second, attribute))
            for entry, output in zip((first, second), both, strict=True):
                setattr(entry, attribute, output)


def entry_call(transformer: Callable[..., Any]) -> Callable[..., Any]:
    """`transformer`, or a placeholder's maker where the other rank computes the entry."""
    if get_runtime_state().cfg_entry_is_skipped and not runs_whole(transformer):
        return skipped_call(transformer)
    return transformer


def check_guider(guider: Any, num_steps: int, dim: int | None) -> None:
    """Refuse a guider whose work does not split.

    Args:
        guider: what combines the entries.
        num_steps: steps of this call.
        dim: dimension of the latents that patches cut; None for whole passes alone.

    Raises:
        InputError: it hooks into the transformer's layers, or its formula makes rows of
            the latents depend on each other or on earlier steps.
    """
    name = type(guider).__name__
    owners = [c for c in type(guider).__mro__ if "prepare_models" in vars(c)]
    if len(owners) > 1:
        raise InputError(
            f"guider {name} changes layers of the transformer, expected one that combines "
            "outputs alone; use ClassifierFreeGuidance, or one process"
        )
    if dim is not None and not _keeps_rows_apart(copy.deepcopy(guider), num_steps, dim):
        raise InputError(
            f"guider {name} looks at all rows of the latents at once or at earlier steps, "
            "expected a formula for each row alone; use ClassifierFreeGuidance without "
            "rescaling, or warmup_steps >= the number of steps"
        )


def _keeps_rows_apart(guider: Any, num_steps: int, dim: int) -> bool:
    """Measure on small numbers, as in every step of the call, whether rows keep apart."""
    shape = [2] * (max(dim, 3) + 1)
    shape[dim] = 4
    generator = torch.Generator().manual_seed(0)

    def predictions() -> dict[str, torch.Tensor]:
        names = guider._input_predictions[: guider.num_conditions]
        return {name: torch.randn(shape, generator=generator) for name in names}

    for step in range(num_steps):
        guider.set_state(
            step=step, num_inference_steps=num_steps, timestep=torch.tensor(1.0)
        )
        plain = predictions()
        other = {
            name: torch.cat([value.narrow(dim, 0, 2), fresh.narrow(dim, 2, 2)], dim)
            for (name, value), fresh in zip(
                plain.items(), predictions().values(), strict=True
            )
        }
        used = copy.deepcopy(guider)
        one = used.forward(**plain)[0]
        two = guider.forward(**other)[0]
        again = used.forward(**other)[0]
        if not torch.equal(again, two):
            return False
        if not torch.equal(one.narrow(dim, 0, 2), two.narrow(dim, 0, 2)):
            return False
    return True
