"""Classifier-free guidance over two ranks, made at the transformer call.

Batched guidance puts both branches into one call with a doubled batch: each rank takes
its half of every doubled argument, and the outputs are gathered.  Sequential guidance
calls the transformer twice: each rank makes one of the calls, then they exchange.
The order of the halves is upstream's, so nothing after the call changes.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import all_gather
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.layers import whole_batch_processor
from xfuser_runtime.pipelines.components import wrapped_transformer
from xfuser_runtime.transformers.outputs import map_tensors, tensors_in


def split_batch(*negative_and_positive: Any) -> Any:
    """The guided batch of each (negative, positive) pair, or this rank's half of it.

    Args:
        negative_and_positive: negative, positive, negative mask, mask, ... The order is
            xDiT's; the manual's listing has the positive first.

    Returns:
        One value for one pair, a tuple for more: `cat([negative, positive])` on one rank,
        the negative on CFG rank 0 and the positive on CFG rank 1 otherwise.
    """
    pairs = list(
        zip(negative_and_positive[::2], negative_and_positive[1::2], strict=True)
    )
    if parallel_state.get_classifier_free_guidance_world_size() == 1:
        batches = [None if n is None else torch.cat([n, p], dim=0) for n, p in pairs]
    else:
        rank = parallel_state.get_classifier_free_guidance_rank()
        batches = [pair[rank] for pair in pairs]
        get_runtime_state().cfg_batch_is_split = True
    return batches[0] if len(batches) == 1 else tuple(batches)


def restore_batch(*halves: Any) -> Any:
    """Both branches of what `split_batch` cut, on every rank, for a callback to see.

    Later passes then carry whole batches, which the transformer call cuts itself.
    """
    state = get_runtime_state()
    if state.cfg_batch_is_split:
        halves = tuple(_gather_batch(half) for half in halves)
        state.cfg_batch_is_split = False
    return halves[0] if len(halves) == 1 else halves


def batched_call(
    transformer: Callable[..., Any], axes: Mapping[str, int | str], batch_size: int
) -> Callable[..., Any]:
    """`transformer`, run on this rank's branch of a doubled batch.

    Args:
        transformer: the wrapped transformer.
        axes: batch axis of every argument that guidance doubles, by parameter name with
            a dot for keys of dicts and places in lists; "items" for a list of one item a
            picture.  An argument of twice the latents' batch is halved; one of the
            latents' batch has been split already.  Where other batches are among them,
            as after a callback that ends the guidance, both ranks make the whole call; so
            they do with attention processors that are not ported, which may look at the
            whole batch.
        batch_size: batch of the latents.
    """
    if parallel_state.get_classifier_free_guidance_world_size() == 1:
        return transformer

    def call(*args: Any, **kwargs: Any) -> Any:
        state = get_runtime_state()
        forward: Any = type(wrapped_transformer(transformer)).forward  # type: ignore[attr-defined]
        bound, halves = _halved(forward, args, kwargs, axes, batch_size)
        split_before = state.cfg_batch_is_split or state.cfg_helpers_are_split
        state.cfg_helpers_are_split = False
        both = halves.are_all(split_before=split_before)
        if not both or runs_whole(transformer, split_before=split_before):
            return transformer(*args, **kwargs)
        output = transformer(*bound.args, **bound.kwargs)
        join = _gather_batch
        if not parallel_state.is_pipeline_last_stage():
            join = _twice
        return _joined(join, output, batch_size if halves.of_lists else None)

    return call


def helper_call(
    helper: Callable[..., Any], axes: Mapping[str, int | str], batch_size: int
) -> Callable[..., Any]:
    """A model that feeds the transformer, run on this rank's branch of a doubled batch.

    What it makes stays a half, and goes into this rank's half of the transformer's call:
    where each branch has a length of its own, the two fit no other way.

    Args:
        helper: the model, as upstream made it.
        axes, batch_size: as for `batched_call`.
    """
    if parallel_state.get_classifier_free_guidance_world_size() == 1:
        return helper

    def call(*args: Any, **kwargs: Any) -> Any:
        forward: Any = type(helper).forward  # type: ignore[attr-defined]
        bound, halves = _halved(forward, args, kwargs, axes, batch_size)
        if not halves.are_all(split_before=False):
            return helper(*args, **kwargs)
        return _of_branch(helper, bound)

    return call


def _of_branch(helper: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    """What a helper makes of this rank's branch."""
    get_runtime_state().cfg_helpers_are_split = True
    return helper(*bound.args, **bound.kwargs)


