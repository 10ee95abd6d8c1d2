"""Start a session on this rank, and end all ranks together when one fails.

A rank that fails while others wait for it in a collective leaves them hanging until a timeout of
many minutes. `fail_together` keeps a thread on every rank that looks at the job's store once a
second: a rank that raises writes there who it is and where it was; a rank that dies by a signal is
missed by the ranks of its host. The others then end themselves, whatever they wait for.

Exactly one rank of each host prints the message, so that eight ranks do not say it eight times.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from xfuser_runtime.config import EngineConfig
from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.distributed.runtime_state import (
    get_runtime_state,
    initialize_runtime_state,
    runtime_state_is_initialized,
)
from xfuser_runtime.errors import ConfigError, XFuserError

#: Seconds between two looks at the store.
POLL_SECONDS = 1.0
#: Seconds that a rank whose communication broke waits for the rank that caused it to say so.
SETTLE_SECONDS = 5.0
#: Looks at the store that may fail in a row before its host counts as gone.
MAX_STORE_ERRORS = 15
#: Errors that the user can act on by their message: no traceback.
_USER_ERRORS = (XFuserError, ValueError, OSError, KeyboardInterrupt)


def prepare_environment(engine_config: EngineConfig) -> None:
    """Join the process group, make the groups and start the runtime state, where not done yet.

    Raises:
        ConfigError: the degrees do not multiply to the world size, or this process has groups of
            other degrees.
    """
    parallel_config = engine_config.parallel_config
    parallel_state.init_distributed_environment(world_size=engine_config.world_size)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(parallel_config)
    elif runtime_state_is_initialized():
        before = get_runtime_state().parallel_config
        if before != parallel_config:
            raise ConfigError(
                f"a session with {before}, expected the same degrees for all pipelines of a process;"
                " call destroy_model_parallel first"
            )
    if (
        not runtime_state_is_initialized()
        or get_runtime_state().engine_config != engine_config
    ):
        initialize_runtime_state(engine_config)


@dataclass(frozen=True)
class Failure:
    """Why the job ends.

    Attributes:
        rank: the rank that failed.
        place: its pipeline stage and denoising step.
        error: what happened, one line.
        host: of the rank that tells.
        teller: the rank that tells: the failed one, or one that misses it.
    """

    rank: int
    place: str
    error: str
    host: str
    teller: int

    def __str__(self) -> str:
        return f"error: rank {self.rank} ({self.place}): {self.error}"


def place_of_this_rank() -> str:
    """Pipeline stage and denoising step, in words."""
    stage = parallel_state.get_pipeline_parallel_rank()
    stages = parallel_state.get_pipeline_parallel_world_size()
    text = f"stage {stage} of {stages}"
    if not runtime_state_is_initialized() or get_runtime_state().step < 0:
        return f"{text}, outside the denoising loop"
    state = get_runtime_state()
    text = f"{text}, step {state.step} of {state.num_steps}"
    return text if state.patch is None else f"{text}, patch {state.patch}"


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Within the block, a rank that raises or dies ends all ranks; none returns.

    Every rank enters and leaves it. Ranks end with exit code 1 (or that of a `SystemExit`), within a
    few seconds, also where they wait in a collective. One process alone prints its error alike.
    """
    parallel_state.init_distributed_environment()
    watch = _Watch() if dist.is_initialized() else None
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code not in (None, 0):
            _end_failed(error, code if isinstance(code, int) else 1, watch)
        if watch is not None:
            watch.finish()
        raise
    else:
        if watch is not None:
            watch.finish()


def _end_failed(error: BaseException, code: int, watch: _Watch | None) -> NoReturn:
    """Tell the others, print, end."""
    if not isinstance(error, _USER_ERRORS + (SystemExit,)) or _is_communication(error):
        details = traceback.format_exc()
    else:
        details = ""
    place, words = place_of_this_rank(), _words(error)
    if watch is None:
        _exit(details + str(Failure(0, place, words, "", 0)), code)
    if _is_communication(error):
        # Most likely the echo of another rank's end, which is the one worth telling.
        watch.settle()
    watch.tell(Failure(watch.rank, place, words, watch.host, watch.rank), details)
    _exit("", code)


