"""Random numbers that do not depend on how the work is split.

Two rules make a parallel run draw what one process draws: all ranks start a call with the
same random state, and a data-parallel replica draws for the whole batch and keeps its own
rows.  Shapes: `B` is the batch (prompts, before `num_images_per_prompt`).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xfuser_runtime.distributed.collectives import broadcast_object
from xfuser_runtime.distributed.parallel_state import Group
from xfuser_runtime.errors import InputError

# How each drawing function of torch learns its shape.
_SIZED = ("randn", "rand", "randint", "randperm")
_LIKE = ("randn_like", "rand_like", "randint_like")
_FROM_VALUES = ("normal", "bernoulli", "multinomial", "poisson")
_IN_PLACE = (
    "normal_",
    "uniform_",
    "random_",
    "exponential_",
    "bernoulli_",
    "cauchy_",
    "geometric_",
    "log_normal_",
)


@dataclass(frozen=True)
class Draw:
    """One call of a drawing function.

    Attributes:
        name: name of the function in `torch`, or of the method of `torch.Tensor`.
        function: the function itself.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    name: str
    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def generator(self) -> torch.Generator | None:
        """The generator that this draw advances; None for the global one."""
        generator: torch.Generator | None = self.kwargs.get("generator")
        return generator

    @property
    def in_place(self) -> bool:
        """True for a method that fills the tensor it is called on."""
        return self.name in _IN_PLACE

    def __call__(self) -> torch.Tensor:
        """Draw as the caller asked."""
        return self.function(*self.args, **self.kwargs)


@contextmanager
def intercept_draws(handler: Callable[[Draw], torch.Tensor]) -> Iterator[None]:
    """Let `handler` answer the draws that this thread makes inside the context.

    The drawing functions of `torch` are replaced, rather than a `TorchFunctionMode`
    entered: a mode costs Python time for every operation of the model and is seen by
    torch.compile, while draws are few and stand outside of compiled code.
    """
    owner = threading.get_ident()

    def replacement(name: str, function: Callable[..., torch.Tensor]) -> Any:
        @functools.wraps(function)
        def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
            if threading.get_ident() != owner:
                return function(*args, **kwargs)
            return handler(Draw(name, function, args, kwargs))

        return draw

    with ExitStack() as undo:
        for place, names in (
            (torch, _SIZED + _LIKE + _FROM_VALUES),
            (torch.Tensor, _IN_PLACE),
        ):
            for name in names:
                inherited = name not in vars(place)
                function = getattr(place, name)
                setattr(place, name, replacement(name, function))
                if inherited:
                    undo.callback(delattr, place, name)
                else:
                    undo.callback(setattr, place, name, function)
        yield


