"""Runs an attention problem on ranks and puts the result together again for comparison.

A problem is held whole, segment by segment in natural order: (B, S, H, D). Each rank takes the
rows that the layout gives it, calls `parallel_attention`, and the outputs go back to their places.
The reference is torch's attention on the whole tensors in this one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from xfuser_runtime.attention import (
    AttentionPlan,
    KVCache,
    key_order,
    parallel_attention,
)
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.parallel_state import (
    get_sp_group,
    initialize_model_parallel,
)

#: Largest relative error (L2) that counts as rounding, and what a sabotage must exceed.
GATE = {torch.float32: 2e-6, torch.float64: 1e-14}
CAUGHT = 30.0

Rows = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One attention call over named segments of tokens.

    Args:
        segments: tokens of each segment.
        queries: segments of the query rows.
        keys: segments of the key rows.
        heads, key_heads, head_dim: of query and key.
        batch: samples.
        mask: none, key_bool, key_additive, key_per_head, key_dead (all keys of one sample
            masked), expanded, square_bool, square_additive, square_per_head,
            square_smallest (later keys masked with the smallest number, as upstream does).
        patches: patches of the layout; `image` is the segment that they cut.
    """

    segments: tuple[tuple[str, int], ...] = (("text", 5), ("image", 16))
    queries: tuple[str, ...] = ("text", "image")
    keys: tuple[str, ...] = ("text", "image")
    heads: int = 4
    key_heads: int = 4
    head_dim: int = 8
    batch: int = 2
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    patches: int = 1
    scale: float | None = None
    backend: str | None = None
    is_causal: bool = False
    row: int = field(default=1)

    def layout(self, shards: int) -> TokenLayout:
        return TokenLayout(
            tuple(
                Segment(
                    name,
                    length,
                    row=self.row if name == "image" else 1,
                    follows_latents=name == "image",
                )
                for name, length in self.segments
            ),
            self.patches,
            shards,
        )

    def tensors(self, seed: int) -> tuple[Rows, Rows, Rows]:
        """Query, key and value of every segment."""
        generator = torch.Generator().manual_seed(seed)

        def rows(names: tuple[str, ...], heads: int) -> Rows:
            return {
                name: torch.randn(
                    self.batch,
                    length,
                    heads,
                    self.head_dim,
                    generator=generator,
                    dtype=torch.float64,
                ).to(self.dtype)
                for name, length in self.segments
                if name in names
            }

        query = rows(self.queries, self.heads)
        return query, rows(self.keys, self.key_heads), rows(self.keys, self.key_heads)

    def whole_mask(self) -> torch.Tensor | None:
        """The mask over natural rows and columns, None for none."""
        if self.mask == "none":
            return None
        lengths = dict(self.segments)
        rows = sum(lengths[name] for name in self.queries)
        columns = sum(lengths[name] for name in self.keys)
        square = self.mask.startswith("square")
        heads = self.heads if self.mask.endswith("per_head") else 1
        generator = torch.Generator().manual_seed(7)
        shape = (self.batch, heads, rows if square else 1, columns)
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)
        if self.mask.endswith("additive"):
            return (3 * noise).masked_fill(noise < 0.2, float("-inf")).to(self.dtype)
        if self.mask.endswith("smallest"):
            smallest = torch.finfo(self.dtype).min
            later = torch.full((rows, columns), smallest, dtype=self.dtype).triu(1)
            return later.expand(self.batch, 1, rows, columns)
        kept = noise > 0.4
        if self.mask == "key_dead":
            kept[0] = False
        return kept


