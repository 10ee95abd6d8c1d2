"""A tiny checkpoint folder for any pipeline class, made without a hub.

The folder is written by ``save_pretrained`` and read by the stock ``from_pretrained``.
Components come from the type hints of the pipeline's ``__init__``; text encoders are
paired with the tokenizer of the same suffix.
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import sizes, table, text
from .errors import ShrinkError
from .tokenizers import make_tokenizer
from .weights import enliven

Overrides = Mapping[str, Mapping[str, Any]]


def make_checkpoint(
    pipeline_class: Any,
    directory: str | Path,
    *,
    seed: int = 0,
    overrides: Overrides | None = None,
) -> Path:
    """Write a tiny checkpoint of ``pipeline_class`` with lively random weights.

    Args:
        pipeline_class: a ``DiffusionPipeline`` subclass, of diffusers or of anyone.
        directory: the folder to write; made when it is missing.
        seed: of the weights; equal seeds give equal bytes.
        overrides: configuration entries per component, over the derived ones.

    Returns:
        The folder, for ``pipeline_class.from_pretrained(folder)``.

    Raises:
        ShrinkError: a component cannot be derived from its hint.
    """
    folder = Path(directory)
    make_pipeline(pipeline_class, seed=seed, overrides=overrides).save_pretrained(
        folder
    )
    return folder


def make_pipeline(
    pipeline_class: Any, *, seed: int = 0, overrides: Overrides | None = None
) -> Any:
    """The tiny pipeline itself, in memory; arguments as of :func:`make_checkpoint`."""
    hints = component_hints(pipeline_class)
    merged = _merge(table.for_pipeline(pipeline_class), overrides or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _Parts(pipeline_class, hints, merged, seed).build()
    return pipeline_class(**parts)


def component_hints(pipeline_class: Any) -> dict[str, Any]:
    """The type of each parameter of ``__init__``, unions reduced to their first member.

    Raises:
        ShrinkError: a parameter has no hint and no default.
    """
    parameters = inspect.signature(pipeline_class.__init__).parameters
    resolved = typing.get_type_hints(pipeline_class.__init__)
    hints: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if name not in resolved and parameter.default is parameter.empty:
            raise ShrinkError(
                f"{pipeline_class.__name__}.__init__ has no type hint for {name!r}",
                expected="a component class",
            )
        hints[name] = _first_member(resolved.get(name))
    return hints


def _first_member(hint: Any) -> Any:
    """`A | B | None` and `Union[A, B]` give A."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        return _first_member(members[0])
    return hint


def _merge(first: Overrides, second: Overrides) -> dict[str, dict[str, Any]]:
    names = {*first, *second}
    return {n: {**first.get(n, {}), **second.get(n, {})} for n in names}


class _Parts:
    """Builds the components of one pipeline in the order in which they need each other."""

    def __init__(
        self,
        pipeline_class: Any,
        hints: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, Any]],
        seed: int,
    ) -> None:
        self.pipeline_class = pipeline_class
        self.hints = hints
        self.overrides = overrides
        self.seed = seed
        self.parts: dict[str, Any] = {}

    def build(self) -> dict[str, Any]:
        """All arguments of the pipeline's constructor."""
        optional = set(self.pipeline_class._optional_components)
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        for name in sorted(self.hints, key=self._order):
            if name in table.LEFT_OUT or (name in optional and not _is_text_part(name)):
                self.parts[name] = None
            elif isinstance(self.hints[name], type) and not _is_plain(self.hints[name]):
                self.parts[name] = self._component(name, self.hints[name])
            elif parameters[name].default is inspect.Parameter.empty:
                self.parts[name] = None
        for name, value in self.overrides.get("pipeline", {}).items():
            self.parts[name] = value
        return self.parts

    def _order(self, name: str) -> int:
        """Tokenizers first (vocabulary), then the rest."""
        return 0 if _is_tokenizer(name) else 1

    def _component(self, name: str, hint: type) -> Any:
        from diffusers import ModelMixin, SchedulerMixin

        changes = dict(self.overrides.get(name, {}))
        cls = changes.pop("class", hint)
        if issubclass(cls, enum.Enum) or issubclass(cls, SchedulerMixin):
            return self._scheduler(cls, changes)
        if issubclass(cls, ModelMixin):
            return self._diffusers_model(cls, changes)
        if _is_tokenizer(name):
            return make_tokenizer(cls)
        if hasattr(cls, "config_class"):
            return self._encoder(name, cls, changes)
        raise ShrinkError(
            f"{self.pipeline_class.__name__} needs {name}: {cls.__name__}",
            expected="a model, a scheduler or a tokenizer",
        )

    def _scheduler(self, cls: Any, changes: dict[str, Any]) -> Any:
        if issubclass(cls, enum.Enum):
            from diffusers import DPMSolverMultistepScheduler as cls
        parameters = inspect.signature(cls.__init__).parameters
        module = sys.modules[self.pipeline_class.__module__]
        if hasattr(module, "calculate_shift") and "use_dynamic_shifting" in parameters:
            # Released schedulers of pipelines that compute `mu` shift dynamically.
            changes.setdefault("use_dynamic_shifting", True)
        return cls(**changes)

    def _diffusers_model(self, cls: Any, changes: dict[str, Any]) -> Any:
        if "block_out_channels" in sizes.defaults(cls) or "z_dim" in sizes.defaults(
            cls
        ):
            config = sizes.vae_config(cls, self._latent_channels(cls))
        else:
            config = sizes.backbone_config(cls)
        model = cls(**{**config, **changes})
        enliven(model, self.seed)
        return model.eval()

    def _latent_channels(self, cls: Any) -> int | None:
        """Channels of the VAE's latents where its own default does not fit the backbone."""
        backbone = self.hints.get("transformer")
        channels = sizes.defaults(backbone).get("in_channels") if backbone else None
        if channels is None or "latent_channels" not in sizes.defaults(cls):
            return None
        packed = hasattr(self.pipeline_class, "_pack_latents")
        return int(channels) // 4 if packed else int(channels)

    def _encoder(self, name: str, hint: type, changes: dict[str, Any]) -> Any:
        cls = text.concrete_class(hint)
        tokenizer = self.parts.get(name.replace("text_encoder", "tokenizer"))
        config = text.encoder_config(cls, tokenizer)
        config.update(changes)
        model = cls(config)
        enliven(model, self.seed)
        return model.eval()


def _is_tokenizer(name: str) -> bool:
    return "tokenizer" in name


def _is_text_part(name: str) -> bool:
    return _is_tokenizer(name) or "text_encoder" in name


def _is_plain(hint: type) -> bool:
    """Numbers, flags and texts of the constructor keep their defaults."""
    return hint in (bool, int, float, str, dict, list, tuple)
