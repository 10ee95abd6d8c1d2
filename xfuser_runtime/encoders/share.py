"""Which components of a pipeline are encoders, and how they come to be on one rank alone."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xfuser_runtime.base_wrapper import upstream_class_of_instance
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.collectives import gather_objects
from xfuser_runtime.encoders.absent import Sharing, take_weights_away
from xfuser_runtime.encoders.calls import share_module, sharing_of
from xfuser_runtime.errors import NotSupportedError, StateError
from xfuser_runtime.transformers.register import xFuserTransformerWrappersRegister

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Description:
    """What ranks compare of an encoder.

    Attributes:
        reason: why it cannot be shared, empty where it can.
        class_name: of the encoder.
        shapes, dtypes: of its parameters and buffers, by name.
    """

    reason: str
    class_name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]


def is_encoder_class(cls: Any) -> bool:
    """True for a model of the package transformers that no port splits.

    Models that diffusers derives from transformers' (safety checkers, for example) are no
    encoders: pipelines call them after the loop, where ranks go different ways.
    """
    return (
        inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__.split(".")[0] == "transformers"
        and xFuserTransformerWrappersRegister.find(cls) is None
    )


def names_before(sequence: str | None, transformers: set[str]) -> set[str] | None:
    """The components that a pipeline uses before its transformer.

    Args:
        sequence: the pipeline's `model_cpu_offload_seq`, in the order of use.
        transformers: names of the components that are ported transformers.

    Returns:
        Names, or None where the sequence says nothing.
    """
    names = (sequence or "").split("->")
    places = [place for place, name in enumerate(names) if name in transformers]
    return set(names[: places[0]]) if places else None


def share_encoders(modules: Mapping[str, nn.Module], sequence: str | None) -> None:
    """Leave the encoders of a pipeline on the first rank of each replica alone.

    A collective call of the replica. The memory of the other ranks' weights is freed. An
    encoder that is shared already, or a replica of one rank, stays as it is.

    Args:
        modules: of the pipeline, by name.
        sequence: the pipeline's `model_cpu_offload_seq`.

    Raises:
        NotSupportedError: an encoder cannot be shared, on any rank: it has hooks or
            adapters, or stands inside of another module.
        StateError: the ranks hold different encoders.
    """
    group = parallel_state.get_replica_group()
    if group.world_size == 1:
        return
    encoders = dict(_unshared(modules, sequence))
    own = {name: _describe(name, module) for name, module in encoders.items()}
    # All ranks learn of every refusal: one that raised alone would leave the others waiting.
    described = gather_objects(own, group)
    for each in described:
        for description in each.values():
            if description.reason:
                raise NotSupportedError(description.reason)
    _check_alike(described, group.ranks)
    for name, module in encoders.items():
        _share(name, module, group.rank_in_group == 0, described[0][name].dtypes)


def _unshared(
    modules: Mapping[str, nn.Module], sequence: str | None
) -> Iterator[tuple[str, nn.Module]]:
    ported = {name for name, module in modules.items() if _is_ported(module)}
    before = names_before(sequence, ported)
    for name, module in modules.items():
        if name in ported or sharing_of(module) is not None:
            continue
        if not any(isinstance(part, PreTrainedModel) for part in module.modules()):
            continue
        if before is not None and name not in before:
            logger.info("%s is whole on every rank: not used before the loop", name)
        elif _stays_whole(module):
            logger.info("%s is whole on every rank: not of transformers", name)
        else:
            yield name, module


def _is_ported(module: nn.Module) -> bool:
    """A transformer of a port, wrapped or not yet, perhaps one level down."""
    return any(
        xFuserTransformerWrappersRegister.find(upstream_class_of_instance(part))
        is not None
        for part in module.modules()
    )


def _stays_whole(module: nn.Module) -> bool:
    """A class of diffusers, which other parts of a pipeline may use in ways of their own."""
    return type(module).__module__.split(".")[0] == "diffusers"


def _describe(name: str, module: nn.Module) -> _Description:
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return _Description(
        reason=_reason_against(name, module),
        class_name=type(module).__name__,
        shapes={path: tuple(tensor.shape) for path, tensor in tensors},
        dtypes={path: tensor.dtype for path, tensor in tensors},
    )


def _reason_against(name: str, module: nn.Module) -> str:
    """One line that says why an encoder cannot be shared; empty where it can."""
    found = ""
    if not isinstance(module, PreTrainedModel):
        found = f"inside a {type(module).__name__}"
    elif getattr(module, "_hf_peft_config_loaded", False):
        found = "with adapters"
    for part in module.modules():
        kind = type(part).__module__.split(".")[0]
        if kind == "peft":
            found = found or "with adapters"
        elif "_hf_hook" in vars(part):
            found = found or "with hooks of accelerate (offloading)"
        elif "forward" in vars(part):
            found = found or "with a forward of its own"
        elif any(_is_foreign(hook) for hook in _hooks(part)):
            found = found or "with forward hooks"
    if not found:
        return ""
    return (
        f"text_encoders_on_first_rank with {name} {found}, expected a plain model of "
        "transformers; wrap the pipeline first, or run without the option"
    )


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_foreign(hook: Any) -> bool:
    """A hook that is not transformers' own (it records hidden states with hooks)."""
    return str(getattr(hook, "__module__", "")).split(".")[0] != "transformers"


def _check_alike(
    described: list[dict[str, _Description]], ranks: tuple[int, ...]
) -> None:
    first = described[0]
    for rank, each in zip(ranks, described, strict=True):
        if each.keys() != first.keys():
            raise StateError(
                f"encoders {sorted(each)} on rank {rank} and {sorted(first)} on rank "
                f"{ranks[0]}, expected the same; load the same pipeline on every rank"
            )
        for name, own in each.items():
            theirs = first[name]
            if own.class_name != theirs.class_name or own.shapes != theirs.shapes:
                raise StateError(
                    f"{name} of class {own.class_name} on rank {rank}, whose weights are not "
                    f"those of the {theirs.class_name} on rank {ranks[0]}, expected the same "
                    "model; load the same pipeline on every rank"
                )


def _share(
    name: str,
    encoder: nn.Module,
    holds_weights: bool,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    sharing = Sharing(name, holds_weights, _device_of(encoder))
    for path, module in encoder.named_modules():
        share_module(module, f"{name}.{path}" if path else name, sharing)
    if not holds_weights:
        take_weights_away(encoder, sharing, dtypes)


def _device_of(encoder: nn.Module) -> torch.device:
    """Where an encoder is; one that was loaded empty is where loading puts models."""
    for tensor in encoder.parameters():
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")
