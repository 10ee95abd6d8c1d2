"""Which of the other models that a step calls (a ControlNet, say) are given the latents.

Two runs that differ in their seed alone have other latents: what a model is given in both
alike does not come from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import zip_longest
from typing import Any

import torch

from porter.probe.capture import TransformerCall, whole_run_calls
from porter.probe.leaves import tensor_leaves

SEEDS = (0, 1)


def models_on_latents(
    pipeline: Any,
    kwargs_of: Callable[..., Mapping[str, Any]],
    names: Collection[str],
) -> tuple[str, ...]:
    """Those of the components `names` whose arguments depend on the latents, in order.

    Args:
        pipeline: the shrunken stock pipeline.
        kwargs_of: makes call arguments from `seed`.
        names: components that a step calls besides its transformer.
    """
    if not names:
        return ()
    one, other = (
        whole_run_calls(pipeline, kwargs_of(seed=seed), names) for seed in SEEDS
    )
    moved = {
        call.component
        for pair in zip_longest(one, other)
        if not _alike(*pair)
        for call in pair
        if call is not None
    }
    return tuple(name for name in names if name in moved)


def _alike(one: TransformerCall | None, other: TransformerCall | None) -> bool:
    if one is None or other is None or one.component != other.component:
        return False
    leaves = [dict(tensor_leaves(call.arguments)) for call in (one, other)]
    return leaves[0].keys() == leaves[1].keys() and all(
        torch.equal(leaf, leaves[1][path]) for path, leaf in leaves[0].items()
    )
