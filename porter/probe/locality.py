"""Does a block's part on a rank give the rank's part of the whole block's result?

Attention kernels are the runtime's; everything else in a block must map each token by
itself.  So every block runs whole and then once for each of two simulated ranks, on their
rows alone, with kernel results taken from the whole run.  The first module whose inputs
are the rank's part of the whole run's while its outputs are not mixes tokens.  It gets one
of the remedies below and the ranks run again, until their outputs are right or nothing is
left to blame; then the port is refused, with the module's name.

Remedies, cheapest first: the expressions of an attention processor that sum over tokens
are summed over the ranks; a convolution over rows of the image exchanges its halo; any
other module runs on gathered tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from porter.analysis.mixing import Gathered, TokenCut
from porter.errors import Refusal
from porter.probe.cuts import Shard, Unlike, cut_of
from porter.probe.rank_run import (
    BlockCall,
    RankInput,
    RankRun,
    Remedies,
    Tokens,
    class_name,
    is_gathered,
    starred,
)
from porter.probe.sharded_block import BlockRunner, Place, Trace, Use
from porter.probe.token_sums import ProcessorSums


def measure_blocks(
    calls: Sequence[BlockCall], tokens: Tokens, remedies: Remedies
) -> None:
    """Add the remedies that make every block right on part of the tokens.

    Raises:
        Refusal: a block mixes tokens in a way that has no remedy.
    """
    for call in calls:
        _BlockProbe(call, tokens, remedies).measure()


class _BlockProbe:
    def __init__(self, call: BlockCall, tokens: Tokens, remedies: Remedies) -> None:
        self._call = call
        self._tokens = tokens
        self._remedies = remedies
        self._modules = dict(call.block.named_modules())
        self._whole = Trace()

    def measure(self) -> None:
        """Find remedies until both ranks are right."""
        limit = 2 * len(self._modules) + 2
        for _ in range(limit):
            self._whole = self._run_whole()
            if not any(self._remedied(rank) for rank in self._tokens.ranks):
                return
        raise self._refusal("a block whose mixing of tokens has no end", "")

    def _run_whole(self) -> Trace:
        with ProcessorSums.recorded(self._sums()):
            trace = BlockRunner(self._call.block, lambda _, call: call.run(), {}).run(
                self._call.arguments
            )
        if trace.error is not None:
            raise trace.error
        return trace

    # One rank.

    def _remedied(self, rank: RankInput) -> bool:
        """True when a new remedy was found; False when the rank's outputs are right."""
        shard = rank.shard
        run = RankRun(self._call, self._tokens, self._remedies, self._whole, rank)
        trace = run.run(self._sums())
        if run.new_remedy:
            return True
        place = self._blamed(trace, shard)
        if place is not None:
            return self._remedy(place, trace, shard)
        if trace.error is not None:
            raise self._refusal(
                f"a block that fails on part of its tokens ({_line(trace.error)})", ""
            )
        assert trace.outputs is not None and self._whole.outputs is not None
        for path, whole in self._whole.outputs.items():
            local = trace.outputs.get(path)
            if local is None or not _fits(whole, local, shard):
                raise self._refusal(run.problem or "a block that mixes tokens", "")
        return False

    def _blamed(self, trace: Trace, shard: Shard) -> Place | None:
        """The first module with right inputs and wrong outputs."""
        for place, use in trace.uses.items():
            whole = self._whole.uses.get(place)
            if whole is None or self._cuts(whole.inputs, use.inputs, shard) is None:
                continue
            if use.outputs is None or (
                whole.outputs is not None
                and self._cuts(whole.outputs, use.outputs, shard) is None
            ):
                return place
        return None

    def _cuts(
        self,
        whole: Mapping[str, torch.Tensor],
        local: Mapping[str, torch.Tensor],
        shard: Shard,
    ) -> dict[str, TokenCut] | None:
        """How all tensors are cut; None when one of them is no part of the whole's."""
        if whole.keys() != local.keys():
            return None
        found = {}
        for path, tensor in whole.items():
            try:
                cut = cut_of(tensor, local[path], shard)
            except Unlike:
                return None
            if cut is not None:
                found[path] = cut
        return found

    # Remedies.

    def _sums(self) -> dict[str, tuple[nn.Module, ProcessorSums]]:
        """The modules whose processors sum over tokens, by path."""
        return {
            path: (module, sums)
            for path, module in self._modules.items()
            for sums in self._remedies.token_sums.values()
            if sums.fits(module)
        }

    def _remedy(self, place: Place, trace: Trace, shard: Shard) -> bool:
        path = place[0]
        module, key = self._modules[path], starred(path)
        use, whole = trace.uses[place], self._whole.uses[place]
        inputs = self._cuts(whole.inputs, use.inputs, shard)
        assert inputs is not None
        if path in self._remedies.row_layers or is_gathered(
            module, path, self._remedies
        ):
            raise self._refusal(f"{type(module).__name__} {key} that mixes tokens", "")
        processor = type(getattr(module, "processor", None))
        sums = ProcessorSums.of(module)
        if (
            sums is not None
            and processor not in self._remedies.token_sums
            and self._measured_sums(path, sums)
        ):
            self._remedies.token_sums[processor] = sums
            self._remedies.summing.add(path)
            return True
        # Sums that do not make it right alone are not needed where tokens are gathered.
        self._remedies.token_sums.pop(processor, None)
        stream = _row_stream(module, inputs)
        if stream is not None:
            self._remedies.row_layers[path] = stream
            return True
        if not inputs or whole.others != use.others:
            raise self._refusal(
                f"{type(module).__name__} {key} that counts or mixes tokens in a way that"
                " is not measured",
                "modules that map tokens by themselves",
            )
        outputs = self._output_cuts(whole, use, inputs, shard)
        self._remedies.gathered[path] = Gathered(class_name(module), inputs, outputs)
        return True

    def _measured_sums(self, path: str, sums: ProcessorSums) -> bool:
        """Whether the processor has expressions that are sums over the ranks."""
        module = self._modules[path]
        runs = []
        for rank in (None, *self._tokens.ranks):
            with sums.watched(module) as seen:
                if rank is None:
                    self._run_whole()
                else:
                    RankRun(
                        self._call, self._tokens, self._remedies, self._whole, rank
                    ).run(self._sums())
            runs.append(seen)
        return sums.take_sums(runs)

    def _output_cuts(
        self, whole: Use, use: Use, inputs: Mapping[str, TokenCut], shard: Shard
    ) -> dict[str, TokenCut]:
        """How a gathered module's outputs are cut, like its inputs where that fits."""
        found = {}
        outputs = whole.outputs or {}
        for path, tensor in outputs.items():
            cuts = [
                cut
                for cut in dict.fromkeys(inputs.values())
                for cut in _like(cut, tensor, shard)
            ]
            if use.outputs is not None and path in use.outputs:
                local = use.outputs[path]
                if local.shape == tensor.shape and _fits(tensor, local, shard):
                    continue
                fitting = shard.candidates(tensor.shape, local.shape)
                cuts = [cut for cut in cuts if cut in fitting] or fitting
            if len({cut.dim for cut in cuts}) != 1:
                raise self._refusal(
                    f"a module whose output of shape {tuple(tensor.shape)} holds tokens in"
                    " an unknown place",
                    "one dimension of tokens",
                )
            found[path] = cuts[0]
        return found

    def _refusal(self, found: str, expected: str) -> Refusal:
        return Refusal(
            found,
            expected=expected or "blocks that map tokens by themselves",
            where=self._tokens.where,
        )


def _like(cut: TokenCut, tensor: torch.Tensor, shard: Shard) -> Iterator[TokenCut]:
    """The same cut on the dimensions of a tensor where it has the right extent."""
    total = sum(
        shard.lengths[name] // (shard.grains[name] if cut.rows else 1)
        for name in cut.streams
    )
    for dim, extent in enumerate(tensor.shape):
        if extent == total * cut.repeats:
            yield TokenCut(dim, cut.streams, cut.rows, cut.repeats)


def _row_stream(module: nn.Module, inputs: Mapping[str, TokenCut]) -> str | None:
    """The stream whose rows a convolution of the same size mixes."""
    if type(module) is not nn.Conv2d or module.stride[0] != 1:
        return None
    (cut,) = inputs.values() if len(inputs) == 1 else (None,)
    if cut is None or not cut.rows or (cut.dim, cut.repeats) != (2, 1):
        return None
    return cut.streams[0] if len(cut.streams) == 1 else None


def _fits(whole: torch.Tensor, local: torch.Tensor, shard: Shard) -> bool:
    try:
        cut_of(whole, local, shard)
    except Unlike:
        return False
    return True


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
