"""Run a function on several ranks: processes forked from the warm test process, over gloo.

Forking costs milliseconds where starting an interpreter and importing torch costs seconds. The
parent must not have started torch's thread pool: `tests/conftest.py` keeps it to one thread.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xfuser_runtime.distributed.parallel_state import (
    destroy_distributed_environment,
    init_distributed_environment,
)


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback.

    Attributes:
        failures: what each failed rank left, by rank; ranks that were ended from outside are missing.
    """

    def __init__(self, message: str, failures: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.failures = failures or {}


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    grace: float = 1,
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` forked ranks; results in rank order.

    ``fn`` may be a closure; its result must be picklable (tensors are). Inside, the default process
    group exists and `WORLD_SIZE` and `RANK` are set as torchrun sets them; groups of modes are made
    with `initialize_model_parallel` or `prepare_environment`. Once a rank has failed, the others, which
    most likely wait for it, get ``grace`` seconds to end by themselves.

    Raises:
        RankError: a rank raised, died, or ran longer than ``timeout`` seconds. No rank is left.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(fn, rank, world_size, args, folder, sender, timeout),
                daemon=True,
            )
            with warnings.catch_warnings():
                # Python 3.12 warns of forking with threads; the parent's hold no lock that a rank needs.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(processes, pipes, timeout, grace)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(
    processes: list[Any],
    pipes: list[multiprocessing.connection.Connection],
    timeout: float,
    grace: float,
) -> list[Any]:
    """Results of all ranks; raises ``grace`` seconds after the first that fails."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        waiting = [
            p
            for rank, p in enumerate(pipes)
            if rank not in results and rank not in failures
        ]
        ready = multiprocessing.connection.wait(
            waiting, max(0.0, deadline - time.monotonic())
        )
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                ok, value = False, f"died with exit code {processes[rank].exitcode}"
            if ok:
                results[rank] = value
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + grace)
                failures[rank] = value
    if len(results) == len(pipes):
        return [results[rank] for rank in range(len(pipes))]
    if not failures:
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        raise RankError(f"ranks {missing} did not end within {timeout} s")
    text = "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
    raise RankError(text, failures)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    sender: multiprocessing.connection.Connection,
    timeout: float,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    code = 0
    try:
        init_distributed_environment(
            rank,
            world_size,
            backend="gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            timeout=timedelta(seconds=timeout),
        )
        answer = (True, fn(rank, *args))
        # A rank that leaves early closes connections that a slower one may still be making.
        dist.barrier()
        destroy_distributed_environment()
        message = pickle.dumps(answer)
    except BaseException:
        code, message = 1, pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
    # Past the parent's exit handlers, which are not this rank's to run.
    os._exit(code)
