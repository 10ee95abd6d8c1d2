"""Which token of which variable each key of an attention call comes from.

The model runs up to the end of the first block of a loop.  Before the loop every tensor
that the loop reads becomes a leaf that requires gradients, and every attention call in the
block returns a value without gradient, so a row of its value argument depends on its own
token alone: the row of the variable with a gradient is where it comes from.  Keys lie in the
same order as values; they are not asked because position embeddings reach them as well.

Shapes: query (B, H, Sq, D), value (B, H, Sk, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from porter.probe.present_tokens import present_tokens
from porter.verify.hooks import AttentionCall, replaced_attention

Leaf = tuple[str, str]
"""A tensor of a variable: the variable's name, and the path inside a list or dict."""
Origin = tuple[Leaf, int]
"""A row of a leaf."""
Rows = tuple[Origin, ...] | None
"""Origins of all rows of a value; None where they are unclear."""
Swap = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Numbers:
    """Some numbers of a leaf.

    Attributes:
        shape: of the leaf.
        places: of these numbers in the flattened leaf, ascending.
    """

    shape: tuple[int, ...]
    places: torch.Tensor

    def indices(self, dim: int) -> list[int]:
        """Rows along `dim` that hold any of them."""
        after = math.prod(self.shape[dim + 1 :])
        rows = self.places.div(after, rounding_mode="floor") % self.shape[dim]
        found: list[int] = rows.unique().tolist()
        return found


#: Owners of numbers that no row depends on, and of those that several do.
_NONE, _ALL = -(1 << 40), -(1 << 41)


