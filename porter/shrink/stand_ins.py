"""Components that stand in for packages which a test does not install."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import ProcessorMixin


class NoSafetyChecker(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Passes every text and every picture; has a parameter so that it can be saved."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.placeholder = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        """Always safe."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """The frames as they came."""
        return frames


class TextProcessor(ProcessorMixin):  # type: ignore[misc]
    """A processor with a tokenizer alone: what is left of one when no picture comes.

    The library's processors for pictures and videos cannot be made without torchvision.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: Any = None, **kwargs: Any) -> Any:
        """Tokenises ``text``; pictures and videos must be None."""
        given = [name for name in ("images", "videos") if kwargs.pop(name, None)]
        if given:
            raise ValueError(f"TextProcessor got {given}, expected text alone")
        return self.tokenizer([text] if isinstance(text, str) else text, **kwargs)
