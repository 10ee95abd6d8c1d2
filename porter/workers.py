"""Many classes at once, each in a process that may fail without stopping the others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from porter.errors import InternalError, PorterError
from porter.port import Port, lock_entry, make_port, render_ports

PROCESSES = 2
#: Seconds for one port; a model that never returns must not hold up the rest.
TIMEOUT = 600.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one class.

    Attributes:
        name: as it was asked for.
        result: what was made of it, why it is refused, or how porter itself failed.
        seconds: wall-clock time.
    """

    name: str
    result: Result | PorterError
    seconds: float


def port_all(
    names: Sequence[str], *, processes: int = PROCESSES, timeout: float = TIMEOUT
) -> Iterator[Outcome[Port]]:
    """Ports classes and renders each: see `in_processes`."""
    return in_processes(_port, names, processes=processes, timeout=timeout)


def in_processes(
    task: Callable[[str], Result],
    names: Sequence[str],
    *,
    processes: int = PROCESSES,
    timeout: float,
) -> Iterator[Outcome[Result]]:
    """Does a task for each class; the outcomes come in the order in which they get ready.

    An exception that is no `PorterError`, a process that dies and a class that takes
    longer than `timeout` seconds each become an `InternalError` of that class alone.

    Args:
        task: makes something that pickles of a name; runs in a forked process.
        names: the classes.
        processes: how many work at a time.
        timeout: seconds for one class.
    """
    waiting = deque(names)
    idle: list[_Worker[Result]] = []
    busy: dict[Connection, _Worker[Result]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else _Worker(task)
                worker.begin(waiting.popleft(), timeout)
                busy[worker.connection] = worker
            first = min(worker.deadline for worker in busy.values())
            ready = set(wait(list(busy), max(0.0, first - time.monotonic())))
            late = {c for c, w in busy.items() if w.deadline <= time.monotonic()}
            for connection in [c for c in busy if c in ready | late]:
                worker = busy.pop(connection)
                yield worker.outcome(timed_out=connection not in ready)
                if worker.is_alive:
                    idle.append(worker)
    finally:
        for worker in (*idle, *busy.values()):
            worker.stop()


class _Worker(Generic[Result]):
    """A process that does a task for one class at a time."""

    def __init__(self, task: Callable[[str], Result]) -> None:
        # A fork keeps sys.path, and the modules that are imported already.
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(task, other, self.connection), daemon=True
        )
        self._process.start()
        other.close()
        self.is_alive = True
        self.deadline = 0.0
        self._name = ""
        self._started = 0.0

    def begin(self, name: str, timeout: float) -> None:
        """Hand over one class."""
        self._name, self._started = name, time.monotonic()
        self.deadline = self._started + timeout
        self.connection.send(name)

    def outcome(self, *, timed_out: bool) -> Outcome[Result]:
        """The answer, or what happened instead of one; the process has ended then."""
        result: Result | PorterError
        seconds = time.monotonic() - self._started
        if timed_out:
            self.stop()
            result = InternalError(f"no answer for {seconds:.0f} s")
        else:
            try:
                result = pickle.loads(self.connection.recv_bytes())
            except EOFError:
                self.stop()
                code = self._process.exitcode
                result = InternalError(f"the process ended with exit code {code}")
        return Outcome(self._name, result, seconds)

    def stop(self) -> None:
        """End the process."""
        self.is_alive = False
        self.connection.close()
        if self._process.exitcode is None:
            self._process.join(0.5)
        if self._process.exitcode is None:
            self._process.kill()
        self._process.join()


def _serve(
    task: Callable[[str], Any], connection: Connection, other: Connection
) -> None:
    """Answers what comes through the connection until it closes."""
    # The fork copied the parent's end as well: the pipe closes with the parent only then.
    other.close()
    # Processes share the cores; and stdout is for results, not for what models print.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.dup2(2, 1)
    while True:
        try:
            name = connection.recv()
        except (EOFError, OSError):
            return
        connection.send_bytes(_answer(task, name))


def _answer(task: Callable[[str], Any], name: str) -> bytes:
    try:
        return pickle.dumps(task(name))
    except PorterError as error:
        return pickle.dumps(error)
    except Exception as error:
        found = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
        return pickle.dumps(InternalError(found, traceback.format_exc()))


def _port(name: str) -> Port:
    port = make_port(name)
    # All that the one process that writes will do, so that it cannot fail there.
    lock_entry(port, render_ports([port]))
    return port
