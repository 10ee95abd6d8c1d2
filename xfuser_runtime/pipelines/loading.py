"""Which components of a checkpoint a rank loads in part, or without weights."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from xfuser_runtime.config import EngineConfig
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.launch import prepare_environment
from xfuser_runtime.encoders import is_encoder_class, load_empty, names_before
from xfuser_runtime.transformers.loading import load_part
from xfuser_runtime.transformers.register import xFuserTransformerWrappersRegister

logger = logging.getLogger(__name__)

#: Options of a pipeline's `from_pretrained` that every component's takes with the same meaning.
_SHARED = (
    "torch_dtype",
    "dtype",
    "use_safetensors",
    "low_cpu_mem_usage",
    "local_files_only",
    "disable_mmap",
)
#: Options that place or change components in ways of the pipeline's own.
_WHOLE = ("device_map", "quantization_config", "dduf_file", "max_memory")


def own_components(
    original: Any, path: str | Path, engine_config: EngineConfig, options: Any
) -> dict[str, Any]:
    """`options` of `original.from_pretrained`, with what this rank holds in part.

    These are transformers, loaded by stage, and encoders that the first rank of the replica
    alone is to hold, made without weights. What is already among the options stays as it is. Where a part cannot be loaded the options
    come back alone, the log says why, and each rank reads the whole checkpoint.

    Args:
        original: pipeline class of diffusers.
        path: as `from_pretrained` takes it.
        engine_config: the session's.
        options: keyword arguments of `from_pretrained`.
    """
    options = dict(options)
    by_stage = engine_config.parallel_config.pipefusion_parallel_degree > 1
    if not by_stage and not engine_config.runtime_config.text_encoders_on_first_rank:
        return options
    reason = _reason_against(path, options)
    if reason is not None:
        logger.warning("every rank reads the whole checkpoint: %s", reason)
        return options
    prepare_environment(engine_config)
    classes = dict(_classes(original, Path(path)))
    if by_stage:
        options |= _transformers(classes, Path(path), options)
    if engine_config.runtime_config.text_encoders_on_first_rank:
        options |= _encoders(original, classes, Path(path), options)
    return options


def _transformers(
    classes: Mapping[str, type], path: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The transformers with the blocks of this rank's stage."""
    loaded: dict[str, Any] = {}
    for name, cls in classes.items():
        wrapper: Any = xFuserTransformerWrappersRegister.find(cls)
        if name in options or wrapper is None or not wrapper.block_loops:
            continue
        loaded[name] = load_part(
            cls,
            wrapper.block_loops,
            path,
            parts=wrapper.block_parts,
            subfolder=name,
            **_options_of(name, path / name, options),
        )
    return loaded


def _encoders(
    original: Any,
    classes: Mapping[str, type],
    path: Path,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The encoders without weights, on all ranks of a replica but the first."""
    if parallel_state.get_replica_group().rank_in_group == 0:
        return {}
    ported = {
        name
        for name, cls in classes.items()
        if xFuserTransformerWrappersRegister.find(cls) is not None
    }
    before = names_before(original.model_cpu_offload_seq, ported)
    made: dict[str, Any] = {}
    for name, cls in classes.items():
        used = before is None or name in before
        if name not in options and used and is_encoder_class(cls):
            model = load_empty(cls, path / name)
            if model is not None:
                made[name] = model
    return made


def _reason_against(path: str | Path, options: Mapping[str, Any]) -> str | None:
    if not Path(path).is_dir():
        return f"{path} is no folder; download it first"
    for name in _WHOLE:
        if options.get(name) is not None:
            return f"{name} is set"
    return None


def _classes(original: Any, folder: Path) -> Iterator[tuple[str, type]]:
    """Name and class of each component in the index of a checkpoint."""
    for name, entry in original.load_config(folder).items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or None in entry:
            continue
        library, class_name = entry
        # A pipeline's own module, or code in the checkpoint: stock loads these.
        cls = getattr(_import(library), class_name, None)
        if inspect.isclass(cls):
            yield name, cls


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        return None


def _options_of(name: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a component's `from_pretrained` gets from the pipeline's."""
    found = {key: options[key] for key in _SHARED if options.get(key) is not None}
    for key in ("torch_dtype", "dtype"):
        if isinstance(found.get(key), dict):
            by_name = found[key]
            found[key] = by_name.get(name, by_name.get("default", torch.float32))
    variant = options.get("variant")
    if variant is not None and any(folder.glob(f"*.{variant}.*")):
        found["variant"] = variant
    return found