def _halved(
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    axes: Mapping[str, int | str],
    batch_size: int,
) -> tuple[inspect.BoundArguments, _Halves]:
    """The arguments of a call with this rank's half of each doubled one."""
    bound = _signature(forward).bind(*args, **kwargs)
    halves = _Halves(batch_size)
    for path, axis in axes.items():
        halves.take(bound.arguments, path.split("."), axis)
    return bound, halves


def runs_whole(transformer: Any, *, split_before: bool = False) -> bool:
    """Whether every rank must make both calls, or the call on both branches.

    Attention processors of some calls look at more than one of them.

    Raises:
        ValueError: there is one, and the batch was halved before the call.
    """
    wrapped = wrapped_transformer(transformer)
    found = whole_batch_processor(wrapped, wrapped.batch_processors)
    if found is None:
        return False
    name = f"Attention Processor class {type(found).__name__}"
    if split_before:
        raise ValueError(
            f"{name} is not supported by xFuser with a batch that each rank has half of;"
            " run without use_cfg_parallel"
        )
    warnings.warn(
        f"{name} looks at the whole batch, or may do so: each CFG rank computes both "
        "branches",
        stacklevel=2,
    )
    return True


def branch_call(transformer: Any, branch: int, other_runs: bool) -> Callable[..., Any]:
    """`transformer` for one of two sequential branches; the other rank runs the other one.

    Args:
        transformer: the wrapped transformer.
        branch: 0 for the call that upstream makes first.
        other_runs: the guard of the second call, known before the first.
    """
    state = get_runtime_state()
    if branch == 0:
        state.cfg_branches_are_split = (
            bool(other_runs)
            and parallel_state.get_classifier_free_guidance_world_size() == 2
            and not runs_whole(transformer)
        )
    if not state.cfg_branches_are_split:
        return transformer  # type: ignore[no-any-return]
    if parallel_state.get_classifier_free_guidance_rank() == branch:
        return transformer  # type: ignore[no-any-return]
    return skipped_call(transformer)


def skipped_call(transformer: Any) -> Callable[..., Any]:
    """A call that the other CFG rank makes: zeros of the output's shape."""

    def skipped(*args: Any, **kwargs: Any) -> Any:
        get_runtime_state().enter_transformer_call()
        return wrapped_transformer(transformer).output_template(args, kwargs).zeros()

    return skipped


def exchange_branches(first: Any, second: Any) -> Any:
    """The outputs of both branches on both ranks.

    Raises:
        ValueError: when the branches have different shapes.
    """
    state = get_runtime_state()
    if not state.cfg_branches_are_split or not parallel_state.is_pipeline_last_stage():
        return first, second
    return exchange(first, second)


def exchange(first: Any, second: Any) -> tuple[Any, Any]:
    """Both outputs on both CFG ranks, where each has made one of them.

    Args:
        first, second: a tensor each, or nested alike.

    Raises:
        ValueError: when they have different shapes.
    """
    pairs = list(zip(tensors_in(first), tensors_in(second), strict=True))
    for one, other in pairs:
        if one.shape != other.shape:
            raise ValueError(
                f"outputs of shapes {tuple(one.shape)} and {tuple(other.shape)} of the "
                "two guidance branches, expected one shape; run without use_cfg_parallel"
            )
    rank, group = (
        parallel_state.get_classifier_free_guidance_rank(),
        parallel_state.get_cfg_group(),
    )
    both = [all_gather(p[rank].unsqueeze(0), 0, (1, 1), group) for p in pairs]
    made, others = iter(both), iter(both)
    return (
        map_tensors(lambda _: next(made)[0], first),
        map_tensors(lambda _: next(others)[1], second),
    )


