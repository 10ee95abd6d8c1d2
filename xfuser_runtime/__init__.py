"""The parallel runtime that generated ports run on.

The public names are imported when first used: configuration and `--help` need no diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Public name -> module that defines it.
_EXPORTS = {
    name: f"xfuser_runtime.{module}"
    for module, names in {
        "args": ("xFuserArgs",),
        "base_wrapper": ("xFuserBaseWrapper",),
        "config": ("EngineConfig", "InputConfig", "ParallelConfig", "RuntimeConfig"),
        "distributed": (
            "get_cfg_group",
            "get_classifier_free_guidance_rank",
            "get_classifier_free_guidance_world_size",
            "get_dp_group",
            "get_pipeline_parallel_rank",
            "get_pipeline_parallel_world_size",
            "get_pp_group",
            "get_runtime_state",
            "get_sequence_parallel_rank",
            "get_sequence_parallel_world_size",
            "get_sp_group",
            "get_world_group",
            "init_distributed_environment",
            "initialize_model_parallel",
            "initialize_runtime_state",
            "is_dp_last_group",
            "is_pipeline_first_stage",
            "is_pipeline_last_stage",
        ),
        "layers": ("xFuserLayerBaseWrapper", "xFuserLayerWrappersRegister"),
        "loader": ("load_pipeline_class",),
        "pipelines": ("xFuserPipelineBaseWrapper", "xFuserPipelineWrapperRegister"),
        "schedulers": ("xFuserSchedulerBaseWrapper", "xFuserSchedulerWrappersRegister"),
        "transformers": (
            "xFuserModelBaseWrapper",
            "xFuserTransformerBaseWrapper",
            "xFuserTransformerWrappersRegister",
        ),
    }.items()
    for name in names
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