def _words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"ended with {error.code}"
    if isinstance(error, XFuserError):
        return str(error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def _is_communication(error: BaseException) -> bool:
    """True for what a collective raises when a peer went away (gloo has no type of its own)."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))
    )


def _exit(message: str, code: int) -> NoReturn:
    """End now: communicators that wait for dead peers would hang a regular interpreter exit."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Watch:
    """This rank's eyes on the others: a thread, and the keys of the job's store."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.host = _host_identity()
        self._world_size = dist.get_world_size()
        # A connection of its own: on the shared one, a rank that waits for a key blocks all others.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.PrefixStore("fail_together", store)
        self._store.set(f"process/{self.rank}", json.dumps([self.host, os.getpid()]))
        self._neighbours: dict[int, int] = {}
        self._unknown = set(range(self._world_size)) - {self.rank}
        self._places: dict[int, str] = {}
        self._finished = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="fail_together", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """This rank is through; it may end without being missed."""
        self._store.set(f"done/{self.rank}", "1")
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # Rank 0 may host the store, which the others still look at.
            others = [f"done/{rank}" for rank in range(1, self._world_size)]
            while not self._store.check(others):
                time.sleep(POLL_SECONDS / 10)
        self._finished.set()
        self._thread.join()

    def tell(self, failure: Failure, details: str = "") -> None:
        """Make ``failure`` the job's and print it, unless the job has one."""
        told = failure
        with contextlib.suppress(RuntimeError):
            text = json.dumps(asdict(failure))
            told = Failure(**json.loads(self._store.compare_set("failure", "", text)))
        if told != failure:
            self._echo(told)
            return
        print(f"{details}{failure}", file=sys.stderr, flush=True)
        if self.rank == 0:
            # The store may end with this process; let the others read it first.
            time.sleep(2 * POLL_SECONDS)

    def _echo(self, failure: Failure) -> None:
        """Print what another rank told, once more for each other host."""
        if failure.host != self.host:
            print(failure, file=sys.stderr)

    def settle(self) -> None:
        """Wait until a failure is told, `SETTLE_SECONDS` at most."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self._store.check(["failure"]):
                time.sleep(POLL_SECONDS / 10)

    def _run(self) -> None:
        errors = 0
        while not self._finished.wait(POLL_SECONDS):
            try:
                self._look()
                errors = 0
            except RuntimeError:
                # Read the store's end as a failure only when a neighbour is dead or it stays away.
                errors += 1
                missing = self._dead_neighbours()
                if missing or errors > MAX_STORE_ERRORS:
                    self._end_missing(missing[0] if missing else 0)

    def _look(self) -> None:
        """One look: share this rank's place, end if a failure is told or a neighbour is dead."""
        place = place_of_this_rank()
        if place != self._places.get(self.rank):
            self._store.set(f"place/{self.rank}", place)
            self._places[self.rank] = place
        if self._store.check(["failure"]):
            failure = Failure(**json.loads(self._store.get("failure")))
            if failure.teller == self.rank:
                return  # the thread that told it is ending this process
            self._echo(failure)
            _exit("", 1)
        for rank in sorted(self._unknown):
            if self._store.check([f"process/{rank}"]):
                host, process = json.loads(self._store.get(f"process/{rank}"))
                self._unknown.discard(rank)
                if host == self.host:
                    self._neighbours[rank] = process
        for rank in self._neighbours:
            if self._store.check([f"place/{rank}"]):
                self._places[rank] = self._store.get(f"place/{rank}").decode()
        for rank in self._dead_neighbours():
            if self._store.check([f"done/{rank}"]):
                del self._neighbours[rank]
                continue
            self._end_missing(rank)

    def _dead_neighbours(self) -> list[int]:
        return [r for r, process in self._neighbours.items() if not _is_alive(process)]

    def _end_missing(self, rank: int) -> NoReturn:
        place = f"last seen in {self._places.get(rank, 'its start')}"
        error = "died without a word, expected to finish; look for a signal or a lack of memory"
        self.tell(Failure(rank, place, error, self.host, self.rank))
        _exit("", 1)


def _host_identity() -> str:
    """Equal for two processes exactly when they see each other's process ids."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        # A killed process stays in the table until its parent asks; Z is its state until then.
        return (
            Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            not in "ZX"
        )
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
