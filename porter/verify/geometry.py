"""Which tokens follow which rows of the latents: measured, never assumed.

With every attention made local (its output replaced by zeros) a transformer maps each token
by itself, so changing one row of the latents changes exactly the keys of its own tokens.
This tells, for any model: the axis of the latents that orders the tokens, how many latent
rows and tokens one token row has, and which key rows of each attention call are text.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from porter.verify.hooks import AttentionCall, replaced_attention
from porter.verify.window import Window, find_window


class OracleRefusal(ValueError):
    """The oracle cannot simulate displaced patches on this pipeline; the message says why."""


@dataclass(frozen=True)
class LatentRows:
    """How the latents' rows and the tokens correspond.

    Attributes:
        axis: axis of the latents that is cut into patches, counted from the last: what
            the denoiser takes may have a dimension more than what the scheduler steps.
        height: indices of that axis in one token row.
        count: number of token rows.
        tokens: tokens of one token row.
    """

    axis: int
    height: int
    count: int
    tokens: int

    def borders(self, num_patches: int) -> tuple[tuple[int, int], ...]:
        """The latents' region of each patch, `(start, stop)` on `axis`.

        The token rows are shared out as evenly as they divide, the first patches one more.

        Raises:
            OracleRefusal: more patches than token rows.
        """
        if num_patches > self.count:
            raise OracleRefusal(
                f"{num_patches} patches for {self.count} token rows, expected at most one "
                "patch a row"
            )
        rows = even_pieces(self.count, num_patches)
        return tuple((a * self.height, b * self.height) for a, b in rows)


def even_pieces(length: int, count: int) -> tuple[tuple[int, int], ...]:
    """`length` things in `count` runs `(start, stop)`; the first runs take the remainder."""
    sizes = [length // count + (i < length % count) for i in range(count)]
    return tuple((sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(count))


#: One attention call: which query rows and which key rows changed.
Touched = tuple[torch.Tensor, torch.Tensor]


class TokenProbe:
    """Runs one captured denoiser call again with local attention and changed latents.

    Args:
        module: the denoiser.
        args, kwargs: its captured call; the first parameter holds the latents, one tensor
            or a list of one tensor a sample.
        skip: tells whether the attention call that is being made stands outside the
            block loops (a refiner), where the port runs whole.
        sample: what the loop hands to the scheduler, where that is known: only these
            latents have rows, what the denoiser takes beside them has none.

    Raises:
        OracleRefusal: the first parameter is neither.
    """

    def __init__(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        skip: Callable[[], bool] = lambda: False,
        sample: torch.Tensor | None = None,
    ) -> None:
        self._module = module
        self._bound = inspect.signature(module.forward).bind(*args, **kwargs)
        self._name = next(iter(self._bound.arguments))
        self._skip = skip
        latents = self._bound.arguments[self._name]
        self._is_list = isinstance(latents, list) and all(
            isinstance(sample, torch.Tensor) and sample.shape == latents[0].shape
            for sample in latents
        )
        if self._is_list:
            latents = torch.stack(latents)
        if not isinstance(latents, torch.Tensor):
            raise OracleRefusal(
                f"{type(module).__name__} takes its latents as "
                f"{type(latents).__name__}, expected one tensor or a list of tensors"
            )
        self._given = latents
        self._window = find_window(latents, sample) or Window(1, 0, latents.shape[1])
        self._base = self._trace(latents)

    @property
    def latents(self) -> torch.Tensor:
        """The loop's latents as the denoiser takes them."""
        return self._window.of(self._given)

    def touched(
        self, axis: int, start: int, stop: int, *, sites: int | None = None
    ) -> list[Touched]:
        """Query and key rows that follow this latent region, of every attention call.

        Args:
            axis, start, stop: the region of the latents.
            sites: stop after this many attention calls; None goes through all.
        """
        changed = self._given.clone()
        region = self._window.of(changed).narrow(axis, start, stop - start)
        noise = torch.randn(
            region.shape, generator=torch.Generator().manual_seed(0)
        ).to(region)
        region.add_(noise * (self.latents.std() + 1))
        traced = self._trace(changed, sites)
        pairs = zip(self._base[: len(traced)], traced, strict=True)
        return [
            (_changed_rows(q0, q1), _changed_rows(k0, k1))
            for (q0, k0), (q1, k1) in pairs
        ]

    def rows(self) -> LatentRows:
        """Measure the correspondence.

        Raises:
            OracleRefusal: no axis of the latents orders the tokens.
        """
        for axis in range(1, self.latents.dim()):
            if self.latents.shape[axis] == 1:
                continue
            site = self._ordering_site(axis)
            if site is not None:
                return self._rows_along(axis, site)
        raise OracleRefusal(
            f"no axis of {type(self._module).__name__}'s latents "
            f"{tuple(self.latents.shape)} orders the tokens, expected rows that keep to "
            "contiguous tokens"
        )

    def _ordering_site(self, axis: int) -> int | None:
        """The first attention call whose keys follow the latents, if `axis` orders them."""
        everything = self.touched(axis, 0, self.latents.shape[axis])
        for site, ((_, k), (_, every)) in enumerate(
            zip(self.touched(axis, 0, 1), everything, strict=True)
        ):
            if every.any():
                strict = int(k.sum()) < int(every.sum())
                return site if k.any() and strict and _is_one_run(k) else None
        raise OracleRefusal(
            f"no attention key of {type(self._module).__name__} follows the latents, "
            "expected self attention by scaled_dot_product_attention"
        )

    def _rows_along(self, axis: int, site: int) -> LatentRows:
        starts: list[int] = []
        last: torch.Tensor | None = None
        tokens = 0
        for index in range(self.latents.shape[axis]):
            _, keys = self.touched(axis, index, index + 1, sites=site + 1)[site]
            if last is not None and torch.equal(keys, last):
                continue
            if last is not None and bool((keys & last).any()):
                raise OracleRefusal(
                    f"tokens of {type(self._module).__name__} overlap along axis {axis} "
                    "of the latents, expected separate token rows"
                )
            starts.append(index)
            tokens, last = int(keys.sum()), keys
        height = self.latents.shape[axis] // len(starts)
        from_last = axis - self.latents.dim()
        return LatentRows(from_last, height, len(starts), tokens)

    def _trace(
        self, latents: torch.Tensor, sites: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def local(call: AttentionCall) -> torch.Tensor:
            if not self._skip():
                found.append((call.query, call.key))
                if len(found) == sites:
                    raise _Enough
            shape = (*call.query.shape[:-1], call.value.shape[-1])
            return call.query.new_zeros(shape)

        given = list(latents.unbind(0)) if self._is_list else latents
        self._bound.arguments[self._name] = given
        arguments = inspect.BoundArguments(
            self._bound.signature, _copied(self._bound.arguments)
        )
        with replaced_attention(local), contextlib.suppress(_Enough):
            self._module.forward(*arguments.args, **arguments.kwargs)
        return found


def _copied(arguments: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Arguments whose lists a `forward` may take items out of."""
    return OrderedDict(
        (name, list(value) if isinstance(value, list) else value)
        for name, value in arguments.items()
    )


class _Enough(Exception):
    """Ends a traced forward early; hooks of the module clean up after any exception."""


def _changed_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Which rows of (B, H, S, D) differ in any sample, head or channel: (S,) of bool."""
    if not before.numel():
        return torch.zeros(before.shape[-2], dtype=torch.bool)
    limit = 1e-6 * float(before.abs().amax())
    return ((before - after).abs() > limit).any(-1).flatten(0, -2).any(0)


def _is_one_run(rows: torch.Tensor) -> bool:
    where = rows.nonzero().flatten()
    return int(where[-1] - where[0]) + 1 == len(where)
