"""Expressions of an attention processor that sum over tokens: linear attention's.

A candidate (a matrix product, an einsum, a sum) is a sum over tokens when its value in the
whole run is the sum of its values on the ranks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from porter import source
from porter.analysis.processor import Processor
from porter.errors import PorterError
from porter.probe.cuts import same
from porter.rules.engine import excerpt

_REPORT = "__report_sum__"
Seen = list[tuple[str, torch.Tensor]]
"""Text and value of each candidate, in the order of evaluation."""
Hook = Callable[[str, Any], Any]


class ProcessorSums:
    """The sums over tokens of one processor class.

    Attributes:
        processor: the class.
        texts: source of the expressions that were found to be sums over tokens.
    """

    def __init__(self, processor: type, call: Callable[..., Any]) -> None:
        self.processor = processor
        self.texts: tuple[str, ...] = ()
        self._call = call
        self._hook: Hook = _unchanged
        self._values: dict[str, list[torch.Tensor]] = {}

    @classmethod
    def of(cls, module: nn.Module) -> ProcessorSums | None:
        """The candidates of a module's processor; None if it has none to read."""
        processor = type(getattr(module, "processor", None))
        try:
            owner = source.load(f"{processor.__module__}:{processor.__qualname__}")
            method = Processor(owner.module, owner.class_name)
            if not method.contractions:
                return None
        except (PorterError, ImportError):
            return None
        parsed = owner.module
        start, end = excerpt(parsed, method.method)
        text = parsed.text[start:end]
        edits = []
        for node in method.contractions:
            first, last = parsed.span(node)
            edits.append((first, f"{_REPORT}({parsed.source(node)!r}, "))
            edits.append((last, ")"))
        # From the end to the start, so that earlier offsets stay right; where an expression
        # begins with another one, the outer call must come to stand before the inner.
        edits.reverse()
        for at, inserted in sorted(edits, key=lambda edit: -edit[0]):
            text = text[: at - start] + inserted + text[at - start :]
        namespace = dict(vars(importlib.import_module(parsed.name)))
        exec(compile(textwrap.dedent(text), parsed.file, "exec"), namespace)
        found = cls(processor, namespace["__call__"])
        namespace[_REPORT] = lambda text, value: found._hook(text, value)
        return found

    def fits(self, module: nn.Module) -> bool:
        """True for a module with this processor."""
        return type(getattr(module, "processor", None)) is self.processor

    @contextlib.contextmanager
    def watched(self, module: nn.Module) -> Iterator[Seen]:
        """Collect the candidates' values while the module runs."""
        seen: Seen = []

        def note(text: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                seen.append((text, value.detach().clone()))
            return value

        with self._installed(module, note):
            yield seen

    def take_sums(self, runs: Sequence[Seen]) -> bool:
        """Keep the candidates that are sums; `runs` are the whole run and the ranks'.

        Returns:
            Whether there is any.
        """
        whole, *ranks = runs
        good: dict[str, bool] = {}
        for number, (text, value) in enumerate(whole):
            parts = [rank[number] for rank in ranks if number < len(rank)]
            is_sum = (
                len(parts) == len(ranks)
                and all(part[0] == text for part in parts)
                and all(part[1].shape == value.shape for part in parts)
                and same(value, sum(part[1] for part in parts))
                and not same(value, parts[0][1])
            )
            good[text] = good.get(text, True) and is_sum
        self.texts = tuple(text for text, is_sum in good.items() if is_sum)
        return bool(self.texts)

    @staticmethod
    @contextlib.contextmanager
    def recorded(sums: Mapping[str, tuple[nn.Module, ProcessorSums]]) -> Iterator[None]:
        """Keep the values of the sums, by path of the modules."""
        with contextlib.ExitStack() as stack:
            for path, (module, found) in sums.items():
                found._values[path] = []
                stack.enter_context(found._installed(module, found._record(path)))
            yield

    @staticmethod
    @contextlib.contextmanager
    def replayed(sums: Mapping[str, tuple[nn.Module, ProcessorSums]]) -> Iterator[None]:
        """Answer with the kept values in place of the sums."""
        with contextlib.ExitStack() as stack:
            for path, (module, found) in sums.items():
                stack.enter_context(found._installed(module, found._replay(path)))
            yield

    def _record(self, path: str) -> Hook:
        def hook(text: str, value: Any) -> Any:
            if text in self.texts:
                self._values[path].append(value)
            return value

        return hook

    def _replay(self, path: str) -> Hook:
        kept = iter(self._values[path])

        def hook(text: str, value: Any) -> Any:
            return next(kept) if text in self.texts else value

        return hook

    @contextlib.contextmanager
    def _installed(self, module: nn.Module, hook: Hook) -> Iterator[None]:
        original: Any = module.processor

        def call(processor: Any, *args: Any, **kwargs: Any) -> Any:
            self._hook, before = hook, self._hook
            try:
                return self._call(processor, *args, **kwargs)
            finally:
                self._hook = before

        call.__signature__ = _signature(self.processor)  # type: ignore[attr-defined]
        watched = copy.copy(original)
        watched.__class__ = type(
            self.processor.__name__, (self.processor,), {"__call__": call}
        )
        module.processor = watched
        try:
            yield
        finally:
            module.processor = original


def _unchanged(_: str, value: Any) -> Any:
    return value


def _signature(processor: type) -> Any:
    import inspect

    return inspect.signature(processor.__call__)
