"""The process groups of this rank: who it shares which work with.

Ranks are laid out over five degrees, ulysses fastest, in xDiT's order:
    rank = (((dp * C + cfg) * P + pp) * R + ring) * U + ulysses
Every accessor also works before initialisation and in a single process: one rank, rank 0, first
and last stage at once. The state is one frozen object that init and destroy replace.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.errors import ConfigError

#: Mesh dimensions, slowest first.
MESH_DIMS = ("data", "cfg", "pipeline", "ring", "ulysses")


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, as this rank sees them.

    Attributes:
        ranks: global ranks, in group order.
        rank_in_group: this rank's index in ``ranks``.
        process_group: None in a group of one.
        feedback_group: the same ranks on a second communicator (pipeline group only): what goes back
            from the last stage to the first must not queue behind what goes forward.
    """

    ranks: tuple[int, ...] = (0,)
    rank_in_group: int = 0
    process_group: dist.ProcessGroup | None = None
    feedback_group: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def name(self) -> str:
        """Name of the process group, as torch's functional collectives take it."""
        assert self.process_group is not None, "a group of one communicates with nobody"
        return str(self.process_group.group_name)


@dataclass(frozen=True)
class _ParallelState:
    """All groups of this rank; the defaults are those of a single process."""

    initialized: bool = False
    dry_run: bool = False
    world: Group = Group()
    data: Group = Group()
    cfg: Group = Group()
    pipeline: Group = Group()
    ring: Group = Group()
    ulysses: Group = Group()
    sequence: Group = Group()
    replica: Group = Group()


_STATE = _ParallelState()


def init_distributed_environment(
    rank: int | None = None,
    world_size: int | None = None,
    backend: str | None = None,
    init_method: str | None = None,
    timeout: timedelta | None = None,
) -> None:
    """Join torch's default process group; nothing happens for one process or when already joined.

    Args:
        rank, world_size: default to torchrun's ``RANK`` and ``WORLD_SIZE``, else to one process.
        backend: default gloo for CPU tensors plus, where there is a GPU, NCCL for CUDA tensors.
        init_method: default ``env://``.
        timeout: of a collective; torch's default when None.

    Raises:
        ConfigError: the process group exists with another world size.
    """
    world_size = (
        int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    )
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    if dist.is_initialized():
        if dist.get_world_size() != world_size:
            raise ConfigError(
                f"a process group of {dist.get_world_size()} ranks, expected {world_size};"
                " destroy it first or start as many ranks as it has"
            )
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(
            int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count()))
        )
        backend = backend or "cpu:gloo,cuda:nccl"
    if world_size > 1:
        dist.init_process_group(
            backend=backend or "gloo",
            init_method=init_method or "env://",
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )


def initialize_model_parallel(parallel_config: ParallelConfig) -> None:
    """Make the groups that ``parallel_config`` asks for. A collective call.

    Raises:
        ConfigError: already initialised, or the degrees do not multiply to the world size (checked
            before anything is communicated).
    """
    global _STATE
    if _STATE.initialized:
        raise ConfigError(
            "model parallelism is initialised, expected not yet; call destroy_model_parallel first"
        )
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    parallel_config.check(world_size)
    _STATE = _ParallelState(initialized=True, dry_run=_STATE.dry_run)
    if world_size > 1:
        _STATE = replace(_make_groups(parallel_config), dry_run=_STATE.dry_run)


def _make_groups(config: ParallelConfig) -> _ParallelState:
    shape = (
        config.data_parallel_degree,
        config.cfg_degree,
        config.pipefusion_parallel_degree,
        config.ring_degree,
        config.ulysses_degree,
    )
    device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    mesh = init_device_mesh(device, shape, mesh_dim_names=MESH_DIMS)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = torch.arange(world_size).view(shape)

    def along(dim: int) -> Group:
        lines = ranks.movedim(dim, -1).reshape(-1, shape[dim])
        line = next(tuple(line) for line in lines.tolist() if rank in line)
        process_group = mesh.get_group(dim) if len(line) > 1 else None
        return Group(line, line.index(rank), process_group)

    data, cfg, pipeline, ring, ulysses = (along(dim) for dim in range(len(shape)))
    feedback = _new_group(ranks.movedim(2, -1).reshape(-1, shape[2]))
    sequence = ring if ulysses.world_size == 1 else ulysses
    if ring.world_size > 1 and ulysses.world_size > 1:
        sequence = _new_group(ranks.view(-1, config.sp_degree))
    world = Group(tuple(range(world_size)), rank, dist.group.WORLD)
    replica = (
        world
        if config.data_parallel_degree == 1
        else _new_group(ranks.view(shape[0], -1))
    )
    return _ParallelState(
        initialized=True,
        world=world,
        data=data,
        cfg=cfg,
        pipeline=replace(pipeline, feedback_group=feedback.process_group),
        ring=ring,
        ulysses=ulysses,
        sequence=sequence,
        replica=replica,
    )