def find_generators(*values: Any) -> list[torch.Generator]:
    """The distinct generators among `values` and in the containers that they hold."""
    found: dict[int, torch.Generator] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, torch.Generator):
            found.setdefault(id(value), value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return list(found.values())


def random_states(generators: Sequence[torch.Generator]) -> list[torch.Tensor]:
    """States of the global CPU and CUDA generators, then of `generators`."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states + [generator.get_state() for generator in generators]


def set_random_states(
    states: Sequence[torch.Tensor], generators: Sequence[torch.Generator]
) -> None:
    """Put back what :func:`random_states` returned, on this rank or another."""
    rest = list(states)
    torch.set_rng_state(rest.pop(0))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rest.pop(0))
    for generator, state in zip(generators, rest, strict=True):
        generator.set_state(state)


@contextmanager
def same_randomness(group: Group, *values: Any) -> Iterator[None]:
    """Run a call in which all ranks of `group` draw what its first rank would draw.

    Args:
        group: ranks that run the same call.
        values: arguments of the call; generators in them are set alike as well.

    Raises:
        InputError: when the ranks pass different numbers or kinds of generators.
    """
    if group.world_size > 1:
        generators = find_generators(*values)
        kinds = [generator.device.type for generator in generators]
        theirs, states = broadcast_object((kinds, random_states(generators)), group)
        if theirs != kinds:
            raise InputError(
                f"generators on {kinds or 'no device'} on rank {group.rank_in_group} and "
                f"on {theirs or 'no device'} on the first rank of its group, expected the "
                "same on all; pass the same arguments on every rank"
            )
        set_random_states(states, generators)
    yield


@contextmanager
def rows_of_whole_batch(
    start: int,
    stop: int,
    batch: int,
    *,
    own_generators: Sequence[torch.Generator] = (),
    shared_posterior: bool = False,
) -> Iterator[None]:
    """Run a replica's part of a batch with the random numbers of the whole batch.

    A draw whose leading extent is a multiple `m` of the replica's `stop - start` samples
    is made for `m * B` rows, of which the replica keeps `m * start` to `m * stop`: the
    order that `num_images_per_prompt` gives.  Any other draw is shared by the batch and
    made as it stands.

    Args:
        start: first sample of this replica.
        stop: one past its last sample.
        batch: samples of the whole batch, `B`.
        own_generators: generators that belong to one sample each (the user's list): what
            they draw is the sample's already.
        shared_posterior: one image serves all samples, so what the VAE's posterior draws
            does not grow with the batch.

    Raises:
        InputError: when the replica has no sample, for a draw whose distribution depends
            on the other replicas' values, or for one that upstream makes with the
            generator of a sample of another replica.
    """
    local = stop - start
    if not 0 <= start < stop <= batch:
        raise InputError(
            f"samples {start} to {stop} of a batch of {batch}, expected at least one "
            "inside the batch; use no more data-parallel replicas than samples"
        )
    own = {id(generator) for generator in own_generators}

    def draw_rows(draw: Draw) -> torch.Tensor:
        if id(draw.generator) in own:
            if (shared_posterior or len(own) > local) and _in_posterior():
                raise InputError(
                    f"{len(own)} generators for {local} samples whose images are encoded "
                    "with random numbers, expected one for each image, since upstream "
                    "takes them in the order of the images; pass one generator"
                )
            return draw()
        if shared_posterior and _in_posterior():
            return draw()
        extent = _leading_extent(draw)
        if extent is None or extent == 0 or extent % local:
            return draw()
        factor = extent // local
        whole = _draw_whole(draw, factor * batch)
        rows = whole[factor * start : factor * stop]
        return draw.args[0].copy_(rows) if draw.in_place else rows.clone()

    if local == batch:
        yield
        return
    with intercept_draws(draw_rows):
        yield


def _in_posterior() -> bool:
    # The caller of `randn_tensor` is the posterior: an object with a mode to sample about.
    frame = sys._getframe(1)
    for _ in range(8):
        back = frame.f_back
        if back is None:
            return False
        frame = back
        if frame.f_code.co_name == "sample" and hasattr(
            frame.f_locals.get("self"), "mode"
        ):
            return True
    return False


def _leading_extent(draw: Draw) -> int | None:
    if draw.name == "randperm":
        return None
    if draw.in_place or draw.name in _LIKE:
        shape = draw.args[0].shape
    else:
        shape = _size(draw)[1]
        if shape is None:
            values = [v for v in draw.args[:2] if isinstance(v, torch.Tensor)]
            shape = values[0].shape if values else ()
    return int(shape[0]) if len(shape) else None


def _size(draw: Draw) -> tuple[int | str | None, Sequence[int] | None]:
    # Where the size stands (position, or keyword) and the size; None where values give it.
    if "size" in draw.kwargs:
        return "size", draw.kwargs["size"]
    for position, value in enumerate(draw.args):
        if isinstance(value, (tuple, list, torch.Size)):
            return position, value
    if draw.name in ("randn", "rand"):
        return None, draw.args
    return None, None


def _draw_whole(draw: Draw, extent: int) -> torch.Tensor:
    if draw.name in _LIKE or draw.in_place:
        # `cat` keeps the memory format, which decides the order of the numbers.
        whole = torch.cat([draw.args[0][:1]] * extent)
        return draw.function(whole, *draw.args[1:], **draw.kwargs)
    place, size = _size(draw)
    if size is None or "out" in draw.kwargs:
        raise InputError(
            f"torch.{draw.name} from values of this replica's samples, expected a draw "
            "that needs no other replica's values; run without data parallelism"
        )
    whole_size = (extent, *size[1:])
    if place is None:
        return draw.function(*whole_size, **draw.kwargs)
    if place == "size":
        return draw.function(*draw.args, **{**draw.kwargs, "size": whole_size})
    args = list(draw.args)
    args[int(place)] = whole_size
    return draw.function(*args, **draw.kwargs)
