"""PipeFusion's key/value cache against a simulation in one process that knows no cache.

The simulation keeps, for every segment, whole key and value tensors in natural order. A whole pass
replaces them; a patch pass replaces the rows of its patch. Queries of the pass attend, with torch,
to all rows that any pass has written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from tests.runtime.attention.harness import (
    CAUGHT,
    GATE,
    Problem,
    assembled,
    on_rank,
    relative_error,
)
from xfuser_runtime.attention import KVCache
from xfuser_runtime.attention.keys import KeyBlock
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed.layout import TokenLayout
from xfuser_runtime.distributed.parallel_state import initialize_model_parallel

MODES = {
    "one rank": (1, 1),
    "ulysses2": (2, 1),
    "ring2": (1, 2),
    "ulysses2 x ring2": (2, 2),
}

Pass = tuple[int, int | None]  # seed of the tensors, patch


def passes(patches: int, whole: int, steps: int = 3) -> list[Pass]:
    """`whole` steps of one whole pass each, then steps of one pass a patch."""
    found: list[Pass] = []
    for step in range(steps):
        for patch in [None] if step < whole else range(patches):
            found.append((len(found), patch))
    return found


PROBLEMS = {
    "2 patches": (Problem(patches=2), passes(2, whole=1)),
    "3 patches, odd lengths": (
        Problem(segments=(("text", 7), ("image", 13)), patches=3),
        passes(3, whole=1),
    ),
    "4 patches, 3 heads": (
        Problem(patches=4, heads=3, key_heads=3, batch=1),
        passes(4, whole=2),
    ),
    "patches of whole rows": (
        Problem(segments=(("text", 3), ("image", 20)), patches=2, row=4),
        passes(2, whole=1),
    ),
    "image first": (
        Problem(
            segments=(("image", 11), ("text", 6)),
            queries=("image", "text"),
            keys=("image", "text"),
            patches=3,
        ),
        passes(3, whole=1),
    ),
    "no warm-up": (Problem(patches=3), passes(3, whole=0)),
    "no warm-up, key mask": (Problem(patches=3, mask="key_bool"), passes(3, whole=0)),
    "no warm-up, square mask": (
        Problem(patches=3, mask="square_additive"),
        passes(3, whole=0),
    ),
    "key mask": (
        Problem(patches=3, mask="key_additive", heads=3, key_heads=3),
        passes(3, whole=1),
    ),
    "key mask, per head": (Problem(patches=2, mask="key_per_head"), passes(2, whole=1)),
    "square mask": (Problem(patches=2, mask="square_bool"), passes(2, whole=1)),
    "grouped heads": (Problem(patches=2, heads=6, key_heads=3), passes(2, whole=1)),
    "empty shards": (
        Problem(segments=(("text", 1), ("image", 3)), patches=3),
        passes(3, whole=1),
    ),
    "other keys": (
        Problem(
            segments=(("text", 9), ("image", 14)),
            queries=("image",),
            keys=("text", "image"),
            patches=2,
        ),
        passes(2, whole=1),
    ),
    "whole passes again": (
        Problem(patches=2),
        [(0, None), (1, 0), (2, 1), (3, None), (4, 0), (5, 1)],
    ),
}


def patch_rows(problem: Problem, patch: int | None) -> dict[str, slice]:
    """Rows of each segment in a pass."""
    found = {}
    layout = problem.layout(1)
    for name, length in problem.segments:
        if patch is None:
            found[name] = slice(0, length)
        elif name == "image":
            first, last = layout.patch_rows(patch)
            found[name] = slice(first * problem.row, last * problem.row)
        else:
            ((first, last),) = layout.ranges(name, patch, 0) or ((0, 0),)
            found[name] = slice(first, last)
    return found


def simulated(problem: Problem, schedule: list[Pass]) -> list[torch.Tensor]:
    """The output of every pass, rows in natural order."""
    lengths = dict(problem.segments)
    shape = (problem.batch, sum(lengths[n] for n in problem.keys), problem.key_heads)
    keys = torch.zeros(*shape, problem.head_dim, dtype=problem.dtype)
    values, written = torch.zeros_like(keys), torch.zeros(shape[1], dtype=torch.bool)
    outputs = []
    for seed, patch in schedule:
        query, key, value = problem.tensors(seed)
        rows, at = patch_rows(problem, patch), 0
        for name in problem.keys:
            here = slice(at + rows[name].start, at + rows[name].stop)
            keys[:, here], values[:, here] = (
                key[name][:, rows[name]],
                value[name][:, rows[name]],
            )
            written[here] = True
            at += lengths[name]
        mask = problem.whole_mask()
        if mask is not None:
            mask = mask[..., written]
            if mask.shape[2] > 1:
                picked, at = [], 0
                for name in problem.queries:
                    picked.append(mask[:, :, at : at + lengths[name]][:, :, rows[name]])
                    at += lengths[name]
                mask = torch.cat(picked, dim=2)
        out = F.scaled_dot_product_attention(
            torch.cat([query[n][:, rows[n]] for n in problem.queries], 1).transpose(
                1, 2
            ),
            keys[:, written].transpose(1, 2),
            values[:, written].transpose(1, 2),
            attn_mask=mask,
            enable_gqa=problem.heads != problem.key_heads,
        )
        outputs.append(out.transpose(1, 2))
    return outputs


def largest_errors(
    mode: str,
    problems: dict[str, tuple[Problem, list[Pass]]],
    sabotage: Callable[[], None] | None = None,
) -> dict[str, float]:
    """For each problem the largest relative error of any pass."""
    ulysses, ring = MODES[mode]
    # One rank's sequence runs twice, as two replicas, so that a sabotage stays in a fork.
    replicas = 2 if ulysses * ring == 1 else 1

    def body(rank: int) -> dict[str, list[torch.Tensor]]:
        initialize_model_parallel(
            ParallelConfig(
                data_parallel_degree=replicas, ulysses_degree=ulysses, ring_degree=ring
            )
        )
        if sabotage is not None:
            sabotage()
        found = {}
        for name, (problem, schedule) in problems.items():
            cache = KVCache()
            found[name] = [
                on_rank(problem, seed, patch, cache) for seed, patch in schedule
            ]
        return found

    results = run_ranks(body, replicas * ulysses * ring)[: ulysses * ring]
    largest = {}
    for name, (problem, schedule) in problems.items():
        expected = simulated(problem, schedule)
        largest[name] = max(
            relative_error(
                assembled(problem, [result[name][i] for result in results], patch),
                expected[i],
            )
            for i, (_, patch) in enumerate(schedule)
        )
    return largest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_matches_the_simulation(mode: str, dtype: torch.dtype) -> None:
    problems = {
        name: (replace(problem, dtype=dtype), schedule)
        for name, (problem, schedule) in PROBLEMS.items()
    }
    too_large = {
        name: e for name, e in largest_errors(mode, problems).items() if e > GATE[dtype]
    }
    assert not too_large


def never_overwrite() -> None:
    """A patch pass attends to what the whole pass left, its own rows included."""
    genuine = KVCache.store

    def store(self, block, **kwargs):  # type: ignore[no-untyped-def]
        if kwargs["patch"] is None:
            genuine(self, block, **kwargs)

    KVCache.store = store


def shift_rows() -> None:
    """A patch writes one row too low."""
    genuine = TokenLayout.cache_range

    def shifted(self, names, patch, shards):  # type: ignore[no-untyped-def]
        start, stop = genuine(self, names, patch, shards)
        return (start, stop) if patch in (None, 0) else (start - 1, stop - 1)

    TokenLayout.cache_range = shifted


def keep_gathered_order() -> None:
    """The whole pass is stored as it was gathered, not in cache order."""
    TokenLayout.whole_to_cache = lambda self, names, shards: (
        (0, 0, self.cache_range(names, None, shards)[1]),
    )


def drop_cached_mask() -> None:
    genuine = KVCache.read

    def read(self, **kwargs):  # type: ignore[no-untyped-def]
        found = genuine(self, **kwargs)
        return KeyBlock(found.key, found.value, None)

    KVCache.read = read


def read_unfilled_rows() -> None:
    """Without warm-up, zeros that no pass wrote take part."""
    genuine = KVCache.read

    def read(self, **kwargs):  # type: ignore[no-untyped-def]
        self._filled = tuple(range(kwargs["layout"].num_patches))
        return genuine(self, **kwargs)

    KVCache.read = read


@pytest.mark.parametrize(
    ("mode", "sabotage", "name"),
    [
        ("one rank", never_overwrite, "2 patches"),
        ("ulysses2 x ring2", never_overwrite, "2 patches"),
        ("one rank", shift_rows, "3 patches, odd lengths"),
        ("ulysses2", shift_rows, "3 patches, odd lengths"),
        ("ulysses2", keep_gathered_order, "3 patches, odd lengths"),
        ("ring2", keep_gathered_order, "image first"),
        ("one rank", keep_gathered_order, "image first"),
        ("one rank", drop_cached_mask, "key mask"),
        ("ulysses2", drop_cached_mask, "key mask"),
        ("one rank", read_unfilled_rows, "no warm-up"),
    ],
)
def test_sabotage_is_caught(mode: str, sabotage: Callable[[], None], name: str) -> None:
    problem, schedule = PROBLEMS[name]
    found = largest_errors(mode, {name: (problem, schedule)}, sabotage)
    assert found[name] >= CAUGHT * GATE[problem.dtype]


def test_a_patch_of_another_batch_is_refused() -> None:
    problem = Problem(patches=2)
    cache = KVCache()
    on_rank(problem, 0, None, cache)
    with pytest.raises(
        ValueError, match="keys of batch 1.*expected 2.*run a whole pass"
    ):
        on_rank(replace(problem, batch=1), 1, 0, cache)
    # A whole pass takes it in.
    on_rank(replace(problem, batch=1), 2, None, cache)
    on_rank(replace(problem, batch=1), 3, 0, cache)


def test_a_mask_that_comes_late_and_goes_again() -> None:
    """Rows that were stored without a mask take part; later rows without one do, too."""
    masked = Problem(patches=2, mask="key_bool")
    plain = replace(masked, mask="none")
    layout, cache = masked.layout(1), KVCache()
    on_rank(plain, 0, None, cache)
    on_rank(masked, 1, 1, cache)
    start, stop = layout.cache_range(masked.keys, 1, (0,))
    mask = cache.read(layout=layout, names=masked.keys, shards=(0,)).mask
    assert mask is not None
    assert mask[..., :start].all() and not mask[..., start:stop].all()
    on_rank(plain, 2, 1, cache)
    mask = cache.read(layout=layout, names=masked.keys, shards=(0,)).mask
    assert mask is not None and mask.all()


def test_reading_first_patches_copies_nothing() -> None:
    problem = Problem(patches=3)
    layout, cache = problem.layout(1), KVCache()
    for patch in (0, 1):
        on_rank(problem, patch, patch, cache)
    block = cache.read(layout=layout, names=problem.keys, shards=(0,))
    assert cache.filled == (0, 1)
    assert block.key.data_ptr() == cache._key.data_ptr()  # type: ignore[union-attr]
