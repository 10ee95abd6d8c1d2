"""Small tokenizers of any transformers class, made on the spot from a fixed text.

A tokenizer that no hub delivers has to be made: the class's own normaliser,
pre-tokeniser and special tokens are kept, only the vocabulary is new.  A prompt then
becomes a few dozen tokens, its length depends on its words, and padding, special
tokens and masks work as in a released checkpoint.
"""

from __future__ import annotations

import re
import string
import tempfile
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from .errors import ShrinkError

CONTEXT_LENGTH = 77
"""Longest prompt in tokens, of every tokenizer whose class states no limit."""

CORPUS = (
    "a photo of an astronaut riding a horse on the moon, highly detailed",
    "a small cactus with a happy face in the middle of the desert",
    "an oil painting of a red fox in deep snow under a pale winter sun",
    "two wooden boats on a quiet lake at dawn, mist between the mountains",
    "blurry, low quality, distorted, watermark, text, cropped",
    # What chat encoders of pictures are told first; whole words keep these short.
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\nYou are an assistant designed to generate images<|im_end|>\n",
    " ".join(string.printable.strip()),
)
"""What the vocabulary knows: prompts, and every printable character once."""

# The ChatML form that the chat encoders of diffusers' pipelines use.  Arguments that it
# does not name (`enable_thinking`, tools) are accepted by Jinja and change nothing.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
)


def make_tokenizer(tokenizer_class: Any) -> Any:
    """A tokenizer of ``tokenizer_class`` with a small vocabulary of its own.

    Raises:
        ShrinkError: the class offers no way to train or to construct it offline.
    """
    algorithm = getattr(getattr(tokenizer_class, "model", None), "__name__", "")
    if algorithm == "Unigram":
        tokenizer = tokenizer_class(vocab=_unigram_pieces())
    elif algorithm == "BPE":
        tokenizer = _make_byte_pair(tokenizer_class)
    elif algorithm == "WordPiece":
        tokenizer = _make_word_piece(tokenizer_class)
    elif _reads_sentencepiece(tokenizer_class):
        tokenizer = _train_sentencepiece(tokenizer_class)
    else:
        # Byte-level classes carry their vocabulary in the code.
        tokenizer = tokenizer_class()
    if algorithm == "BPE":
        # Byte-pair classes are those of chat models; the tokens and the template change
        # nothing for a caller that does not use them.
        tokenizer.add_tokens(list(CHAT_TOKENS), special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.model_max_length > 1_000_000:
        tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def tokenizer_for(hint: Any, encoder: Any) -> Any:
    """The tokenizer class for a hint that may be an automatic one or a processor."""
    from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

    if isinstance(hint, type) and issubclass(hint, PreTrainedTokenizerBase):
        generic = hint.__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
        if hint is not PreTrainedTokenizerBase and not generic:
            return hint
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    config_class = getattr(encoder, "config_class", None)
    found = TOKENIZER_MAPPING.get(config_class, None) if config_class else None
    if isinstance(found, tuple):  # (slow, fast) before transformers 5
        found = found[1] or found[0]
    if found is None or found.__name__ == "TokenizersBackend":
        return Qwen2Tokenizer
    return found


def is_processor(hint: Any) -> bool:
    """Whether a hint names a processor, which wraps a tokenizer."""
    from transformers import AutoProcessor, ProcessorMixin

    return isinstance(hint, type) and issubclass(hint, AutoProcessor | ProcessorMixin)


def _unigram_pieces() -> list[tuple[str, float]]:
    """Pieces with scores, special tokens first: whole words, halves, characters.

    Made by rule, as byte pairs below: the library's trainers number their pieces
    differently in every process, and equal seeds have to give equal folders.
    """
    words = list(dict.fromkeys(" ".join(CORPUS).split()))
    halves = [w[: len(w) // 2] for w in words] + [w[len(w) // 2 :] for w in words]
    pieces = ["\u2581", *string.printable.strip()]
    pieces += [f"\u2581{piece}" for piece in words + halves] + halves
    # Longer pieces score higher, so that a word known whole stays whole.
    return [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")] + [
        (piece, -20.0 / (1 + len(piece))) for piece in dict.fromkeys(pieces) if piece
    ]


def _make_word_piece(tokenizer_class: Any) -> Any:
    """A word-piece tokenizer that knows the corpus' words and every character."""
    characters = [*string.digits, *string.ascii_lowercase, *string.punctuation]
    words = re.findall(r"\w+", " ".join(CORPUS).lower())
    pieces = [*_blank(tokenizer_class).all_special_tokens, *characters]
    pieces += [f"##{character}" for character in characters] + words
    return tokenizer_class(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    )


def _make_byte_pair(tokenizer_class: Any) -> Any:
    """A byte-pair tokenizer whose merges spell the corpus' words from the left."""
    blank = _blank(tokenizer_class)
    backend = blank.backend_tokenizer
    ending = backend.model.end_of_word_suffix or ""
    words: dict[str, None] = {}
    for line in CORPUS:
        text = backend.normalizer.normalize_str(line) if backend.normalizer else line
        pieces = [(text, (0, 0))]
        if backend.pre_tokenizer:
            pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        words.update(
            dict.fromkeys(part for piece, _ in pieces for part in _split(piece))
        )
    symbols = sorted({*ByteLevel.alphabet(), *"".join(words), "\u2581"})
    vocabulary = [*blank.all_special_tokens, *symbols]
    if ending:
        vocabulary += [symbol + ending for symbol in symbols]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        spelled = [*word[:-1], word[-1] + ending]
        left = spelled[0]
        for right in spelled[1:]:
            merges[left, right] = None
            left += right
    vocabulary += [left + right for left, right in merges]
    numbers = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return tokenizer_class(vocab=numbers, merges=list(merges))


def _split(piece: str) -> list[str]:
    """Words of a piece, where a class does not split at spaces itself."""
    return (
        [f"\u2581{word}" for word in piece.split("\u2581") if word]
        if ("\u2581" in piece)
        else [piece]
    )


def _blank(tokenizer_class: Any) -> Any:
    """The class with no more than its special tokens."""
    try:
        return tokenizer_class()
    except Exception as error:
        raise ShrinkError(
            f"tokenizer {tokenizer_class.__name__} cannot be made offline ({error})",
            expected="a class with a default vocabulary",
        ) from error


def _reads_sentencepiece(tokenizer_class: Any) -> bool:
    files = getattr(tokenizer_class, "vocab_files_names", {})
    return str(files.get("vocab_file", "")).endswith(".model")


def _train_sentencepiece(tokenizer_class: Any) -> Any:
    """Train a sentencepiece model for a slow tokenizer (transformers before 5)."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "spiece.model"
        with model.open("wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS * 4),
                model_writer=stream,
                vocab_size=400,
                hard_vocab_limit=False,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                minloglevel=2,
                num_threads=1,
            )
        return tokenizer_class(str(model))
