"""Which faults must be caught before a mode counts as proven.

A fault breaks one mechanism of the runtime inside the ranks (the names are those of
`xfuser_runtime.replay.faults`).  A way of splitting is proven on a model only when breaking
its own mechanism, in that mode and on that model, is far outside the gate: an error of
zero would mean that the mode is not at work at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
#: Of stages that all get the whole latents.
SHARE_FAULT = "shared_latents_dropped"
#: Of the stages that get them in their turn: where all steps are shared none is left.
FEEDBACK_FAULT = "stage_feedback_dropped"
#: Of any split of the tokens, where the model has masks at all.
MASK_FAULT = "mask_dropped"
#: Of stages, where the loop carries several latents.
LATENTS_FAULT = "further_latents_dropped"
#: Those that break the kernel of the attention: none of a model whose attention is a sum.
KERNEL_FAULTS = ("ring_exchange_dropped", "ulysses_exchange_dropped", "key_doubled")
#: Of guidance, where each rank runs other models for its branch alone.
HELPER_FAULT = "cfg_helper_output_dropped"
#: Of any split of the tokens, by what the blocks do with them.
MIXING_FAULTS = {
    "token_sums": "token_sum_dropped",
    "row_layers": "halo_dropped",
    "gathered": "gathered_tokens_dropped",
    "selecting": "absent_tokens_attend",
}


@dataclass(frozen=True)
class Mechanisms:
    """What a port does with split tokens.

    Attributes:
        kernels: whether attention kernels see the keys of other ranks.
        masks: whether dropping the masks changes stock's result.
        mixing: keys of `MIXING_FAULTS`, in their order.
        several_latents: whether the loop steps more than one tensor.
        helpers: whether each rank runs other models for its guidance branch alone.
        shares: when every stage gets the whole latents: at the end of all "steps", of the
            "loop", or "".
        batch_processors: whether it has the processors that some calls set.
    """

    kernels: bool = True
    masks: bool = False
    mixing: tuple[str, ...] = ()
    several_latents: bool = False
    helpers: bool = False
    shares: str = ""
    batch_processors: bool = False

    @classmethod
    def of(
        cls, facts: Mapping[str, Any], latents: int = 1, shares: str = ""
    ) -> Mechanisms:
        """From the measured facts of a port, as the lock keeps them.

        Args:
            facts: of the pipeline.
            latents: how many of them the loop carries.
            shares: when every stage gets them, as the source and the facts say.
        """
        transformers = facts.get("transformers", {})
        found = [item.get("mixing", {}) for item in transformers.values()]
        keys = [k for item in transformers.values() for k in item["attention"].values()]
        return cls(
            kernels=any(keys) or not any(found),
            mixing=tuple(
                name for name in MIXING_FAULTS if any(item.get(name) for item in found)
            ),
            several_latents=latents > 1,
            helpers=bool(facts.get("cfg_helper_axes")),
            shares=shares,
            batch_processors=any(
                item.get("batch_processors") for item in transformers.values()
            ),
        )


def faults_for(mode: Mode, has: Mechanisms) -> tuple[str, ...]:
    """The faults that verification of `mode` injects, one run each.

    The smallest mode of a way of splitting gets all faults of its kind; larger ones and
    products get those that stand for the ways that they combine.

    Args:
        mode: a mode.
        has: what the port does with split tokens.
    """
    if len(mode.kinds) > 1 or mode.world_size > 2 or mode.patches not in (0, 2):
        firsts = [_faults_of(kind, has)[0] for kind in mode.kinds]
        return tuple(dict.fromkeys(firsts))
    (kind,) = mode.kinds
    masks = (MASK_FAULT,) if has.masks and has.kernels and kind in _OF_TOKENS else ()
    return _faults_of(kind, has) + masks


_OF_TOKENS = ("ring", "ulysses")


def _faults_of(kind: str, has: Mechanisms) -> tuple[str, ...]:
    """The faults of a way of splitting that this port can be broken by."""
    faults = tuple(
        fault for fault in FAULTS[kind] if has.kernels or fault not in KERNEL_FAULTS
    )
    if kind == "cfg" and has.helpers:
        faults += (HELPER_FAULT,)
    if kind in ("pp", "pipefusion") and has.shares:
        faults = (*faults, SHARE_FAULT)
        if has.shares == "steps":
            faults = tuple(fault for fault in faults if fault != FEEDBACK_FAULT)
    if kind not in _OF_TOKENS:
        several = kind == "pp" and has.several_latents
        return (*faults, LATENTS_FAULT) if several else faults
    mixing = tuple(MIXING_FAULTS[name] for name in has.mixing)
    return faults + mixing if has.kernels else mixing + faults
