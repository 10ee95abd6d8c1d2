"""The base of all generated transformer wrappers (manual, section 2).

A generated wrapper holds the rewritten `forward` and a few class attributes; everything
that does not depend on the model is here: wrapping in place, pipeline stages, the regions
of the block loops, placeholders of the stages that do not compute a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from xfuser_runtime.base_wrapper import (
    EqualsUpstream,
    swap_class,
    upstream_class,
    xFuserBaseWrapper,
)
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.distributed.runtime_state import get_runtime_state
from xfuser_runtime.layers import (
    GatheredModule,
    wrap_attention,
    wrap_gathered,
    wrap_layer,
    wrap_row_layer,
)
from xfuser_runtime.layers.base import rebind_forward
from xfuser_runtime.layers.processors import refuse_stages
from xfuser_runtime.transformers.adapters import takes_own_weights
from xfuser_runtime.transformers.kernels import prepare_kernels, run_call
from xfuser_runtime.transformers.latent_tokens import (
    LatentTokens,
    loop_shape,
    segments_of_kinds,
)
from xfuser_runtime.transformers.loading import plan_of_part
from xfuser_runtime.transformers.outputs import (
    Template,
    first_tensor,
    signature_of,
    template_of,
)
from xfuser_runtime.transformers.region import BlockRegion
from xfuser_runtime.transformers.stages import (
    EmptyBlock,
    StageLinks,
    drop_foreign_blocks,
    plan_stages,
)
from xfuser_runtime.transformers.wrapping import Wrapping


class xFuserModelBaseWrapper(xFuserBaseWrapper, metaclass=EqualsUpstream):
    """A wrapped `nn.Module`."""


class xFuserTransformerBaseWrapper(xFuserModelBaseWrapper):
    """A denoising transformer whose block loops are regions.

    Class attributes that the generated subclass sets:
        submodule_classes_to_wrap: layer classes that are wrapped outside the blocks.
        submodule_name_to_wrap: attribute names of the attention modules that work on
            sharded tokens.
        attention_streams: for each of them, by path with `*` for the block index: the
            streams that its keys hold, in the order in which they are concatenated.
        block_loops: the block lists, in the order in which `forward` runs them; none where
            every rank runs the whole model.
        attention_queries: the streams of the queries, by path, where they are not those of
            the keys.
        whole_streams: by block list, the streams of keys that every rank holds whole.
        outer_masks: attention modules whose mask is the outer product of one vector with
            itself, by path: "and" or "product".
        row_layers: convolutions over the rows of the image inside the blocks, by path: the
            stream that holds the image.
        gathered_modules: modules inside the blocks that mix tokens, by path.
        block_classes: by block list, the names of the classes that were measured.
        batch_processors: qualified names of ported processors that a pipeline sets for a
            batch that they look at as a whole.
        block_parts: by a block's path, what code outside of the loops reads of it; every
            stage keeps it.
    """

    submodule_classes_to_wrap: ClassVar[list[type[nn.Module]]] = []
    submodule_name_to_wrap: ClassVar[list[str]] = []
    attention_streams: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    block_loops: ClassVar[tuple[str, ...]] = ()
    attention_queries: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    whole_streams: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    outer_masks: ClassVar[Mapping[str, str]] = {}
    row_layers: ClassVar[Mapping[str, str]] = {}
    gathered_modules: ClassVar[Mapping[str, GatheredModule]] = {}
    block_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    batch_processors: ClassVar[tuple[str, ...]] = ()
    block_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    _state_name: ClassVar[str] = "_xfuser_wrapping"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Where upstream loads adapters, a stage loads its own blocks' part."""
        super().__init_subclass__(**kwargs)
        load = getattr(upstream_class(cls), "load_lora_adapter", None)
        if load is not None:
            cls.load_lora_adapter = takes_own_weights(load)  # type: ignore[attr-defined]

    @classmethod
    def wrap(cls, module: nn.Module) -> nn.Module:
        """Swap the class of `module` for this wrapper and wrap what it holds.

        State-dict keys, LoRA layers, hooks and device placement stay as they are.

        Raises:
            ValueError: when there are more pipeline stages than blocks, a forward hook
                would go on calling the upstream forward, the configuration made blocks
                of a class that porter has not measured, or ranks are to share a call of
                a model that each must run whole.
        """
        if isinstance(module, cls) and cls._state_name in vars(module):
            return module
        original = upstream_class(cls)
        if type(module) is not original:
            raise ValueError(
                f"a transformer of class {type(module).__name__}, expected "
                f"{original.__name__}; port the pipeline that holds it"
            )
        _check_blocks(module, cls.block_classes)
        num_stages = parallel_state.get_pipeline_parallel_world_size()
        num_shards = parallel_state.get_sequence_parallel_world_size()
        if not cls.block_loops and num_stages * num_shards > 1:
            raise ValueError(
                f"{num_stages} stages of {num_shards} ranks for one call of a "
                f"{original.__name__}, expected one rank: its port does not split it; use "
                "data or CFG parallelism"
            )
        plan = plan_of_part(module, num_stages) or plan_stages(
            module, cls.block_loops, num_stages
        )
        swap_class(module, cls)
        module.__dict__[cls._state_name] = Wrapping(plan)
        rebind_forward(module, original)
        module._wrap_submodules()
        if plan.num_stages > 1:
            drop_foreign_blocks(
                module,
                plan,
                parallel_state.get_pipeline_parallel_rank(),
                cls.block_parts,
            )
        prepare_kernels(module, cls.block_loops)
        return module

    def _wrap_submodules(self) -> None:
        for path, child in list(self.named_modules()):
            name, place = path.rpartition(".")[2], re.sub(r"\.\d+\.", ".*.", path)
            gathered = self.gathered_modules.get(place)
            if gathered is not None and gathered.matches(child):
                wrap_gathered(child, gathered)
            elif place in self.row_layers:
                wrap_row_layer(child, self.row_layers[place])
            elif name in self.submodule_name_to_wrap:
                streams = self.attention_streams.get(place)
                if streams is not None:
                    queries = self.attention_queries.get(place, streams)
                    whole = self.whole_streams.get(path.partition(".")[0], ())
                    mask = self.outer_masks.get(place)
                    wrap_attention(child, queries, streams, whole, mask)
            elif type(child) in self.submodule_classes_to_wrap:
                wrap_layer(child)

    def _forward_in_pass(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        state = get_runtime_state()
        state.enter_transformer_call()
        wrapping = self._wrapping
        if (
            parallel_state.get_sequence_parallel_world_size() == 1
            and parallel_state.get_pipeline_parallel_world_size() == 1
        ):
            forward = upstream_class(type(self)).forward
        else:
            refuse_stages(self, self.batch_processors)
            self._note_latents(first_tensor((args, kwargs)))
            if not parallel_state.is_pipeline_last_stage():
                wrapping.template = self._template(forward, args, kwargs)
        return run_call(forward, self, wrapping, args, kwargs)

    def output_template(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Template:
        """Shapes and types of what a call with these arguments returns: no block runs."""
        return self._template(type(self).forward.__wrapped__, args, kwargs)

    def _template(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Template:
        key = signature_of((args, kwargs))
        held = self._wrapping.templates.get(key)
        # The patch borders of a call come from its first region: a rank that skips the
        # first guidance branch must still learn them from it.
        if held is None or get_runtime_state().needs_patch_borders:
            self._note_latents(first_tensor((args, kwargs)))
            with parallel_state.dry_run():
                held = template_of(forward(self, *args, **kwargs))
            self._wrapping.padding = 0
            self._wrapping.templates[key] = held
        return held

    def _note_latents(self, given: torch.Tensor) -> None:
        """Remember the shape of a call's latents, and of the loop's latents in them."""
        state, shape = get_runtime_state(), tuple(given.shape)
        self._wrapping.latent_shape = self._wrapping.loop_shape = shape
        self._wrapping.padding = 0
        if state.num_patches > 1:
            if shape not in state.loop_shapes:
                state.loop_shapes[shape] = loop_shape(given, state.first_latents)
            self._wrapping.loop_shape = state.loop_shapes[shape]

    # -- what generated forwards call -------------------------------------------------

    def _begin_region(
        self,
        loop: str,
        streams: Mapping[str, int],
        latents: str | None = None,
        context: str | None = None,
        rows: Mapping[int, int] | None = None,
        row_counts: Mapping[str, int] | None = None,
        other_rows: Mapping[int, Mapping[int, int]] | None = None,
        kinds: Mapping[str, Sequence[int]] | None = None,
    ) -> BlockRegion:
        """Start the region of block list `loop`.

        Args:
            loop: attribute name of the block list.
            streams: number of tokens of each stream that reaches the blocks.
            latents: the stream whose tokens follow the latents; patches cut it.
            context: "before" or "after" where that stream holds other tokens as well.
            rows: the dimensions of the latents that count tokens, each with a token's
                extent, the one that the stream runs over last first.
            row_counts: rows of the image, by stream, where every rank must hold whole ones.
            other_rows: `rows` of latents of other numbers of dimensions, by that number.
            kinds: numbers of tokens of each kind, in order, in a stream whose blocks tell
                kinds apart by counting: each is cut by itself, as a segment of its own.
        """
        state = get_runtime_state()
        wrapping = self._wrapping
        num_patches = state.num_patches
        parts: dict[str, tuple[str, ...]] = {}
        row = 1
        if kinds:
            streams, parts = segments_of_kinds(streams, kinds, num_patches)
        elif num_patches > 1:
            rows = (other_rows or {}).get(len(wrapping.latent_shape), rows)
            held = LatentTokens.of(
                latents, rows, wrapping.latent_shape, wrapping.loop_shape
            )
            streams, parts = held.segments(
                streams, latents or "", context, wrapping.padding
            )
            if context == "after":
                rest = streams[f"{latents}.context"]
                wrapping.padding = wrapping.padding or rest
            row = held.tokens_of_a_row
        layout = TokenLayout(
            tuple(
                Segment(
                    name,
                    length,
                    row=row if name == latents else 1,
                    follows_latents=name == latents,
                    grain=_grain(length, row_counts, name),
                )
                for name, length in streams.items()
            ),
            num_patches,
            parallel_state.get_sequence_parallel_world_size(),
        )
        if num_patches > 1:
            state.adopt_patch_borders(layout, held.dim, held.extent)
        plan, stage = wrapping.plan, parallel_state.get_pipeline_parallel_rank()
        links = (
            StageLinks(plan, stage, loop, wrapping.channel())
            if plan.num_stages > 1
            else None
        )
        region = BlockRegion(
            layout=layout,
            patch=state.patch,
            shard=parallel_state.get_sequence_parallel_rank(),
            call_index=state.call_index,
            links=links,
            buffers=wrapping.buffers.setdefault((state.call_index, loop), {}),
            needs_gather=plan.reads_after(loop, stage),
            dry_run=parallel_state.is_dry_run(),
            parts=parts,
        )
        state.region = region
        return region

    def _get_patch_height_width(self) -> tuple[int, int]:
        """Height and width of the image in tokens (manual, section 2.2).

        The tail runs on whole buffers, so this is the whole image even in a patch pass.
        """
        patch_size = self.config.patch_size  # type: ignore[attr-defined]
        height, width = self._wrapping.latent_shape[-2:]
        return height // patch_size, width // patch_size

    def _placeholder(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape that `module(*inputs)` has, on a stage that does not need it."""
        key = (id(module), signature_of(inputs))
        held = self._wrapping.templates.get(key)
        if held is None:
            held = self._wrapping.templates[key] = template_of(module(*inputs))
        return first_tensor(held.zeros())

    def _zero_output(self) -> Any:
        """Zeros of the final output's shape, on a stage that is not the last: one tensor, or
        the list of one tensor a sample that some models return."""
        output = self._wrapping.template.zeros()
        if isinstance(output, Mapping):
            output = tuple(output.values())
        return output[0] if isinstance(output, tuple) else output

    def finish_sends(self) -> None:
        """Wait until the next stage has what this one handed over."""
        if self._wrapping.plan.num_stages > 1:
            self._wrapping.channel().wait()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; refused where this rank holds the blocks of one stage only."""
        if self._wrapping.plan.num_stages > 1:
            raise ValueError(
                "save_pretrained of a transformer that is split into "
                f"{self._wrapping.plan.num_stages} pipeline stages, expected whole weights; "
                "save with pipefusion_parallel_degree=1"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @property
    def _wrapping(self) -> Wrapping:
        wrapping: Wrapping = self.__dict__[self._state_name]
        return wrapping


def _grain(length: int, row_counts: Mapping[str, int] | None, stream: str) -> int:
    """Tokens of a row of the image where ranks hold whole rows, else 1."""
    if row_counts is None or stream not in row_counts:
        return 1
    return length // row_counts[stream]


def _check_blocks(module: nn.Module, classes: Mapping[str, Sequence[str]]) -> None:
    """Refuse blocks of a class that porter has not seen: they may mix tokens otherwise.

    Raises:
        ValueError: names the class.
    """
    for name, known in classes.items():
        for block in getattr(module, name):
            found = block.__class__.__name__
            if not isinstance(block, EmptyBlock) and found not in known:
                raise ValueError(
                    f"a {found} in {name}, expected {' or '.join(known)}: the port was "
                    "measured on a configuration that makes these; run without parallel modes"
                )
