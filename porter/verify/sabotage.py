"""Which faults must be caught before a mode counts as proven.

A fault breaks one mechanism of the runtime inside the ranks (the names are those of
`xfuser_runtime.replay.faults`).  A way of splitting is proven on a model only when breaking
its own mechanism, in that mode and on that model, is far outside the gate: an error of
zero would mean that the mode is not at work at all.
"""

from __future__ import annotations

from porter.verify.modes import Mode

#: The faults of each way of splitting; the first one stands for it in products.
FAULTS: dict[str, tuple[str, ...]] = {
    "dp": ("replica_rows_swapped",),
    "cfg": ("cfg_exchange_dropped",),
    "pp": ("stage_hand_over_dropped", "stage_feedback_dropped"),
    "pipefusion": (
        "stale_cache_frozen",
        "scheduler_stepped_twice",
        "stage_hand_over_dropped",
        "position_rows_shifted",
    ),
    "ring": (
        "ring_exchange_dropped",
        "gather_dropped",
        "position_rows_shifted",
        "key_doubled",
    ),
    "ulysses": (
        "ulysses_exchange_dropped",
        "gather_dropped",
        "position_rows_shifted",
        "key_doubled",
    ),
}
#: Of any split of the tokens, where the model has masks at all.
MASK_FAULT = "mask_dropped"


def faults_for(mode: Mode, *, has_masks: bool) -> tuple[str, ...]:
    """The faults that verification of `mode` injects, one run each.

    The smallest mode of a way of splitting gets all faults of its kind; larger ones and
    products get those that stand for the ways that they combine.

    Args:
        mode: a mode.
        has_masks: whether dropping the masks changes stock's result.
    """
    if len(mode.kinds) > 1 or mode.world_size > 2 or mode.patches not in (0, 2):
        return tuple(FAULTS[kind][0] for kind in mode.kinds)
    (kind,) = mode.kinds
    masks = (MASK_FAULT,) if has_masks and kind in ("ring", "ulysses") else ()
    return FAULTS[kind] + masks
