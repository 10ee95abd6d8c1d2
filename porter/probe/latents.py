"""Which tokens of a stream come from which elements of the latents: runs that differ there alone.

All attention returns zeros in these runs, so that no token hears of another one: a token of
a stream differs from the plain run exactly where the changed latents reach it directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall, copied
from porter.probe.instrument import Probes, instrumented_forward
from porter.probe.leaves import tensor_leaves
from porter.verify.hooks import AttentionCall, replaced_attention

Part = tuple[int, int, int]
"""Some latents: an axis, the first index along it, and the one behind the last."""
Streams = dict[str, dict[str, torch.Tensor]]
"""The tensors that each loop carries or reads, by block list and by name and path."""


@dataclass(frozen=True)
class Place:
    """Where the tokens of the latents stand in a stream.

    Attributes:
        start, stop: the first of them, and the one behind the last.
        length: tokens of the whole stream.
    """

    start: int
    stop: int
    length: int

    @property
    def context(self) -> str | None:
        """Where the other tokens stand: "before", "after", "" without any, None: on both
        sides."""
        sides = (self.start > 0, self.stop < self.length)
        kinds = {
            (False, False): "",
            (True, False): "before",
            (False, True): "after",
        }
        return kinds.get(sides)


def place_in_runs(
    probes: Sequence[LatentProbe],
    blocks: str,
    name: str,
    dim: int,
    lengths: Sequence[int],
) -> str | None:
    """Where other tokens than the latents' stand in stream `name`, over several runs.

    Some models fill a stream up to a multiple of tokens, so that other tokens are there
    at some sizes alone: a run whose length is out of proportion is looked at, too, and
    where tokens stand before the latents, whether some stand behind them as well.

    Returns:
        "before", "after", "" where there are none, or None where the latents do not stand
        in one piece at one end of the stream.
    """
    first = probes[0].place(blocks, name, dim)
    if first is None or first.length != lengths[0]:
        return None
    places = [first]
    for probe, length in zip(probes[1:], lengths[1:], strict=True):
        tokens = (first.stop - first.start) * probe.extent
        odd = first.context == "" and length * probes[0].extent != tokens
        if odd or first.context == "before":
            place = probe.place(blocks, name, dim)
            if place is None:
                return None
            places.append(place)
    found = {place.context for place in places} - {""}
    if None in found or len(found) > 1:
        return None
    return found.pop() if found else ""


class LatentProbe:
    """Changes parts of one captured call's latents and looks at the streams.

    The latents are the first floating-point tensor of the call, in a list or not.

    Args:
        model: the shrunken stock model.
        source: the module that defines its class.
        forward: its forward.
        loops: the block loops.
        call: the captured call.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ParsedModule,
        forward: cst.FunctionDef,
        loops: tuple[BlockLoop, ...],
        call: TransformerCall,
    ) -> None:
        self._model, self._source, self._forward = model, source, forward
        self._loops, self._arguments = loops, call.arguments
        self._path: str
        self._latents: torch.Tensor | None
        self._path, self._latents = next(
            (
                (path, leaf)
                for path, leaf in tensor_leaves(call.arguments)
                if leaf.is_floating_point()
            ),
            ("", None),
        )
        self._seen: dict[tuple[Part, ...], Streams] = {}
        self._reports: int | None = None

    @property
    def extent(self) -> int:
        """Numbers in the latents."""
        return 0 if self._latents is None else self._latents.numel()

    @property
    def ndim(self) -> int:
        """Dimensions of the latents."""
        return 0 if self._latents is None else self._latents.ndim

    def place(self, blocks: str, name: str, dim: int) -> Place | None:
        """Where the latents stand in stream `name`, whose tokens lie along `dim`.

        None where they stand in several pieces, or nowhere.
        """
        if self._latents is None:
            return None
        tokens = self._touched(blocks, name, dim, (0, 0, self._latents.shape[0]))
        if not tokens or tokens[-1] - tokens[0] + 1 != len(tokens):
            return None
        length = self._streams()[blocks][name].shape[dim]
        return Place(tokens[0], tokens[-1] + 1, length)

    def moves(self, blocks: str, name: str) -> bool:
        """Whether anything in a variable follows the latents' values."""
        if self._latents is None:
            return False
        before = self._streams().get(blocks, {})
        after = self._streams((0, 0, self._latents.shape[0])).get(blocks, {})
        return any(
            not torch.equal(leaf, after[key])
            for key, leaf in before.items()
            if key == name or key.startswith(f"{name}.")
        )

    def rows(self, blocks: str, name: str, dim: int) -> tuple[tuple[int, int], ...]:
        """The dimensions of the latents that count tokens, each with a token's extent.

        The stream runs over them as a row-major array does, the last one fastest, so that
        slices along the first one are runs of the stream: patches may cut it.  Empty where
        the tokens do not lie like this.
        """
        place = self.place(blocks, name, dim)
        if place is None:
            return ()
        assert self._latents is not None
        # The batch comes first, except in a list of samples.
        first = 0 if "." in self._path else 1
        found = []
        for axis in range(first, self._latents.ndim):
            step = self._step(blocks, name, dim, axis, place)
            if step is not None:
                part = (axis, step, step + 1)
                touched = self._touched(blocks, name, dim, part)
                if not touched:
                    return ()
                found.append((touched[0] - place.start, axis, step))
        stride = 1
        for found_stride, axis, step in sorted(found):
            if found_stride != stride:
                return ()
            stride *= self._latents.shape[axis] // step
        rows = tuple((axis, step) for _, axis, step in sorted(found, reverse=True))
        if not rows or stride != place.stop - place.start:
            return ()
        return rows if self._in_order(blocks, name, dim, *rows[0], place) else ()

    def _step(
        self, blocks: str, name: str, dim: int, axis: int, place: Place
    ) -> int | None:
        """Elements along `axis` that share a token; None where all of them do."""
        assert self._latents is not None
        first = set(self._touched(blocks, name, dim, (axis, 0, 1)))
        extent = self._latents.shape[axis]
        if len(first) == place.stop - place.start:
            return None
        for step in range(1, extent):
            if extent % step == 0 and not first & set(
                self._touched(blocks, name, dim, (axis, step, step + 1))
            ):
                return step
        return None

    def _in_order(
        self, blocks: str, name: str, dim: int, axis: int, step: int, place: Place
    ) -> bool:
        """True when each slice along `axis` is the next run of tokens.

        Slices are told apart by the binary digits of their numbers: of the slices whose
        digit is 1, and of those whose digit is 0, exactly the tokens must change.  A token
        that another slice reached as well would show at a digit in which the two differ.
        """
        assert self._latents is not None
        count = self._latents.shape[axis] // step
        share, rest = divmod(place.stop - place.start, count)
        if rest:
            return False
        for digit in range(count.bit_length()):
            for value in (0, 1):
                rows = [row for row in range(count) if row >> digit & 1 == value]
                parts = tuple((axis, row * step, (row + 1) * step) for row in rows)
                tokens = [
                    place.start + row * share + i for row in rows for i in range(share)
                ]
                if parts and self._touched(blocks, name, dim, *parts) != tokens:
                    return False
        return True

    def _touched(self, blocks: str, name: str, dim: int, *parts: Part) -> list[int]:
        """Tokens of a stream that change with parts of the latents."""
        before = self._streams().get(blocks, {}).get(name)
        after = self._streams(*parts).get(blocks, {}).get(name)
        if before is None or after is None or before.shape != after.shape:
            return []
        others = [d for d in range(before.ndim) if d != dim]
        changed = (before != after).double().sum(dim=others)
        found: list[int] = changed.nonzero().flatten().tolist()
        return found

    def _streams(self, *parts: Part) -> Streams:
        """The streams of a run with parts of the latents changed."""
        if parts not in self._seen:
            arguments = self._arguments
            if parts:
                assert self._latents is not None
                moved = _moved(self._latents, parts)
                arguments = _replaced(arguments, self._path, moved)
            self._seen[parts] = self._run(arguments)
        return self._seen[parts]

    def _run(self, arguments: Mapping[str, Any]) -> Streams:
        """The streams of one run; of the first one, how often loops begin in it.

        Later runs end with the last of these: what comes after it is not looked at.
        """
        seen: Streams = {}
        reports = 0
        known = {loop.blocks: {*loop.carried, *loop.reads} for loop in self._loops}

        def report(blocks: str, names: dict[str, Any]) -> None:
            nonlocal reports
            reports += 1
            seen[blocks] = {
                f"{name}.{path}" if path else name: leaf.clone()
                for name in known[blocks] & set(names)
                for path, leaf in tensor_leaves(names[name])
            }
            if reports == self._reports:
                raise _AllSeen

        function = instrumented_forward(
            self._source, self._forward, self._loops, self._model, Probes(report)
        )
        with (
            torch.no_grad(),
            replaced_attention(_zeros),
            contextlib.suppress(_AllSeen),
        ):
            function(**copied(arguments))
            self._reports = reports
        return seen


class _AllSeen(Exception):
    """Ends a run whose last loop has begun."""


def _moved(latents: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    moved = latents.clone()
    generator = torch.Generator().manual_seed(0)
    for axis, start, stop in parts:
        region = moved.narrow(axis, start, stop - start)
        noise = torch.randn(region.shape, generator=generator)
        region.add_(noise.to(region.dtype))
    return moved


def _replaced(value: Any, path: str, leaf: torch.Tensor) -> Any:
    """A nested value with another tensor at `path`."""
    if not path:
        return leaf
    key, _, rest = path.partition(".")
    if isinstance(value, Mapping):
        return {**value, key: _replaced(value[key], rest, leaf)}
    items = list(value)
    items[int(key)] = _replaced(items[int(key)], rest, leaf)
    return items


def _zeros(call: AttentionCall) -> torch.Tensor:
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    return call.query.new_zeros(shape)
