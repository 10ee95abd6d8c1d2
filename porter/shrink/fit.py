"""Makes the widths of a backbone agree with what its pipeline feeds it.

Which parameter of a backbone must equal which width of a text encoder stands in no
signature.  So one step is run and watched: a layer that is fed another width than it
was built for names the parameter that sets its width, because changing that parameter
changes exactly this layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from .components import Components
from .kwargs import call_kwargs

ATTEMPTS = 8
"""More mismatched parameters than any backbone has."""


DEEP = 40
"""Layers of a text encoder whose pipeline asks for more than a few."""


class _Mismatch(Exception):
    """A layer got another input width than it was built for."""

    def __init__(self, layer: str, built: int, fed: int) -> None:
        super().__init__(f"{layer}: built for {built}, fed {fed}")
        self.layer, self.built, self.fed = layer, built, fed


class _Passed(Exception):
    """The backbone took what it was fed."""


def _passed(*_: Any) -> None:
    raise _Passed


def fit_widths(pipeline: Any, components: Components) -> None:
    """Rebuild ``pipeline.transformer`` until a short run passes its input layers.

    A pipeline that reads a text encoder's layers by number and finds too few gets a
    deeper encoder.  Other failures of the run are left to whoever calls the pipeline:
    the folder may still serve another kind of call.
    """
    if getattr(pipeline, "transformer", None) is None:
        return
    deepens, deepened = "text_encoder" in components.hints, False
    for _ in range(ATTEMPTS):
        failure = _first_failure(pipeline)
        if isinstance(failure, LookupError) and not deepened and deepens:
            deepened = True
            _change(pipeline, components, "text_encoder", {"layers": DEEP})
            continue
        if not isinstance(failure, _Mismatch):
            return
        change = _parameter_for(pipeline.transformer, failure)
        if change is None:
            return
        for name in components.alike("transformer"):
            _change(pipeline, components, name, change)


def _change(
    pipeline: Any, components: Components, name: str, entries: dict[str, Any]
) -> None:
    components.changes.setdefault(name, {}).update(entries)
    pipeline.register_modules(**{name: components.make(name)})


def _first_failure(pipeline: Any) -> Exception | None:
    handles = [
        module.register_forward_pre_hook(_watch(name))
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, nn.Linear | _Convolution) or _is_norm(module)
    ]
    handles.append(pipeline.transformer.register_forward_hook(_passed))
    disabled = pipeline.__dict__.get("_progress_bar_config")
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline(**call_kwargs(pipeline, num_inference_steps=2))
    except _Passed:
        return None
    except Exception as failure:  # sorted by kind in fit_widths
        return failure
    finally:
        for handle in handles:
            handle.remove()
        pipeline._progress_bar_config = disabled or {}
    return None


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter)


def _width(module: Any) -> int:
    """The input width of a layer."""
    if isinstance(module, _Convolution):
        return int(module.in_channels)
    return int(module.weight.shape[-1])


def _watch(name: str) -> Any:
    def compare(module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            built, fed = _width(module), inputs[0].shape[-1]
            if isinstance(module, _Convolution):
                fed = inputs[0].shape[-1 - len(module.kernel_size)]
            if built != fed:
                raise _Mismatch(name, built, fed)

    return compare


def _parameter_for(backbone: Any, mismatch: _Mismatch) -> dict[str, Any] | None:
    """The configuration entry that makes the layer as wide as its input."""
    config = {k: v for k, v in backbone.config.items() if not k.startswith("_")}
    candidates = [
        (name, value * mismatch.fed // mismatch.built)
        for name, value in config.items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value > 1
        and value * mismatch.fed % mismatch.built == 0
    ]
    # A parameter that equals the width outright is likelier than a factor of it.
    candidates.sort(key=lambda entry: entry[1] != mismatch.fed)
    for name, value in candidates:
        try:
            with torch.device("meta"):
                other = type(backbone)(**{**config, name: value})
        except Exception:  # noqa: BLE001  this value builds no model: try the next
            continue
        layer = dict(other.named_modules()).get(mismatch.layer)
        if layer is not None and _width(layer) == mismatch.fed:
            return {name: value}
    return None
