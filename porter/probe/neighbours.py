"""Do the modules beside the blocks in a loop's body map each token by itself?

The body runs on a rank's part of the streams, and blocks alone have kernels that hear of
other ranks' tokens.  So every other module that the body calls runs again on each half of
its tokens: its outputs must be that half of what it gave for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import libcst as cst
import torch
from torch import nn

from porter.analysis.block_loops import BlockLoop
from porter.analysis.mixing import TokenCut
from porter.parsed import dotted, find, walk
from porter.probe.cuts import Shard, Unlike, cut_of
from porter.probe.leaves import tensor_leaves
from porter.probe.sharded_block import bound_arguments, part_of

#: Ways of splitting in which a rank has a part of the tokens.
OF_TOKENS = ("ulysses", "ring", "pipefusion")


def mixing_neighbour(
    model: nn.Module,
    loop: BlockLoop,
    lengths: Mapping[str, int],
    run: Callable[[], Any],
) -> str:
    """The attribute of a module beside the blocks that mixes tokens, or ''.

    Args:
        model: the stock model.
        loop: one of its loops.
        lengths: of the streams that are cut, in that run.
        run: runs the model.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = bound_arguments(module, args, kwargs)
            if name not in found and not _maps_tokens(module, given, output, lengths):
                found.append(name)

        return look

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name in dict.fromkeys(_called(loop))
        for module in _modules(getattr(model, name, None))
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _called(loop: BlockLoop) -> Iterator[str]:
    """Attributes of `self` that the body calls, by themselves or by item."""
    dead = {part for test in loop.checkpoints for part in walk(test.body)}
    for call in find(loop.node.body, cst.Call):
        held = call.func
        while isinstance(held, cst.Subscript):
            held = held.value
        name = dotted(held)
        if call not in dead and name.startswith("self.") and name.count(".") == 1:
            yield name.removeprefix("self.")


def _modules(held: Any) -> tuple[nn.Module, ...]:
    if isinstance(held, nn.ModuleList | nn.ModuleDict):
        return tuple(held.children())
    return (held,) if isinstance(held, nn.Module) else ()


def _maps_tokens(
    module: nn.Module,
    given: Mapping[str, Any],
    output: Any,
    lengths: Mapping[str, int],
) -> bool:
    """Whether a half of its tokens gives that half of its outputs."""
    cuts = {
        path: cut
        for path, leaf in tensor_leaves(given)
        if (cut := _cut(leaf, lengths)) is not None
    }
    return not cuts or all(
        _gives_part(module, given, output, cuts, shard) for shard in _halves(lengths)
    )


def _halves(lengths: Mapping[str, int]) -> Iterator[Shard]:
    for first in (True, False):
        yield Shard(
            {
                name: (0, (length + 1) // 2) if first else ((length + 1) // 2, length)
                for name, length in lengths.items()
            },
            lengths,
            {},
        )


def _cut(leaf: torch.Tensor, lengths: Mapping[str, int]) -> TokenCut | None:
    """The first dimension, the batch apart, with as many indices as a stream has tokens."""
    for streams in (*((name,) for name in lengths), tuple(lengths)):
        total = sum(lengths[name] for name in streams)
        for dim in range(1, leaf.ndim):
            if leaf.shape[dim] == total:
                return TokenCut(dim, streams)
    return None


def _gives_part(
    module: nn.Module,
    given: Mapping[str, Any],
    output: Any,
    cuts: Mapping[str, TokenCut],
    shard: Shard,
) -> bool:
    local = {name: part_of(value, cuts, shard, name) for name, value in given.items()}
    try:
        # Its forward alone: hooks are the watcher's.
        found = dict(tensor_leaves(module.forward(**local)))
        for path, leaf in tensor_leaves(output):
            cut_of(leaf, found[path], shard)
    except Unlike:
        return False
    except Exception:  # noqa: BLE001  whatever a module does with too few tokens
        return False
    return True
