"""Components that stand in for packages which a test does not install."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import BatchFeature, ProcessorMixin

PLACES = 12
"""Most tokens of one picture in a text."""


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
    """A processor with a tokenizer alone: what is left of one when no picture comes."""

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


class PictureProcessor(ProcessorMixin):  # type: ignore[misc]
    """A processor of texts and pictures.

    The library's processors for pictures hold one for videos as well, which cannot be
    made without torchvision.  As they do, this one repeats the token of a picture in the
    text as often as the encoder merges the picture's patches.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token = "<|image_pad|>"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def image_token_id(self) -> int:
        """Number of a picture's token."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Tokens of ``text``, beside them the patches of ``images``, as the encoder asks.

        Raises:
            ValueError: a video comes.
        """
        if kwargs.pop("videos", None) is not None:
            raise ValueError("PictureProcessor got videos, expected text and images")
        texts = [text] if isinstance(text, str) else list(text or ())
        if images is None:
            return self.tokenizer(texts, **kwargs)
        patches = self.image_processor(images=images, return_tensors="pt")
        merged = self.image_processor.merge_size**2
        counts = iter((patches["image_grid_thw"].prod(dim=1) // merged).tolist())
        texts = [self._with_places(each, counts) for each in texts]
        if not texts:
            return patches
        tokens = self.tokenizer(texts, **kwargs)
        if hasattr(ProcessorMixin, "create_mm_token_type_ids"):
            # Since transformers 5 encoders are told which tokens are a picture's.
            ids = torch.as_tensor(tokens["input_ids"])
            tokens["mm_token_type_ids"] = (ids == self.image_token_id).long()
        return BatchFeature({**tokens, **patches})

    def _with_places(self, text: str, counts: Iterator[int]) -> str:
        """Every token of a picture as often as the next picture has places."""
        first, *rest = text.split(self.image_token)
        return first + "".join(self.image_token * next(counts) + part for part in rest)


def picture_processor(tokenizer: Any, vision: Any) -> PictureProcessor:
    """A processor whose pictures have the patches that an encoder's ``vision`` reads.

    Every picture becomes at most :data:`PLACES` tokens.
    """
    module = transformers.models.qwen2_vl
    # The one without torchvision has a name of its own since transformers 5.
    cls = getattr(module, "Qwen2VLImageProcessorPil", None)
    cls = cls or transformers.Qwen2VLImageProcessor
    place = (vision.patch_size * vision.spatial_merge_size) ** 2
    images = cls(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=4 * place,
        max_pixels=PLACES * place,
    )
    return PictureProcessor(images, tokenizer, tokenizer.chat_template)
