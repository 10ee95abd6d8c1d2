"""Small configurations of transformers' encoders, whatever their family.

Families name the same sizes differently; the names below are the ones that the
library's configuration classes use.  Nested configurations (text, vision, audio) are
shrunk alike.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from .errors import ShrinkError
from .sizes import TEXT_DIM

LAYERS = 2
HEADS = 4

_SIZES: dict[str, int] = {
    "hidden_size": TEXT_DIM,
    "d_model": TEXT_DIM,
    "projection_dim": TEXT_DIM,
    "intermediate_size": 2 * TEXT_DIM,
    "d_ff": 2 * TEXT_DIM,
    "moe_intermediate_size": 2 * TEXT_DIM,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "depth": LAYERS,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "head_dim": TEXT_DIM // HEADS,
    "d_kv": TEXT_DIM // HEADS,
    "query_pre_attn_scalar": TEXT_DIM // HEADS,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": TEXT_DIM,
}
"""Sizes by name; 4 heads of 8, grouped keys where the family groups them."""


def concrete_class(hint: type) -> type:
    """The class to build for a hint: an abstract base stands for its plain model."""
    name = hint.__name__
    if not name.endswith("PreTrainedModel"):
        return hint
    module = sys.modules[hint.__module__]
    plain = getattr(module, name.replace("PreTrainedModel", "Model"), None)
    if plain is None:
        raise ShrinkError(
            f"{name} is an abstract encoder", expected="a class that can be built"
        )
    return plain


def encoder_config(cls: Any, tokenizer: Any, layers: int = LAYERS) -> Any:
    """A small configuration object for the transformers model ``cls``."""
    config_class = cls.config_class
    changes = _shrunk(config_class().to_dict(), layers)
    if tokenizer is not None:
        _fit_vocabulary(changes, config_class(), tokenizer)
    return config_class(**changes)


def _shrunk(given: dict[str, Any], layers: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict) and name.endswith("_config"):
            changes[name] = _shrunk(value, layers)
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = layers if name.startswith("num_hidden") else _SIZES[name]
    return changes


def _fit_vocabulary(changes: dict[str, Any], default: Any, tokenizer: Any) -> None:
    """Vocabulary size and special tokens from the tokenizer, at every nesting level."""
    fitted = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    changes.update({k: v for k, v in fitted.items() if hasattr(default, k)})
    for name, value in list(changes.items()):
        nested = getattr(default, name, None)
        if isinstance(value, dict) and "text" in name:
            value.update({k: v for k, v in fitted.items() if hasattr(nested, k)})


def accepts(cls: Any, name: str) -> bool:
    """Whether the constructor of ``cls`` takes a parameter of this name."""
    return name in inspect.signature(cls.__init__).parameters
