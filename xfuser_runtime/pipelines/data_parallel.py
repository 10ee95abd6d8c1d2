"""Data parallelism: every replica runs the pipeline on its own prompts.

B is the number of prompts, n the images of each (`num_images_per_prompt` and its like). A replica
takes a contiguous run of prompts and of everything that comes with them, and draws its random
numbers as the rows of the whole batch, so that its output equals those rows of one process.

What belongs to a prompt is told by the name and the declared type of a parameter, never by size
alone; an argument of the batch's size whose meaning is not known is refused.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.errors import InputError
from xfuser_runtime.randomness import rows_of_whole_batch, same_randomness

F = TypeVar("F", bound=Callable[..., Any])

#: Parameters of tensors and lists that hold one entry a prompt, or one a picture.
_TEXT = re.compile(
    r"prompt|embeds|hidden_states|attention_mask|pooled_projections|labels"
)
_LATENT = re.compile(r"latents")
_PICTURE = re.compile(r"image|video|audio|mask")
#: Numbers that may be given as a list, one a prompt. Others (scales of several control networks, the
#: schedule's sigmas) are lists for other reasons.
_NUMBERS = ("class_labels", "decode_timestep", "decode_noise_scale")
_PER_PROMPT_COUNT = re.compile(r"num_\w+_per_prompt")
#: Fewest dimensions of a batch of them; fewer are one picture or one video.
_BATCHED_DIMS = {"image": 4, "mask": 3, "video": 5, "audio": 2}


def enable_data_parallel(function: F) -> F:
    """Decorate a pipeline's `__call__` so that each replica runs its share of the prompts (manual, 1).

    One prompt is run by every replica. With fewer prompts than replicas, a replica without a prompt
    returns None at once. Lists that do not divide evenly give the first replicas one prompt more.

    Raises:
        InputError: an argument cannot be divided among the replicas.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def replicated(self: Any, *args: Any, **kwargs: Any) -> Any:
        if parallel_state.get_data_parallel_world_size() == 1:
            return function(self, *args, **kwargs)
        # Rows of one whole batch only where all replicas draw from the same state.
        with same_randomness(parallel_state.get_world_group(), args, kwargs):
            return _run_share(function, signature.bind(self, *args, **kwargs))

    return replicated  # type: ignore[return-value]