class _Halves:
    """Replaces doubled leaves of bound arguments by this rank's half."""

    def __init__(self, batch_size: int) -> None:
        self._extents: list[tuple[str, int]] = []
        self.of_lists = False
        self._batch_size = batch_size
        self._rank = parallel_state.get_classifier_free_guidance_rank()

    def take(self, arguments: dict[str, Any], path: list[str], axis: int | str) -> None:
        """Halve `arguments[path[0]][path[1]]...` where it is doubled."""
        key, *rest = path
        value = arguments.get(key)
        if value is None:
            return
        if rest:
            is_mapping = isinstance(value, Mapping)
            items = value.items() if is_mapping else enumerate(value)
            keys, held = zip(*items, strict=True) if value else ((), ())
            # Keys of a dict may be numbers, as those of the blocks that it belongs to.
            inner = dict(zip(map(str, keys), held, strict=True))
            self.take(inner, rest, axis)
            made = inner.values()
            arguments[key] = (
                dict(zip(keys, made, strict=True)) if is_mapping else type(value)(made)
            )
        elif isinstance(axis, str):
            arguments[key] = self._half_list(key, value)
        else:
            half = functools.partial(self._half, key, axis)
            arguments[key] = map_tensors(half, value)

    def _half(self, name: str, axis: int, leaf: torch.Tensor) -> torch.Tensor:
        if not self._is_doubled(leaf.shape[axis], name):
            return leaf
        return leaf.narrow(axis, self._rank * self._batch_size, self._batch_size)

    def _half_list(self, name: str, values: Any) -> Any:
        if not self._is_doubled(len(values), name):
            return values
        self.of_lists = True
        start = self._rank * self._batch_size
        return values[start : start + self._batch_size]

    def are_all(self, *, split_before: bool) -> bool:
        """Whether the arguments are both branches of guidance, and of nothing more.

        Args:
            split_before: some were halved before the call.

        Raises:
            ValueError: some were, and others have neither one batch nor two.
        """
        one, two = self._batch_size, 2 * self._batch_size
        if not split_before:
            return {extent for _, extent in self._extents} == {two}
        for name, extent in self._extents:
            if extent not in (one, two):
                raise ValueError(
                    f"argument {name} has a batch of {extent}, expected {one} or {two}; "
                    "run without use_cfg_parallel"
                )
        return True

    def _is_doubled(self, extent: int, name: str) -> bool:
        self._extents.append((name, extent))
        return extent == 2 * self._batch_size


def _joined(join: Callable[[Any], Any], output: Any, list_length: int | None) -> Any:
    """An output for both branches, by `join` of its tensors.

    Args:
        join: makes a tensor of both branches from this rank's.
        output: nested; tensors have the batch first.
        list_length: length of lists that hold one tensor a picture, None where there are
            none.

    Raises:
        ValueError: the pictures of a list differ in shape.
    """

    def join_list(items: list[torch.Tensor]) -> list[torch.Tensor]:
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise ValueError(
                f"outputs of shapes {sorted(shapes)} in one list, expected one shape; "
                "run without use_cfg_parallel"
            )
        return list(join(torch.stack(items)).unbind(0))

    def inside(value: Any) -> Any:
        is_list = isinstance(value, list) and len(value) == list_length
        if is_list and all(isinstance(item, torch.Tensor) for item in value):
            return join_list(value)
        if isinstance(value, dict):
            mapped = {key: inside(item) for key, item in value.items()}
            return mapped if type(value) is dict else type(value)(**mapped)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(inside(item) for item in value)
        return map_tensors(join, value)

    return inside(output)


def _twice(leaf: torch.Tensor) -> torch.Tensor:
    """Both branches of a placeholder."""
    return torch.cat([leaf, leaf])


def _gather_batch(half: Any) -> Any:
    if not isinstance(half, torch.Tensor):
        return half
    size = half.shape[0]
    return all_gather(half, 0, (size, size), parallel_state.get_cfg_group())


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())[1:]
    return signature.replace(parameters=parameters)