class KeyOrigins:
    """Runs one block and tells the origin of every attention's queries and keys.

    A module that attends several times, each time to another context that the loop does
    not carry, has no keys of streams; `contexts` names the variables that these come from.

    Args:
        block: the block to watch.
        axes: the token dimension of each leaf whose length changes between runs.
        carried: the variables that the loop carries.  A row may depend on a per-token
            modulation too; the carried stream is then its origin.
    """

    def __init__(
        self, block: nn.Module, axes: Mapping[Leaf, int], carried: set[str]
    ) -> None:
        self._block = block
        self._axes = axes
        self._carried = carried
        self._leaves: dict[Leaf, torch.Tensor] = {}
        self._stack: list[str] = []
        self._inside = False
        self.modules: dict[str, nn.Module] = {}
        self.keys: dict[str, Rows] = {}
        self.queries: dict[str, Rows] = {}
        self.contexts: dict[str, set[str]] = {}
        self.dims: dict[Leaf, int] = dict(axes)

    def run(self, model: Callable[[Swap], Any]) -> KeyOrigins:
        """Fill `keys` and `queries`, by module path.

        Args:
            model: runs the model; what it is given takes the place of values that the
                loop reads, (name, value) -> value.
        """
        handles = [
            self._block.register_forward_pre_hook(self._begin),
            self._block.register_forward_hook(self._end),
        ]
        for path, module in self._block.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave))
        try:
            # Upstream writes into queries after it has normalised them.
            with (
                torch.autograd.graph.allow_mutation_on_saved_tensors(),
                torch.no_grad(),
                replaced_attention(self._attend),
                present_tokens(self._block, self._module),
            ):
                model(self._swap)
        except _BlockDone:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _module(self) -> nn.Module | None:
        """The module that runs."""
        return self.modules[self._stack[-1]] if self._stack else None

    def _swap(self, name: str, value: Any, path: str = "") -> Any:
        torch.set_grad_enabled(True)
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point() or value.ndim < 2:
                return value
            leaf = value.detach().clone().requires_grad_()
            self._leaves[name, path] = leaf
            return leaf.clone()
        if type(value) in (list, tuple):
            items = [self._swap(name, x, _join(path, i)) for i, x in enumerate(value)]
            return type(value)(items)
        if type(value) is dict:
            return {k: self._swap(name, v, _join(path, k)) for k, v in value.items()}
        return value

    def _begin(self, *_: Any) -> None:
        self._inside = True

    def _end(self, *_: Any) -> None:
        raise _BlockDone

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, _: Any) -> None:
            self._stack.append(path)
            self.modules[path] = module

        return hook

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        if not self._inside:
            return call.run()
        path = self._stack[-1] if self._stack else ""
        keys = self._origins(call.value)
        queries = keys if self._alike(call, keys) else self._origins(call.query)
        if path in self.keys and (self.keys[path], self.queries[path]) != (
            keys,
            queries,
        ):
            parts = self._context(keys), self._context(self.keys[path])
            if None not in parts and self.queries[path] == queries:
                self.contexts.setdefault(path, set()).update(*filter(None, parts))
                keys = ()  # parts of a context that stays whole
            else:
                keys = queries = None
        self.keys[path], self.queries[path] = keys, queries
        return call.run().detach()

    def _context(self, keys: Rows) -> set[str] | None:
        """The variables that keys come from; None for what the loop carries, or unclear."""
        if keys is None:
            return None
        names = {name for (name, _), _ in keys}
        return None if names & self._carried else names

    def _alike(self, call: AttentionCall, keys: Rows) -> bool:
        """True where as many queries as keys begin and end with the same tokens."""
        if not keys or call.query.shape[-2] != len(keys):
            return False
        ends = (0, len(keys) - 1)
        return self._origins(call.query, ends) == tuple(keys[row] for row in ends)

    def _origins(
        self, value: torch.Tensor, chosen: Sequence[int] | None = None
    ) -> Rows:
        if not value.requires_grad:
            return ()
        every = range(value.shape[-2]) if chosen is None else chosen
        rows = self._touched_by_rows(value, every)
        if not any(rows):
            return ()
        found: list[Origin | None] = []
        for touched in rows:
            origins = [
                (leaf, index)
                for leaf, reached in touched
                if leaf in self._axes
                for index in reached.indices(self._axes[leaf])
            ]
            origins = [o for o in origins if o[0][0] in self._carried] or origins
            if len(origins) > 1:
                return None
            found.append(origins[0] if origins else None)
        others = [
            row for row, origin in zip(rows, found, strict=True) if origin is None
        ]
        fixed = iter(self._fixed_origins(others))
        complete = [origin or next(fixed, None) for origin in found]
        known = [origin for origin in complete if origin is not None]
        if len(known) == len(complete):
            return tuple(known)
        leaves = {leaf for row in rows for leaf, _ in row}
        # Part of a context of one length, which the loop neither carries nor cuts.
        return () if leaves and not leaves & self._axes.keys() else None

    def _touched_by_rows(
        self, value: torch.Tensor, rows: Sequence[int]
    ) -> list[list[tuple[Leaf, Numbers]]]:
        """For each row of `value` the leaves that it depends on, and which numbers of each.

        Rows are told apart by the binary digits of their places, a few gradients for all
        of them.  That fails where two rows depend on one number of a stream; each row then
        gets a gradient of its own.
        """
        owners = self._owners(value, rows)
        if owners is None:
            return [
                [
                    (leaf, Numbers(tuple(mine.shape), mine.flatten().nonzero()[:, 0]))
                    for leaf, mine in self._touched(value, [row])
                ]
                for row in rows
            ]
        found: list[list[tuple[Leaf, Numbers]]] = [[] for _ in rows]
        for leaf, owner in owners.items():
            for place, numbers in enumerate(_by_owner(owner, len(rows))):
                if len(numbers.places):
                    found[place].append((leaf, numbers))
        return found

    def _owners(
        self, value: torch.Tensor, rows: Sequence[int]
    ) -> dict[Leaf, torch.Tensor] | None:
        """For each number of a leaf the place of the row that depends on it, or `_NONE`.

        A leaf outside the token axes with a number that several rows depend on is `_ALL`
        throughout; None if a leaf with a token axis has one.
        """
        owners: dict[Leaf, torch.Tensor] = {}
        several: set[Leaf] = set()
        for digit in range(len(rows).bit_length()):
            sets: list[list[int]] = [[], []]
            for place, row in enumerate(rows):
                sets[place >> digit & 1].append(row)
            zero, one = (dict(self._touched(value, each)) for each in sets)
            for leaf in (*zero, *(leaf for leaf in one if leaf not in zero)):
                nothing = torch.zeros_like(self._leaves[leaf], dtype=torch.bool)
                of_zero, of_one = zero.get(leaf, nothing), one.get(leaf, nothing)
                reached = of_zero | of_one
                owner = owners.setdefault(leaf, torch.where(reached, 0, _NONE))
                if (of_zero & of_one).any() or ((owner >= 0) != reached).any():
                    several.add(leaf)
                owner += of_one.long() << digit
        if several & self._axes.keys():
            return None
        for leaf in several:
            owners[leaf].fill_(_ALL)
        return owners

    def _touched(
        self, value: torch.Tensor, rows: Sequence[int]
    ) -> Iterator[tuple[Leaf, torch.Tensor]]:
        """The leaves that rows of `value` depend on, and which numbers of each (bool)."""
        if not rows:
            return
        chosen = value[..., list(rows), :].double()
        # Around numbers of no pattern: rows of zeros, as padding often is, depend on their
        # token too, and a norm keeps the sum of squares.
        noise = torch.randn(
            chosen.shape,
            generator=torch.Generator().manual_seed(rows[0]),
            dtype=torch.double,
        )
        gradients = torch.autograd.grad(
            (chosen + noise).square().sum(),
            list(self._leaves.values()),
            retain_graph=True,
            allow_unused=True,
        )
        for leaf, gradient in zip(self._leaves, gradients, strict=True):
            if gradient is not None and gradient.any():
                yield leaf, gradient != 0

    def _fixed_origins(self, rows: list[list[tuple[Leaf, Numbers]]]) -> list[Origin]:
        """Origins of rows in a leaf whose length never changes.

        Its token dimension is the one along which the rows depend on one index each, 0, 1,
        ... in order; [] unless exactly one dimension of one leaf is like that.
        """
        order = [[index] for index in range(len(rows))]
        found = [
            (leaf, dim)
            for leaf, reached in (rows[0] if len(rows) > 1 else ())
            for dim in range(len(reached.shape))
            if [g.indices(dim) for row in rows for other, g in row if other == leaf]
            == order
        ]
        if len(found) != 1:
            return []
        leaf, dim = found[0]
        self.dims[leaf] = dim
        return [(leaf, index) for index in range(len(rows))]


class _BlockDone(Exception):
    """Ends the run once the block has been watched."""


def _by_owner(owner: torch.Tensor, count: int) -> Iterator[Numbers]:
    """The numbers of each of `count` owners, those of `_ALL` for every one."""
    shape = tuple(owner.shape)
    if owner.flatten()[0] == _ALL:
        everything = Numbers(shape, torch.arange(owner.numel()))
        yield from (everything for _ in range(count))
        return
    owners, order = owner.flatten().sort(stable=True)
    borders = torch.searchsorted(owners, torch.arange(count + 1)).tolist()
    for start, stop in pairwise(borders):
        yield Numbers(shape, order[start:stop])


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def runs_of(origins: tuple[Origin, ...]) -> tuple[tuple[Leaf, int], ...] | None:
    """Origins as whole leaves in order, (leaf, length); None if they are mixed up."""
    runs: list[tuple[Leaf, int]] = []
    for leaf, row in origins:
        if runs and runs[-1][0] == leaf and row == runs[-1][1]:
            runs[-1] = (leaf, row + 1)
        elif row == 0 and leaf not in [run[0] for run in runs]:
            runs.append((leaf, 1))
        else:
            return None
    return tuple(runs)