def _new_group(lines: torch.Tensor) -> Group:
    """The group of this rank among ``lines`` (n, size) that partition the ranks; collective."""
    rank = dist.get_rank()
    own = Group((rank,))
    for line in lines.tolist():
        # Every rank takes part in making every group, groups of one are not worth making.
        process_group = dist.new_group(line) if len(line) > 1 else None
        if rank in line:
            own = Group(tuple(line), line.index(rank), process_group)
    return own


def destroy_model_parallel() -> None:
    """Forget the groups; the accessors answer as in a single process again."""
    global _STATE
    state, _STATE = _STATE, _ParallelState()
    if not dist.is_initialized():
        return
    groups = (state.data, state.cfg, state.pipeline, state.ring, state.ulysses)
    own = {
        id(g.process_group): g.process_group
        for g in (*groups, state.sequence, state.replica)
    }
    own[id(state.pipeline.feedback_group)] = state.pipeline.feedback_group
    for process_group in own.values():
        if process_group is not None and process_group is not dist.group.WORLD:
            dist.destroy_process_group(process_group)


def destroy_distributed_environment() -> None:
    """Leave torch's default process group, and with it all groups."""
    destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def model_parallel_is_initialized() -> bool:
    """True between ``initialize_model_parallel`` and ``destroy_model_parallel``."""
    return _STATE.initialized


def set_dry_run(dry_run: bool) -> None:
    """In a dry run each rank counts as first and last stage, so that all code runs for its shapes."""
    global _STATE
    _STATE = replace(_STATE, dry_run=dry_run)


def is_dry_run() -> bool:
    """True while shapes are being worked out."""
    return _STATE.dry_run


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """``set_dry_run(True)`` for the length of a ``with`` block."""
    before = is_dry_run()
    set_dry_run(True)
    try:
        yield
    finally:
        set_dry_run(before)


def get_world_group() -> Group:
    """All ranks."""
    return _STATE.world


def get_dp_group() -> Group:
    """Ranks at the same place of each data-parallel replica."""
    return _STATE.data


def get_cfg_group() -> Group:
    """The ranks that compute the two branches of classifier-free guidance, unconditional first."""
    return _STATE.cfg


def get_pp_group() -> Group:
    """The pipeline stages; has a ``feedback_group``."""
    return _STATE.pipeline


def get_sp_group() -> Group:
    """Ranks that share one sequence: ring times ulysses, ulysses fastest."""
    return _STATE.sequence


def get_ring_group() -> Group:
    """The ring of this rank's ulysses place."""
    return _STATE.ring


def get_ulysses_group() -> Group:
    """Ranks that exchange heads for rows."""
    return _STATE.ulysses


def get_replica_group() -> Group:
    """All ranks of one data-parallel replica."""
    return _STATE.replica


def get_data_parallel_world_size() -> int:
    """Number of replicas."""
    return _STATE.data.world_size


def get_data_parallel_rank() -> int:
    """This rank's replica."""
    return _STATE.data.rank_in_group


def get_classifier_free_guidance_world_size() -> int:
    """2 where the guidance branches run on different ranks, else 1."""
    return _STATE.cfg.world_size


def get_classifier_free_guidance_rank() -> int:
    """0: unconditional (or both) branch, 1: conditional branch."""
    return _STATE.cfg.rank_in_group


def get_pipeline_parallel_world_size() -> int:
    """Number of stages."""
    return _STATE.pipeline.world_size


def get_pipeline_parallel_rank() -> int:
    """This rank's stage."""
    return _STATE.pipeline.rank_in_group


def get_sequence_parallel_world_size() -> int:
    """Number of shards of a sequence: ring times ulysses degree."""
    return _STATE.sequence.world_size


def get_sequence_parallel_rank() -> int:
    """This rank's shard."""
    return _STATE.sequence.rank_in_group


def get_ring_parallel_world_size() -> int:
    """Ring degree."""
    return _STATE.ring.world_size


def get_ring_parallel_rank() -> int:
    """Place in the ring."""
    return _STATE.ring.rank_in_group


def get_ulysses_parallel_world_size() -> int:
    """Ulysses degree."""
    return _STATE.ulysses.world_size


def get_ulysses_parallel_rank() -> int:
    """Place in the ulysses group."""
    return _STATE.ulysses.rank_in_group


def is_pipeline_first_stage() -> bool:
    """True on ranks that patchify; True everywhere in a dry run."""
    return _STATE.dry_run or _STATE.pipeline.rank_in_group == 0


def is_pipeline_last_stage() -> bool:
    """True on ranks that unpatchify; True everywhere in a dry run."""
    return (
        _STATE.dry_run
        or _STATE.pipeline.rank_in_group == _STATE.pipeline.world_size - 1
    )


def is_dp_last_group() -> bool:
    """True on the last rank of each replica, the one that returns the output."""
    return _STATE.replica.rank_in_group == _STATE.replica.world_size - 1
