"""Small configurations of transformers' encoders, whatever their family.

Families name the same sizes differently; the names below are the ones that the
library's configuration classes use.  Nested configurations (text, vision, audio) are
shrunk alike.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .errors import ShrinkError
from .sources import source_of

LAYERS = 2
HEADS = 4
IMAGE_SIZE = 28
"""Pixels along one side of what a picture encoder sees: two by two patches."""

_SIZES: dict[str, str | int] = {
    "hidden_size": "width",
    "d_model": "width",
    "projection_dim": "width",
    "out_hidden_size": "width",
    "embed_dim": "width",
    "intermediate_size": "mlp",
    "d_ff": "mlp",
    "moe_intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_layers": "layers",
    "num_decoder_layers": "layers",
    "depth": "layers",
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "head_dim": "head",
    "d_kv": "head",
    "query_pre_attn_scalar": "head",
    "image_size": IMAGE_SIZE,
    "patch_size": 14,
}
"""Sizes by name: a number, or what is derived from the width; grouped keys where the
family groups them."""


def concrete_class(hint: type) -> Any:
    """The class to build for a hint: an abstract base stands for its plain model."""
    name = hint.__name__
    if name == "PreTrainedModel":
        # Says nothing: the plain decoder that current pipelines use most.
        from transformers import Qwen3Model

        return Qwen3Model
    if not name.endswith("PreTrainedModel"):
        return hint
    module = sys.modules[hint.__module__]
    plain = getattr(module, name.replace("PreTrainedModel", "Model"), None)
    if plain is None:
        raise ShrinkError(
            f"{name} is an abstract encoder", expected="a class that can be built"
        )
    return plain


def encoder_config(
    cls: Any, tokenizer: Any, width: int, changes: Mapping[str, Any]
) -> Any:
    """A small configuration object for the transformers model ``cls``.

    ``changes`` may hold ``layers`` (blocks of the encoder) and entries of the
    configuration's top level.
    """
    config_class = cls.config_class
    given = config_class().to_dict()
    layers = int(changes.get("layers", LAYERS))
    small = _shrunk(given, width, layers)
    if tokenizer is not None:
        _fit_vocabulary(small, given, tokenizer)
    source = source_of(sys.modules[cls.__module__])
    if "mrope_section" in source or "vision_config" in given:
        _fit_rope_sections(small.get("text_config", small), given, width)
    for name, value in changes.items():
        if isinstance(value, Mapping):
            small[name] = {**small.get(name, {}), **value}
        elif name != "layers":
            small[name] = value
    return config_class(**small)


def _shrunk(given: Mapping[str, Any], width: int, layers: int) -> dict[str, Any]:
    derived = {
        "width": width,
        "mlp": 2 * width,
        "layers": layers,
        "head": width // HEADS,
    }
    small: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict) and _is_nested(name):
            small[name] = _shrunk(value, width, layers)
        elif name in _SIZES and isinstance(value, int):
            size = _SIZES[name]
            small[name] = derived[size] if isinstance(size, str) else size
        elif name == "layer_types":
            small[name] = (list(value or []) * layers)[:layers] or None
    return small


def _is_nested(name: str) -> bool:
    return name.endswith("_config") or name in ("encoder", "decoder")


def _fit_vocabulary(
    small: dict[str, Any], given: Mapping[str, Any], tokenizer: Any
) -> None:
    """Vocabulary size and special tokens from the tokenizer, at every nesting level."""
    fitted = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "image_token_id": _token_id(tokenizer, "<|image_pad|>"),
        "image_token_index": _token_id(tokenizer, "<image>"),
        "video_token_id": _token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _token_id(tokenizer, "<|vision_end|>"),
    }
    small.update({k: v for k, v in fitted.items() if k in given})
    for name, value in small.items():
        if isinstance(value, dict) and _is_nested(name) and "vision" not in name:
            value.update({k: v for k, v in fitted.items() if k in given[name]})


def _token_id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.get_vocab().get(token, 0))


def _fit_rope_sections(
    small: dict[str, Any], given: Mapping[str, Any], width: int
) -> None:
    """Sections of a picture-aware rotary embedding: half a head, time, rows, columns."""
    half = width // HEADS // 2
    sections = [half - 2 * (half // 4), half // 4, half // 4]
    text = given.get("text_config", given)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), dict):
            small[name] = {**text[name], "mrope_section": sections}
