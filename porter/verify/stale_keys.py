"""The keys that displaced patches see: a cache at every attention call of the denoisers.

Hooks tell which denoiser runs and whether one of its blocks does; the attention calls in it
are counted, and each keeps the keys and values of all its rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from porter.source import is_transformer
from porter.verify.geometry import (
    LatentRows,
    OracleRefusal,
    TokenProbe,
    even_pieces,
)
from porter.verify.hooks import AttentionCall, denoisers, replaced_attention

#: A call site in the pass: denoiser, n-th call of it, n-th attention of that call.
Site = tuple[str, int, int]


@dataclass
class _Cache:
    """Keys and values of all rows at one call site, (B, H, S, D), and which are valid."""

    key: torch.Tensor
    value: torch.Tensor
    filled: torch.Tensor


@dataclass
class _Probed:
    """What the probe found: the regions of the patches and each site's rows by patch."""

    rows: LatentRows
    regions: tuple[tuple[int, int], ...]
    site_rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class StaleKeys:
    """Attention over keys of different steps, while `watching`.

    Args:
        pipeline: the stock pipeline.
        num_patches: patches of the latents.
        has_warmup: whether whole passes come before the patches.
        regions: block lists whose attention sees stale keys; None for all.
        sample: gives the loop's latents at the time of a denoiser call.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        num_patches: int,
        has_warmup: bool,
        regions: tuple[str, ...] | None,
        sample: Callable[[], torch.Tensor | None],
    ) -> None:
        self._pipeline = pipeline
        self._num_patches = num_patches
        self._has_warmup = has_warmup
        self._region_names = regions
        self._sample = sample
        self._step = 0
        self._patch: int | None = None
        self._in_pass = False
        self._denoiser: str | None = None
        self._in_region = 0
        self._calls: dict[str, int] = {}
        self._site = 0
        self._cached: dict[Site, _Cache] = {}
        self._probed: dict[tuple[str, int], _Probed] = {}

    def begin_pass(self, step: int, patch: int | None) -> None:
        """From here on the denoisers run for `patch` of `step`; None is a whole pass."""
        self._step, self._patch, self._in_pass = step, patch, True
        self._calls.clear()

    def end_pass(self) -> None:
        """From here on the denoisers attend as stock does."""
        self._in_pass = False

    def begin_loop(self) -> None:
        """A denoising loop begins: nothing is cached, latents may have another shape."""
        self._cached.clear()
        self._probed.clear()

    @property
    def is_probed(self) -> bool:
        """False until a denoiser was called in a pass."""
        return bool(self._probed)

    @property
    def rows(self) -> LatentRows:
        """How latents and tokens correspond, by the first denoiser call."""
        return next(iter(self._probed.values())).rows

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """The latents' region of each patch, by the first denoiser call."""
        return next(iter(self._probed.values())).regions

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the transformers and on attention, for the time of the block.

        Other models of the loop run whole.
        """
        with contextlib.ExitStack() as stack:
            for name, module in denoisers(self._pipeline).items():
                if is_transformer(name):
                    stack.enter_context(self._watched(name, module))
            stack.enter_context(replaced_attention(self._attention))
            yield

    @contextlib.contextmanager
    def _watched(self, name: str, module: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._in_pass:
                return
            self._calls[name] = self._calls.get(name, -1) + 1
            self._site = 0
            key = (name, self._calls[name])
            if key not in self._probed:
                self._probed[key] = self._probe(module, args, kwargs)
            self._denoiser = name

        def leave(*_: Any) -> None:
            self._denoiser = None

        def enter_region(*_: Any) -> None:
            self._in_region += 1

        def leave_region(*_: Any) -> None:
            self._in_region -= 1

        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        lists = dict(module.named_modules())
        # A helper beside the transformer has no lists of these names, or none is cut.
        for region in self._region_names or ():
            for block in lists[region].children() if region in lists else ():
                handles.append(block.register_forward_pre_hook(enter_region))
                handles.append(
                    block.register_forward_hook(leave_region, always_call=True)
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _probe(self, module: nn.Module, args: Any, kwargs: Any) -> _Probed:
        probe = TokenProbe(
            module, args, kwargs, skip=self._outside_regions, sample=self._sample()
        )
        rows = probe.rows()
        # Branches may have texts of different lengths; a patch is one region for them all.
        first = next(iter(self._probed.values()), None)
        regions = rows.borders(self._num_patches) if first is None else first.regions
        probed = _Probed(rows, regions)
        for patch, (start, stop) in enumerate(probed.regions):
            for site, (_, keys) in enumerate(probe.touched(rows.axis, start, stop)):
                probed.site_rows[site, patch] = keys
        whole = probe.touched(rows.axis, 0, probed.regions[-1][1])
        # What stands behind the latents in the first blocks may get company in later
        # ones; the parts are shared out one by one, so that a row keeps its patch.
        behind = 0
        for site, (_, keys) in enumerate(whole):
            if keys.any():
                last = int(keys.nonzero()[-1])
                shares = _shared_out(~keys, self._num_patches, last + 1 + behind)
                for patch, rows_of_patch in enumerate(shares):
                    probed.site_rows[site, patch] |= rows_of_patch
                behind = behind or len(keys) - last - 1
        return probed

    def _outside_regions(self) -> bool:
        return self._region_names is not None and not self._in_region

    def _attention(self, call: AttentionCall) -> torch.Tensor:
        if self._denoiser is None or self._outside_regions():
            return call.run()
        name, number = self._denoiser, self._calls[self._denoiser]
        site, self._site = self._site, self._site + 1
        rows = self._probed[name, number].site_rows
        if not any(rows[site, p].any() for p in range(self._num_patches)):
            return call.run()
        if call.is_causal:
            raise OracleRefusal("causal attention, expected attention over all tokens")
        cache = self._updated((name, number, site), call, rows)
        shown = AttentionCall(**{**vars(call), "key": cache.key, "value": cache.value})
        if cache.filled.all():
            return shown.run()
        return shown.select_keys(cache.filled.nonzero().flatten()).run()

    def _updated(
        self,
        site: Site,
        call: AttentionCall,
        site_rows: Mapping[tuple[int, int], torch.Tensor],
    ) -> _Cache:
        """This site's cache after the rows of the running pass were written into it."""
        length = call.key.shape[-2]
        if self._patch is None:
            everything = torch.ones(length, dtype=torch.bool)
            self._cached[site] = _Cache(call.key, call.value, everything)
            return self._cached[site]
        if site not in self._cached:
            if self._step > 0 and self._has_warmup:
                raise OracleRefusal(
                    f"denoiser call {site[1]} first comes at step {self._step}, expected "
                    "every call of a step in the warm-up"
                )
            nothing = torch.zeros(length, dtype=torch.bool)
            self._cached[site] = _Cache(call.key, call.value, nothing)
        old, rows = self._cached[site], site_rows[site[2], self._patch]
        if old.key.shape != call.key.shape:
            raise OracleRefusal(
                f"keys of shape {tuple(call.key.shape)} after {tuple(old.key.shape)}, "
                "expected one shape in all steps; guidance must not change in the loop"
            )
        mine = rows[:, None]
        self._cached[site] = _Cache(
            torch.where(mine, call.key, old.key),
            torch.where(mine, call.value, old.value),
            old.filled | rows,
        )
        return self._cached[site]


def _shared_out(
    rows: torch.Tensor, num_patches: int, border: int
) -> list[torch.Tensor]:
    """The rows (S,) of each patch: every run of `rows` cut into even pieces.

    A run that goes on across row `border` counts as two.
    """
    shares = [torch.zeros_like(rows) for _ in range(num_patches)]
    where = rows.nonzero().flatten().tolist()
    starts = [
        i
        for i, row in enumerate(where)
        if i == 0 or where[i - 1] != row - 1 or row == border
    ]
    for start, stop in pairwise([*starts, len(where)]):
        for share, (first, last) in zip(
            shares, even_pieces(stop - start, num_patches), strict=True
        ):
            share[where[start] + first : where[start] + last] = True
    return shares
