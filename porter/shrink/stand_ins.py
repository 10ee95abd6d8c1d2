"""Components that stand in for packages which a test does not install."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class NoSafetyChecker(ModelMixin, ConfigMixin):
    """Passes every text and every picture; has a parameter so that it can be saved."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.placeholder = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        """Always safe."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """The frames as they came."""
        return frames
