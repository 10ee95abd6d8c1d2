"""From a stock pipeline to the pipeline of each engine."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.layouts import CONTEXT_PARALLEL, OURS, STOCK, XDIT, Layout
from benchmarks.models import BenchmarkModel

#: Block lists that regional compilation covers where diffusers does not name the blocks.
_BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


def prepare(
    pipeline: Any, model: BenchmarkModel, layout: Layout, *, generated: str, steps: int
) -> Any:
    """The callable pipeline of `layout.engine`; a collective call."""
    engines: dict[str, Callable[..., Any]] = {
        STOCK: _stock,
        CONTEXT_PARALLEL: _context_parallel,
        XDIT: _xdit,
        OURS: _ours,
    }
    return engines[layout.engine](
        pipeline, model, layout, generated=generated, steps=steps
    )


def has_xfuser() -> bool:
    """Whether xDiT's package is installed."""
    return importlib.util.find_spec("xfuser") is not None


def has_context_parallel(model: BenchmarkModel) -> bool:
    """Whether diffusers can split this transformer's sequence by itself."""
    diffusers = importlib.import_module("diffusers")
    cls = getattr(diffusers, model.transformer)
    return getattr(cls, "_cp_plan", None) is not None and hasattr(
        diffusers, "ContextParallelConfig"
    )


def _stock(pipeline: Any, model: BenchmarkModel, layout: Layout, **_: Any) -> Any:
    if layout.exact_norms:
        F.layer_norm = _exact_layer_norm
    if layout.compiled:
        _compile_blocks(pipeline.transformer)
    return pipeline


def _context_parallel(
    pipeline: Any, model: BenchmarkModel, layout: Layout, **_: Any
) -> Any:
    diffusers = importlib.import_module("diffusers")
    _join(layout)
    transformer = pipeline.transformer
    if "ring_degree" in layout.degrees:
        # The default kernel returns no log-sum-exp.
        transformer.set_attention_backend("_native_cudnn")
    transformer.enable_parallelism(
        config=diffusers.ContextParallelConfig(**layout.degrees)
    )
    if layout.compiled:
        _compile_blocks(transformer)
    return pipeline


def _ours(
    pipeline: Any, model: BenchmarkModel, layout: Layout, *, generated: str, steps: int
) -> Any:
    from xfuser_runtime import load_pipeline_class, xFuserArgs

    engine_config, _ = xFuserArgs(
        **layout.degrees,
        use_torch_compile=layout.compiled,
        use_fused_kernels=layout.fused,
        use_cuda_graph=layout.graph,
        num_inference_steps=steps,
        allow_unproven=True,
    ).create_config()
    cls = load_pipeline_class(model.pipeline, generated=generated)
    return cls(pipeline, engine_config)


def _xdit(
    pipeline: Any, model: BenchmarkModel, layout: Layout, *, steps: int, **_: Any
) -> Any:
    # It joins the process group itself, and asks for one that it has not joined.
    with contextlib.suppress(ImportError):
        # Compiled it asks for a version, which flash-attn-4 alone does not have.
        vars(importlib.import_module("flash_attn")).setdefault("__version__", "0")
    xfuser = importlib.import_module("xfuser")
    degrees = dict(layout.degrees)
    stages = degrees.get("pipefusion_parallel_degree", 1)
    engine_args = xfuser.xFuserArgs(
        model=model.pipeline,
        num_pipeline_patch=stages if stages > 1 else None,
        warmup_steps=1,
        use_torch_compile=layout.compiled,
        num_inference_steps=steps,
        **degrees,
    )
    engine_config, _ = engine_args.create_config()
    return getattr(xfuser, f"xFuser{model.pipeline}")(pipeline, engine_config)


_layer_norm = F.layer_norm


def _exact_layer_norm(
    rows: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm` that computes in doubles."""
    wide = (None if x is None else x.double() for x in (weight, bias))
    normed = _layer_norm(rows.double(), list(normalized_shape), *wide, eps)
    return normed.to(rows.dtype)


def _join(layout: Layout) -> None:
    """Join the default process group, one rank a device."""
    from xfuser_runtime.distributed import init_distributed_environment

    init_distributed_environment(world_size=layout.num_ranks)


def _compile_blocks(transformer: torch.nn.Module) -> None:
    if getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks()
        return
    for name in _BLOCK_LISTS:
        for block in getattr(transformer, name, []):
            block.compile()