def _run_share(function: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    """What `function` returns for this replica's share of the prompts."""
    batch = count_prompts(bound.arguments)
    if batch is None or batch == 1:
        return function(*bound.args, **bound.kwargs)
    share = Share.of_replica(
        batch,
        _images_per_prompt(bound),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    whole = dict(bound.arguments)
    for name, parameter in list(bound.signature.parameters.items())[1:]:
        if whole.get(name) is not None:
            bound.arguments[name] = share.take(name, _type_text(parameter), whole[name])
    if share.start == share.stop:
        bound.args[0].maybe_free_model_hooks()
        return None
    with rows_of_whole_batch(
        share.start,
        share.stop,
        batch,
        own_generators=_own_generators(bound.arguments),
        shared_posterior=_pictures_are_shared(whole, bound.arguments),
    ):
        return function(*bound.args, **bound.kwargs)


def count_prompts(arguments: dict[str, Any]) -> int | None:
    """Prompts in the arguments of a call; None where neither prompts nor embeddings are given.

    Raises:
        InputError: several embeddings have different numbers of rows.
    """
    prompt = arguments.get("prompt")
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    rows = {
        name: len(value)
        for name, value in arguments.items()
        if value is not None and re.match(r"prompt_embeds|class_labels", name)
        if isinstance(value, (torch.Tensor, list, tuple))
    }
    if len(set(rows.values())) > 1:
        raise InputError(
            f"embeddings with different numbers of rows ({rows}), expected one row a prompt in each;"
            " set data_parallel_degree=1"
        )
    if rows:
        return next(iter(rows.values()))
    named = [n for n in arguments if re.fullmatch(r"(task|content)_prompt", n)]
    texts = [arguments[name] for name in named if arguments[name] is not None]
    return (1 if isinstance(texts[0], str) else len(texts[0])) if texts else None


@dataclass(frozen=True)
class Share:
    """The prompts of one replica: `start` to `stop` of `batch`, `images` pictures each."""

    start: int
    stop: int
    batch: int
    images: int

    @classmethod
    def of_replica(cls, batch: int, images: int, replica: int, replicas: int) -> Share:
        """Balanced contiguous shares; the first replicas take the remainder."""
        base, extra = divmod(batch, replicas)
        start = replica * base + min(replica, extra)
        return cls(start, start + base + (replica < extra), batch, images)

    def take(self, name: str, type_text: str, value: Any) -> Any:
        """This replica's part of argument `name`; `value` itself where all prompts share it.

        Raises:
            InputError: the size fits neither the prompts nor one for all, or its meaning is unknown.
        """
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return self._take_rows(name, value)
        if not isinstance(value, (list, tuple)) or not value:
            return value
        first = value[0]
        if isinstance(first, torch.Generator):
            return self._take_entries(name, value, (self.batch * self.images,))
        if isinstance(first, str) or (
            isinstance(first, (list, tuple)) and "prompt" in name
        ):
            # A list that no single string may stand for is one text in parts, shared by all.
            if name != "prompt" and not _takes_one("str", name, type_text):
                return value
            return self._take_entries(name, value, (self.batch, 1))
        if isinstance(first, (int, float)):
            return self._take_numbers(name, type_text, value)
        if isinstance(first, (torch.Tensor, np.ndarray)) and (
            _TEXT.search(name) or _LATENT.search(name)
        ):
            if "ip_adapter" in name:
                return self._refuse_batched(name, value)
            return self._take_entries(name, value, (self.batch, *self._pictures))
        if _PICTURE.search(name):
            return self._take_pictures(name, type_text, value)
        return value

    @property
    def _pictures(self) -> tuple[int, ...]:
        return (self.batch * self.images,)

    def _take_entries(self, name: str, value: Any, lengths: tuple[int, ...]) -> Any:
        """A slice of a list whose length must be one of `lengths`; 1 of 1 is for all."""
        if len(value) not in lengths:
            raise InputError(
                f"{name} has {len(value)} entries, expected {lengths[0]}"
                f" ({self.batch} prompts); pass one for each"
            )
        return value if len(value) == 1 else value[self._slice(len(value))]

    def _take_rows(self, name: str, value: Any) -> Any:
        """Rows of a tensor or array along dimension 0."""
        text, latent = _TEXT.search(name), _LATENT.search(name)
        picture = None if text or latent else _PICTURE.search(name)
        extent = value.shape[0] if value.ndim else 1
        fits = extent in (self.batch, *self._pictures)
        if picture and value.ndim < _BATCHED_DIMS[picture.group()]:
            return value
        if extent == 1 or (not (text or latent) and not fits):
            return value
        known = text or latent or picture
        if not fits or not known or (value.ndim < 2 and name not in _NUMBERS):
            raise InputError(
                f"{name} of shape {tuple(value.shape)} with {self.batch} prompts, expected rows that"
                " belong to the prompts; set data_parallel_degree=1"
            )
        return value[self._slice(extent)]

    def _take_numbers(self, name: str, type_text: str, value: Any) -> Any:
        if len(value) != self.batch or not (
            name in _NUMBERS or _takes_one("int|float", name, type_text)
        ):
            return value
        if name in _NUMBERS:
            return value[self._slice(len(value))]
        if name.startswith(("control", "ip_adapter")):
            return value
        raise InputError(
            f"{name} is a list of {len(value)} numbers with as many prompts, expected one number:"
            " whether each is for a prompt is not known; set data_parallel_degree=1"
        )

    def _take_pictures(self, name: str, type_text: str, value: Any) -> Any:
        """A list of pictures: one a prompt, the frames of a video, or references for all."""
        if "ip_adapter" in name or len(value) not in (self.batch, *self._pictures):
            return value
        nested = isinstance(value[0], (list, tuple))
        if re.search(r"video|frames", name) and not nested:
            return value
        if not nested and not re.search(r"PipelineImageInput|ndarray", type_text):
            raise InputError(
                f"{name} is a list of {len(value)} pictures with as many prompts, expected one"
                " picture: whether each is for a prompt is not known; set data_parallel_degree=1"
            )
        return value[self._slice(len(value))]

    def _refuse_batched(self, name: str, value: Any) -> Any:
        if any(entry.shape[0] > 1 for entry in value):
            raise InputError(
                f"{name} holds rows of several prompts, expected one row for all;"
                " set data_parallel_degree=1"
            )
        return value

    def _slice(self, extent: int) -> slice:
        each = extent // self.batch
        return slice(self.start * each, self.stop * each)


def _images_per_prompt(bound: inspect.BoundArguments) -> int:
    for name, parameter in bound.signature.parameters.items():
        if _PER_PROMPT_COUNT.fullmatch(name):
            value = bound.arguments.get(name, parameter.default)
            return 1 if value is None else int(value)
    return 1


def _own_generators(arguments: dict[str, Any]) -> tuple[torch.Generator, ...]:
    value = arguments.get("generator")
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _pictures_are_shared(whole: dict[str, Any], own: dict[str, Any]) -> bool:
    """True when the call has pictures and none of them was divided: one serves all prompts."""
    names = [
        name
        for name in whole
        if _PICTURE.search(name)
        and not _TEXT.search(name)
        and not _LATENT.search(name)
        and not isinstance(whole[name], (bool, int, float, str, type(None)))
    ]
    return bool(names) and all(own[name] is whole[name] for name in names)


def _type_text(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if isinstance(annotation, str) or annotation is parameter.empty:
        return annotation if isinstance(annotation, str) else ""
    return inspect.formatannotation(annotation)


def _takes_one(kinds: str, name: str, type_text: str) -> bool:
    """True where a parameter takes one value beside a list of them; by name where it does not say."""
    if not type_text:
        return "prompt" in name
    alone = re.sub(r"\b([Ll]ist|[Tt]uple)\[[^\[\]]*\]", "", type_text)
    return bool(re.search(rf"\b({kinds})\b", alone))
