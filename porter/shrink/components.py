"""Builds the tiny components of one pipeline from the hints of its constructor."""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from . import sizes, stand_ins, table, text
from .channels import Channels, agreed_channels
from .errors import ShrinkError
from .sources import source_of
from .tokenizers import is_processor, make_tokenizer, tokenizer_for
from .weights import enliven

_NEEDED = ("transformer", "vae")
"""Made where a pipeline calls them optional too: nothing runs without them."""


class Components:
    """The components of one pipeline, in the order in which they need each other.

    Args:
        pipeline_class: whose constructor is served.
        hints: parameter name -> type, unions already reduced.
        changes: configuration entries per component, over the derived ones.
        seed: of the weights.
        blocks: of a backbone's first loop.
    """

    def __init__(
        self,
        pipeline_class: Any,
        hints: Mapping[str, Any],
        changes: Mapping[str, Mapping[str, Any]],
        seed: int,
        blocks: int = sizes.BLOCKS,
    ) -> None:
        self.pipeline_class = pipeline_class
        self.hints = hints
        self.changes = {name: dict(entries) for name, entries in changes.items()}
        self.seed = seed
        self.blocks = blocks
        self.built: dict[str, Any] = {}

    def build(self) -> dict[str, Any]:
        """All arguments of the pipeline's constructor."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        # Tokenizers first: encoders take the vocabulary from them.
        for name in sorted(self.hints, key=lambda name: not _is_tokenizer(name)):
            required = parameters[name].default is inspect.Parameter.empty
            left_out = name in table.LEFT_OUT and not (
                required and self._is_component(name)
            )
            if left_out and not (self._stand_in(name) or name in self.changes):
                self.built[name] = None
            elif self._is_component(name):
                self.built[name] = self.make(name)
            elif required:
                raise ShrinkError(
                    f"{self.pipeline_class.__name__} needs {name}: {self.hints[name]}",
                    expected="a component class or a default",
                )
        self.built.update(self.changes.get("pipeline", {}))
        return self.built

    def make(self, name: str) -> Any:
        """One component, from its hint and its changes.

        Raises:
            ShrinkError: its class is of no kind that can be made small.
        """
        from diffusers import ModelMixin, SchedulerMixin
        from diffusers.guiders import BaseGuidance
        from transformers.image_processing_utils import BaseImageProcessor

        changes = dict(self.changes.get(name, {}))
        hinted = self._stand_in(name) or self.hints[name]
        cls = _resolved(changes.pop("class", hinted))
        if _is_tokenizer(name):
            return self._tokenizer(cls, self._encoder_hint(name), changes)
        if issubclass(cls, enum.Enum | SchedulerMixin):
            return self._scheduler(cls, changes)
        if issubclass(cls, ModelMixin):
            return self._diffusers_model(name, cls, changes)
        if hasattr(cls, "config_class"):
            return self._encoder(name, cls, changes)
        if issubclass(cls, BaseImageProcessor):
            side = {"height": text.IMAGE_SIZE, "width": text.IMAGE_SIZE}
            return cls(size=side, crop_size=side, **changes)
        if issubclass(cls, BaseGuidance):
            return cls(**changes)
        raise ShrinkError(
            f"{self.pipeline_class.__name__} needs {name}: {cls.__name__}",
            expected="a model, a scheduler or a tokenizer",
        )

    def _tokenizer(self, cls: Any, encoder: Any, changes: Mapping[str, Any]) -> Any:
        tokenizer = make_tokenizer(tokenizer_for(cls, encoder))
        for entry, value in changes.items():
            setattr(tokenizer, entry, value)
        if not is_processor(cls):
            return tokenizer
        config = text.encoder_config(
            text.concrete_class(encoder), None, sizes.TEXT_DIM, {}
        )
        vision = getattr(config, "vision_config", None)
        takes_pictures = "image_processor" in inspect.signature(cls.__init__).parameters
        if vision is None or not takes_pictures:
            # Another component reads the pictures, or none does.
            return stand_ins.TextProcessor(tokenizer, tokenizer.chat_template)
        return stand_ins.picture_processor(tokenizer, vision)

    def alike(self, name: str) -> list[str]:
        """The components hinted by the same class, ``name`` among them."""
        return [n for n, hint in self.hints.items() if hint is self.hints[name]]

    def _stand_in(self, name: str) -> str | None:
        hint = self.hints.get(name)
        return table.STAND_INS.get(getattr(hint, "__name__", ""))

    def _is_component(self, name: str) -> bool:
        """Whether a parameter is a component to make, and not a number or a flag."""
        optional = self.pipeline_class._optional_components
        needed = name in _NEEDED or name in self.changes or _is_text(name)
        needed = needed or self._stand_in(name) is not None
        if name in optional and not needed:
            return False
        hint = self.hints[name]
        return isinstance(hint, type) and hint not in (bool, int, float, str)

    def _scheduler(self, cls: Any, changes: dict[str, Any]) -> Any:
        if issubclass(cls, enum.Enum):
            # Any of the compatible ones: the solver that most of these pipelines name.
            import diffusers

            cls = diffusers.DPMSolverMultistepScheduler
        parameters = inspect.signature(cls.__init__).parameters
        source = source_of(self.pipeline_class)
        if "calculate_shift(" in source and "use_dynamic_shifting" in parameters:
            # Released schedulers of pipelines that compute `mu` shift dynamically.
            changes.setdefault("use_dynamic_shifting", True)
        return cls(**changes)

    def _diffusers_model(self, name: str, cls: Any, changes: dict[str, Any]) -> Any:
        channels = self._channels()
        if name == "vae":
            config = sizes.vae_config(cls, channels.latents)
        else:
            config = sizes.backbone_config(cls, self.blocks)
            if self.hints[name] is self.hints.get("transformer"):
                config |= channels.backbone
        known = sizes.defaults(cls).keys()
        entries = {**config, **changes}
        model = cls(**{n: v for n, v in entries.items() if n in known})
        model.register_to_config(**{n: v for n, v in changes.items() if n not in known})
        enliven(model, self.seed)
        return model.eval()

    def _channels(self) -> Channels:
        """Channels on which the backbone and the VAE agree."""
        backbone, vae = self._class_of("transformer"), self._class_of("vae")
        return agreed_channels(
            self.pipeline_class,
            sizes.defaults(backbone) if backbone else {},
            self.changes.get("transformer", {}),
            sizes.defaults(vae) if vae else {},
        )

    def _class_of(self, name: str) -> Any:
        """What a component is made of: its hint, where the table names no other class."""
        return _resolved(self.changes.get(name, {}).get("class", self.hints.get(name)))

    def _encoder(self, name: str, hint: type, changes: dict[str, Any]) -> Any:
        cls = text.concrete_class(hint)
        suffix = name.replace("text_encoder", "")
        tokenizer = next(
            (
                self.built[t]
                for t in (f"tokenizer{suffix}", f"processor{suffix}", "tokenizer")
                if t in self.built
            ),
            None,
        )
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        model = cls(text.encoder_config(cls, tokenizer, self._width(cls), changes))
        enliven(model, self.seed)
        return model.eval()

    def _width(self, cls: Any) -> int:
        """Width of one text encoder: CLIP models share one, their outputs are joined."""
        alike = [h for h in self.hints.values() if isinstance(h, type)]
        alike = [h for h in alike if h.__name__.startswith("CLIPText")]
        if cls.__name__.startswith("CLIPText"):
            return sizes.TEXT_DIM // len(alike)
        return sizes.TEXT_DIM

    def _encoder_hint(self, name: str) -> Any:
        """The encoder that a tokenizer or processor belongs to."""
        suffix = name.rpartition("tokenizer")[2]
        hint = self.hints.get(f"text_encoder{suffix}") or self.hints.get("text_encoder")
        if hint is None:
            return None
        entries = self.changes.get(f"text_encoder{suffix}", {})
        return _resolved(entries.get("class", hint))


def _resolved(cls: Any) -> Any:
    """A class, from itself or from ``package:Name``."""
    if not isinstance(cls, str):
        return cls
    module, _, name = cls.partition(":")
    return getattr(importlib.import_module(module), name)


def _is_tokenizer(name: str) -> bool:
    """Tokenizers, and the processors that wrap one (see ``tokenizer_for``)."""
    return "tokenizer" in name or name in ("processor", "text_processor")


def _is_text(name: str) -> bool:
    return _is_tokenizer(name) or "text_encoder" in name
