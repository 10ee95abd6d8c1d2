"""Small tokenizers of any transformers class, trained on the spot from a fixed text.

A tokenizer that no hub delivers has to be made: the class's own normaliser,
pre-tokeniser and special tokens are kept, only the vocabulary is new.  A prompt then
becomes a few dozen tokens, its length depends on its words, and padding, special
tokens and masks work as in a released checkpoint.
"""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

from .errors import ShrinkError

VOCABULARY_SIZE = 400
"""Entries asked of the trainer; special tokens come on top."""

CONTEXT_LENGTH = 77
"""Longest prompt in tokens, of every tokenizer whose class states no limit."""

CORPUS = (
    "a photo of an astronaut riding a horse on the moon, highly detailed",
    "a small cactus with a happy face in the middle of the desert",
    "an oil painting of a red fox in deep snow under a pale winter sun",
    "two wooden boats on a quiet lake at dawn, mist between the mountains",
    "blurry, low quality, distorted, watermark, text, cropped",
    "system user assistant describe the image by detailing the color and shape",
    " ".join(string.printable.strip()),
)
"""What the vocabulary is trained on: prompts, and every printable character once."""

# The ChatML form that the chat encoders of diffusers' pipelines use.  `enable_thinking`
# and tool arguments are accepted by Jinja and change nothing.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def make_tokenizer(tokenizer_class: type) -> Any:
    """A tokenizer of ``tokenizer_class`` with a small vocabulary of its own.

    Raises:
        ShrinkError: the class offers no way to train or to construct it offline.
    """
    if hasattr(tokenizer_class, "train_new_from_iterator"):
        tokenizer = _train_backend(tokenizer_class)
    elif "sentencepiece" in _vocabulary_kind(tokenizer_class):
        tokenizer = _train_sentencepiece(tokenizer_class)
    else:
        # Byte-level classes carry their vocabulary in the code.
        tokenizer = tokenizer_class()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.model_max_length > 1_000_000:
        tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def add_chat(tokenizer: Any) -> None:
    """Give a tokenizer the ChatML tokens and template that chat encoders ask for."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE


def _train_backend(tokenizer_class: Any) -> Any:
    """Train through the class's own pipeline (transformers' tokenizers backend)."""
    try:
        blank = tokenizer_class()
    except Exception as error:
        raise ShrinkError(
            f"tokenizer {tokenizer_class.__name__} cannot be made offline ({error})",
            expected="a class with a default vocabulary",
        ) from error
    return blank.train_new_from_iterator(
        list(CORPUS) * 4, VOCABULARY_SIZE, show_progress=False
    )


def _vocabulary_kind(tokenizer_class: Any) -> str:
    """ "sentencepiece" where the class reads a sentencepiece model, else ""."""
    name = str(getattr(tokenizer_class, "vocab_files_names", {}).get("vocab_file", ""))
    return "sentencepiece" if name.endswith(".model") else ""


def _train_sentencepiece(tokenizer_class: Any) -> Any:
    """Train a sentencepiece model for a slow tokenizer (transformers before 5)."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "spiece.model"
        with model.open("wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS * 4),
                model_writer=stream,
                vocab_size=VOCABULARY_SIZE,
                hard_vocab_limit=False,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                minloglevel=2,
            )
        return tokenizer_class(str(model))
