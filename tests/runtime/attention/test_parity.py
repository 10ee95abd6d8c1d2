"""Every mode gives what torch gives in one process; every sabotage of a mode is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.runtime.attention.harness import CAUGHT, GATE, Problem, errors, in_fp64
from xfuser_runtime.attention import hybrid, ring, ulysses
from xfuser_runtime.attention.keys import KeyBlock, SplitMask

MODES = {
    "ulysses2": (2, 1),
    "ulysses4": (4, 1),
    "ring2": (1, 2),
    "ring4": (1, 4),
    "ulysses2 x ring2": (2, 2),
}

PROBLEMS = {
    "even": Problem(segments=(("text", 8), ("image", 16))),
    "uneven lengths": Problem(segments=(("text", 7), ("image", 19))),
    "one sample": Problem(batch=1),
    "one segment": Problem(
        segments=(("image", 13),), queries=("image",), keys=("image",)
    ),
    "3 heads": Problem(heads=3, key_heads=3),
    "6 heads": Problem(heads=6, key_heads=6),
    "1 head": Problem(heads=1, key_heads=1),
    "grouped heads": Problem(heads=8, key_heads=4),
    "uneven grouped heads": Problem(heads=6, key_heads=2),
    "grouped heads across ranks": Problem(heads=6, key_heads=3),
    "one key head": Problem(heads=5, key_heads=1),
    "empty shards": Problem(segments=(("text", 1), ("image", 3))),
    "empty shards, keys alone": Problem(
        segments=(("text", 1), ("image", 9)), queries=("image",), keys=("text",)
    ),
    "other keys": Problem(
        segments=(("audio", 9), ("image", 14)), queries=("image",), keys=("audio",)
    ),
    "other order": Problem(queries=("image", "text"), keys=("image", "text")),
    "scale": Problem(scale=0.05),
    "key mask": Problem(mask="key_bool"),
    "key mask, uneven": Problem(
        segments=(("text", 7), ("image", 10)), heads=3, key_heads=3, mask="key_bool"
    ),
    "key mask, additive": Problem(mask="key_additive"),
    "key mask, per head": Problem(mask="key_per_head", heads=6, key_heads=6),
    "key mask, other keys": Problem(
        segments=(("audio", 9), ("image", 14)),
        queries=("image",),
        keys=("audio",),
        mask="key_bool",
    ),
    "key mask, all keys of a sample": Problem(mask="key_dead"),
    "key mask, expanded": Problem(mask="expanded"),
    "key mask, empty shards": Problem(
        segments=(("text", 1), ("image", 3)), mask="key_additive"
    ),
    "square mask": Problem(mask="square_bool"),
    "square mask, additive": Problem(mask="square_additive", heads=3, key_heads=3),
    "square mask, per head": Problem(mask="square_per_head", heads=6, key_heads=6),
    "square mask, whole blocks of the smallest number": Problem(mask="square_smallest"),
    "square mask, empty shards": Problem(
        segments=(("text", 1), ("image", 2)), mask="square_additive"
    ),
    "several patches, whole pass": Problem(patches=3, mask="square_bool"),
    "plain kernel": Problem(mask="key_bool", backend="sdpa_math"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_matches_one_process(mode: str, dtype: torch.dtype) -> None:
    problems = PROBLEMS if dtype == torch.float32 else in_fp64(PROBLEMS)
    found = errors(*MODES[mode], problems)
    too_large = {name: e for name, e in found.items() if e > GATE[dtype]}
    assert not too_large


def zero_what_others_send() -> None:
    """Ulysses: the all-to-all delivers only this rank's own piece."""
    genuine = ulysses.all_to_all_flat

    def lossy(x, output_splits, input_splits, group):  # type: ignore[no-untyped-def]
        received = genuine(x, output_splits, input_splits, group)
        for peer, piece in enumerate(received.split(list(output_splits))):
            if peer != group.rank_in_group:
                piece.zero_()
        return received

    ulysses.all_to_all_flat = lossy


def shift_rows() -> None:
    """Ulysses: every row of the output is that of its neighbour."""
    genuine = hybrid.ulysses.heads_to_rows
    hybrid.ulysses.heads_to_rows = lambda out, **kwargs: genuine(
        out.roll(1, 1), **kwargs
    )


def swap_heads() -> None:
    """Ulysses: the heads come back in the order of the next rank."""
    genuine = hybrid.ulysses.heads_to_rows
    hybrid.ulysses.heads_to_rows = lambda out, **kwargs: genuine(out, **kwargs).roll(
        1, 2
    )


def drop_transfer() -> None:
    """Ring: nothing arrives, each rank sees its own keys again and again."""

    def lossy(leaving: KeyBlock, arriving: KeyBlock, group: object) -> list[object]:
        rows = min(leaving.length, arriving.length)
        arriving.key.zero_()[:, :rows] = leaving.key[:, :rows]
        arriving.value.zero_()[:, :rows] = leaving.value[:, :rows]
        if arriving.mask is not None:
            arriving.mask.zero_()[..., :rows] = leaving.mask[..., :rows]
        return []

    ring._post_transfer = lossy


def merge_without_mass() -> None:
    """Ring: blocks are averaged, whatever softmax mass they have."""
    genuine = ring.Partial.merge
    ring.Partial.merge = lambda self, out, lse: genuine(self, out, self.lse.clone())


def forget_mass() -> None:
    """Ring: the mass of the blocks merged before is not carried on."""

    def merge(self, out, lse):  # type: ignore[no-untyped-def]
        weight = torch.sigmoid(lse - self.lse).nan_to_num_(0.0)
        self.out.lerp_(out.to(self.out.dtype), weight.transpose(1, 2).unsqueeze(-1))

    ring.Partial.merge = merge


def drop_mask() -> None:
    hybrid.masks.split_mask = lambda *args, **kwargs: SplitMask()


def shift_key_mask() -> None:
    genuine = hybrid.masks.split_mask

    def shifted(*args, **kwargs):  # type: ignore[no-untyped-def]
        found = genuine(*args, **kwargs)
        return SplitMask(
            keys=None if found.keys is None else found.keys.roll(1, -1),
            rows=None if found.rows is None else found.rows.roll(1, -1),
        )

    hybrid.masks.split_mask = shifted


SABOTAGES = [
    ("ulysses2", zero_what_others_send, "uneven lengths"),
    ("ulysses4", zero_what_others_send, "grouped heads"),
    ("ulysses2", shift_rows, "uneven lengths"),
    ("ulysses4", swap_heads, "6 heads"),
    ("ring2", drop_transfer, "uneven lengths"),
    ("ring4", drop_transfer, "key mask"),
    ("ring2", merge_without_mass, "uneven lengths"),
    ("ring4", forget_mass, "even"),
    ("ulysses2 x ring2", drop_transfer, "uneven lengths"),
    ("ulysses2 x ring2", zero_what_others_send, "grouped heads across ranks"),
    *[(mode, drop_mask, "key mask") for mode in MODES],
    *[(mode, drop_mask, "square mask, additive") for mode in MODES],
    *[(mode, shift_key_mask, "key mask, additive") for mode in MODES],
    ("ring2", drop_mask, "key mask, all keys of a sample"),
]


@pytest.mark.parametrize(("mode", "sabotage", "name"), SABOTAGES)
def test_sabotage_is_caught(mode: str, sabotage: Callable[[], None], name: str) -> None:
    problem = PROBLEMS[name]
    found = errors(*MODES[mode], {name: problem}, sabotage)
    assert found[name] >= CAUGHT * GATE[problem.dtype]