def concatenated(rows: Rows, names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([rows[name] for name in names], dim=1)


def reference(problem: Problem, seed: int) -> torch.Tensor:
    """torch's attention over the whole tensors, (B, S, H, D) in natural order."""
    query, key, value = problem.tensors(seed)
    out = F.scaled_dot_product_attention(
        concatenated(query, problem.queries).transpose(1, 2),
        concatenated(key, problem.keys).transpose(1, 2),
        concatenated(value, problem.keys).transpose(1, 2),
        attn_mask=problem.whole_mask(),
        is_causal=problem.is_causal,
        scale=problem.scale,
        enable_gqa=problem.heads != problem.key_heads,
    )
    return out.transpose(1, 2)


def local_rows(
    rows: Rows,
    names: tuple[str, ...],
    layout: TokenLayout,
    patch: int | None,
    shard: int,
) -> torch.Tensor:
    """What a shard holds of the segments in a pass."""
    pieces = [
        rows[name][:, start:stop]
        for name in names
        for start, stop in layout.ranges(name, patch, shard)
    ]
    return torch.cat(pieces, dim=1) if pieces else rows[names[0]][:, :0]


def local_mask(
    problem: Problem,
    layout: TokenLayout,
    patch: int | None,
    shard: int,
    device: str,
) -> torch.Tensor | None:
    """The mask in the form in which the rank passes it."""
    whole = problem.whole_mask()
    if whole is None:
        return None
    whole = whole.to(device)
    offsets, at = {}, 0
    for name in problem.keys:
        offsets[name] = at
        at += dict(problem.segments)[name]

    def take(
        mask: torch.Tensor, dim: int, spans: list[tuple[str, int, int]]
    ) -> torch.Tensor:
        index = [
            offsets[name] + i for name, start, stop in spans for i in range(start, stop)
        ]
        return mask.index_select(
            dim, torch.tensor(index, dtype=torch.long, device=device)
        )

    own = [
        (name, start, stop)
        for name in problem.keys
        for start, stop in layout.ranges(name, patch, shard)
    ]
    if not problem.mask.startswith("square"):
        keys = take(whole, 3, own)
        if problem.mask == "expanded":
            return keys.expand(-1, -1, layout.length(problem.queries, patch, shard), -1)
        return keys
    assert problem.queries == problem.keys
    return take(take(whole, 3, list(key_order(layout, problem.keys, patch))), 2, own)


def on_rank(
    problem: Problem,
    seed: int,
    patch: int | None = None,
    cache: KVCache | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """This rank's output of the pass."""
    group = get_sp_group()
    layout = problem.layout(group.world_size)
    query, key, value = problem.tensors(seed)
    shard = group.rank_in_group
    return parallel_attention(
        local_rows(query, problem.queries, layout, patch, shard).to(device),
        local_rows(key, problem.keys, layout, patch, shard).to(device),
        local_rows(value, problem.keys, layout, patch, shard).to(device),
        attn_mask=local_mask(problem, layout, patch, shard, device),
        is_causal=problem.is_causal,
        scale=problem.scale,
        enable_gqa=problem.heads != problem.key_heads,
        plan=AttentionPlan(
            layout=layout,
            query_segments=problem.queries,
            key_segments=problem.keys,
            patch=patch,
            cache=cache,
            backend=problem.backend,
        ),
    )


def assembled(
    problem: Problem, outputs: list[torch.Tensor], patch: int | None = None
) -> torch.Tensor:
    """The ranks' outputs in natural order; rows of other patches are left out."""
    layout = problem.layout(len(outputs))
    places = {
        name: torch.full((length,), -1, dtype=torch.long)
        for name, length in problem.segments
    }
    offset = 0
    for shard in range(len(outputs)):
        for name in problem.queries:
            for start, stop in layout.ranges(name, patch, shard):
                places[name][start:stop] = torch.arange(offset, offset + stop - start)
                offset += stop - start
    order = torch.cat([places[name] for name in problem.queries])
    return torch.cat(outputs, dim=1)[:, order[order >= 0]]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def errors(
    ulysses: int,
    ring: int,
    problems: dict[str, Problem],
    sabotage: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Relative error of each problem in this mode, all in one start of ranks.

    Args:
        ulysses, ring: the degrees.
        problems: by name.
        sabotage: breaks the runtime in the rank before it runs.
    """

    def body(rank: int) -> dict[str, torch.Tensor]:
        initialize_model_parallel(
            ParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
        )
        if sabotage is not None:
            sabotage()
        return {
            name: on_rank(problem, seed)
            for seed, (name, problem) in enumerate(problems.items())
        }

    results = run_ranks(body, ulysses * ring)
    found = {}
    for seed, (name, problem) in enumerate(problems.items()):
        whole = assembled(problem, [result[name] for result in results])
        assert whole.isfinite().all(), f"{name}: not finite"
        found[name] = relative_error(whole, reference(problem, seed))
    return found


def in_fp64(problems: dict[str, Problem]) -> dict[str, Problem]:
    """The same problems in fp64, names alike."""
    return {
        name: replace(problem, dtype=torch.float64)
        for name, problem in problems.items()
    }
