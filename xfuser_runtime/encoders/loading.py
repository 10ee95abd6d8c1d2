"""An encoder of a checkpoint without its weights, for the ranks that receive its results."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def load_empty(cls: Any, folder: Path) -> nn.Module | None:
    """A model of `cls` on the meta device, from the configuration in `folder`.

    Args:
        cls: class of transformers.
        folder: of the component in a checkpoint; its weights are not read.

    Returns:
        The model in evaluation mode, or None where only loading makes the right modules;
        the log says why.
    """
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in held:
            raise ValueError("its weights are quantised")
        config = cls.config_class.from_pretrained(folder)
        # As transformers itself begins to load: tied parameters stay tied.
        with torch.device("meta"):
            model: nn.Module = cls._from_config(config)
    except Exception as error:
        logger.warning("every rank reads the weights in %s: %s", folder, error)
        return None
    return model.eval()
