"""The calls that every mode is verified on, and how they travel to the ranks.

Few calls, chosen so that every pair of choices among batch 1 and 2, picture size, text
length and guidance occurs: what breaks in a parallel run breaks by a pair of these.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from porter.shrink import PROCESSOR_CALLS, call_kwargs, image_sizes
from porter.verify.modes import Mode

#: Every call runs this many steps; fewer hide errors that grow.
STEPS = 8
CALLBACKS_FILE = Path(__file__).with_name("callbacks.py")


@dataclass(frozen=True)
class CallbackSpec:
    """A callback by import: a module's name or a file's path, a class, its arguments."""

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def make(self) -> Any:
        """A fresh callback."""
        return getattr(_module(self.module), self.name)(**dict(self.arguments))


CHANGE_LATENTS = CallbackSpec(str(CALLBACKS_FILE), "ChangeLatents")
INTERRUPT = CallbackSpec(str(CALLBACKS_FILE), "Interrupt")
CUTOFF = CallbackSpec(
    "diffusers.callbacks",
    "SDCFGCutoffCallback",
    (("cutoff_step_ratio", None), ("cutoff_step_index", 4)),
)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        batch: number of prompts.
        size: index of the picture size.
        text: index of the set of prompts; the sets differ in length and padding.
        guidance: whether the second branch is on.
        callback: what is called at the end of each step.
        more: further arguments, under which the pipeline sets attention processors of its
            own.
    """

    batch: int
    size: int
    text: int
    guidance: bool
    callback: CallbackSpec | None = None
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """For example `batch2 size1 text0 guided`, with the callback's name at the end."""
        words = [f"batch{self.batch}", f"size{self.size}", f"text{self.text}"]
        words.append("guided" if self.guidance else "unguided")
        if self.callback is not None:
            words.append(self.callback.name)
        words += [name for name, _ in self.more]
        return " ".join(words)

    def suits(self, mode: Mode, *, ported: bool = False) -> bool:
        """False where the mode has nothing to split on this call, or refuses it.

        Args:
            mode: the mode.
            ported: whether the port has the processors that `more` makes the pipeline set.
        """
        if self.more:
            kinds = {"dp", "cfg"} | ({"ring", "ulysses"} if ported else set())
            return set(mode.kinds) <= kinds and self.batch % mode.dp == 0
        if mode.cfg > 1 and not self.guidance:
            return False
        if self.batch % mode.dp:
            return False
        if self.callback == CUTOFF:
            return mode.kinds == ("cfg",)
        return True

    def kwargs(self, pipeline: Any, steps: int = STEPS) -> dict[str, Any]:
        """Fresh keyword arguments of this call, with live generator and callback."""
        height, width = image_sizes(pipeline)[self.size]
        kwargs = call_kwargs(
            pipeline,
            height=height,
            width=width,
            batch_size=self.batch,
            text=self.text,
            guidance=self.guidance,
            num_inference_steps=steps,
            seed=self.batch * 100 + self.size * 10 + self.text,
        )
        if self.callback is not None:
            kwargs |= callback_kwargs(pipeline, self.callback)
        return kwargs | dict(self.more)


#: Without callbacks.
PLAIN = (
    Case(1, 0, 0, True),
    Case(2, 1, 1, True),
    Case(2, 0, 0, False),
    Case(1, 2, 1, False),
)
#: The case that faults are injected into: every mode can split it.
SABOTAGED = PLAIN[1]


def cases_for(pipeline: Any) -> tuple[Case, ...]:
    """The cases that this pipeline can run: callbacks as far as `__call__` takes them."""
    cases = list(PLAIN)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    by_name = "callback_on_step_end" in parameters
    if by_name or "callback" in parameters:
        cases.append(Case(2, 1, 0, True, CHANGE_LATENTS))
    if by_name and hasattr(type(pipeline), "interrupt"):
        cases.append(Case(2, 1, 0, True, INTERRUPT))
    if by_name and _takes_cutoff(pipeline):
        cases.append(Case(1, 1, 0, True, CUTOFF))
    more = tuple((k, v) for k, v in PROCESSOR_CALLS.items() if k in parameters)
    if more:
        # Without guidance the batch is doubled too, though not by its branches.
        cases += [Case(2, 1, 0, guided, more=more) for guided in (True, False)]
    return tuple(cases)


def _takes_cutoff(pipeline: Any) -> bool:
    """The cut-off callback sets `_guidance_scale` and shortens the embeddings it names."""
    tensors = getattr(pipeline, "_callback_tensor_inputs", ())
    names = inspect.unwrap(type(pipeline).__call__).__code__.co_names
    return "_guidance_scale" in names and set(CUTOFF.make().tensor_inputs) <= set(
        tensors
    )


def callback_kwargs(pipeline: Any, spec: CallbackSpec) -> dict[str, Any]:
    """The keyword arguments that give `spec` to a call of `pipeline`."""
    callback = spec.make()
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "callback_on_step_end" not in parameters:
        return {"callback": callback, "callback_steps": 1}
    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": list(callback.tensor_inputs),
    }


def packed(kwargs: Mapping[str, Any], spec: CallbackSpec | None) -> dict[str, Any]:
    """Keyword arguments that pickle: generators as seeds, the callback as its import.

    The counterpart in the ranks is `xfuser_runtime.replay.calls.unpacked`.
    """
    return {name: _packed(value, spec) for name, value in kwargs.items()}


def _packed(value: Any, spec: CallbackSpec | None) -> Any:
    if isinstance(value, torch.Generator):
        return {"replay": "generator", "seed": value.initial_seed()}
    if isinstance(value, (list, tuple)):
        return type(value)(_packed(item, spec) for item in value)
    if spec is not None and type(value).__name__ == spec.name:
        return {
            "replay": "callback",
            "module": spec.module,
            "name": spec.name,
            "arguments": dict(spec.arguments),
        }
    return value


def fresh(pipeline: Any, case: Case) -> Callable[[], dict[str, Any]]:
    """Makes the arguments of `case` anew at each call."""
    return lambda: case.kwargs(pipeline)


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
