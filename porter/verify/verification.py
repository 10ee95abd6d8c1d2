"""Verify a port: stock and oracle here, the ranks in the replay, verdicts from both."""

from __future__ import annotations

import importlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from porter import source
from porter.analysis.facts import Axes
from porter.analysis.pipeline_modes import shared_latents
from porter.errors import PorterError
from porter.lock import read_lock
from porter.port import read_pipeline
from porter.shrink import make_checkpoint
from porter.shrink.sizes import BLOCKS
from porter.shrink.torchvision_names import provide
from porter.verify.branches import computed_apart
from porter.verify.cases import SABOTAGED, STEPS, Case, cases_for, fresh, packed
from porter.verify.floor import (
    Reference,
    doubled_key,
    lost_keys,
    lost_mask,
    reference,
    run_replaced,
)
from porter.verify.gate import relative_error, sabotage_shows
from porter.verify.geometry import OracleRefusal
from porter.verify.hooks import kept_processors
from porter.verify.modes import Mode, all_modes
from porter.verify.oracle import DisplacedPatches
from porter.verify.processes import RunRequest, RunResult, start_replay
from porter.verify.sabotage import Mechanisms, faults_for
from porter.verify.verdict import Measurement, ModeVerdict, Sabotage, Verification

#: `SABOTAGED` where stock fails with two prompts.
SABOTAGED_ALONE = Case(1, 1, 1, True)
_STOCK_RAISES = "stock raises"
#: Seconds for one group of ranks; a hanging port must not hold up the rest.
TIMEOUT = 120.0


def verify_pipeline(
    name: str,
    *,
    generated: Path,
    modes: Sequence[Mode] | None = None,
    cases: Sequence[Case] | None = None,
    checkpoint: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Compare the port of a pipeline with stock diffusers in every mode.

    Args:
        name: class name of the upstream pipeline, or `package.module:Class`.
        generated: folder of the ports.
        modes: what to verify; None takes all modes.
        cases: the calls to compare, `SABOTAGED` among them; None takes all that the
            pipeline can run.
        checkpoint: a tiny checkpoint folder; None makes one with random weights.
        say: called with a line about what is being done.

    Raises:
        PorterError: the pipeline cannot be loaded or run, or the ranks cannot start.
    """
    started = time.monotonic()
    target = source.load(name).reference
    module, _, class_name = target.partition(":")
    pipeline_class = getattr(importlib.import_module(module), class_name)
    provide()
    with tempfile.TemporaryDirectory(prefix="porter-verify-") as folder, _one_thread():
        if checkpoint is None:
            say(f"making a tiny checkpoint of {class_name}")
            checkpoint = Path(folder) / "checkpoint"
            # A stage needs a block, at least.
            stages = max((mode.pp for mode in modes or ()), default=1)
            make_checkpoint(pipeline_class, checkpoint, blocks=max(BLOCKS, stages))
        pipeline = pipeline_class.from_pretrained(checkpoint)
        pipeline.set_progress_bar_config(disable=True)
        subject = _Subject(
            pipeline,
            say,
            wanted=cases_for(pipeline) if cases is None else tuple(cases),
            has=_mechanisms(name, generated),
            branches=_branches(name, generated),
        )
        verdicts = _verdicts(
            subject,
            all_modes() if modes is None else modes,
            Path(folder),
            name,
            target,
            checkpoint,
            generated,
        )
    seconds = time.monotonic() - started
    return Verification(class_name, verdicts, subject.rejected, seconds)


def _mechanisms(name: str, generated: Path) -> Mechanisms:
    """What the port does with split tokens and latents: from its lock and its source."""
    entry = read_lock(generated).ports.get(name, {})
    loop = read_pipeline(name)[1].rewritten_loop
    facts = entry.get("facts", {})
    return Mechanisms.of(
        facts,
        latents=1 if loop is None else len(loop.latents),
        shares=shared_latents(loop, facts.get("helpers", ())),
    )


def _branches(name: str, generated: Path) -> Axes:
    """The doubled axes of guided calls whose branches show whether they run apart."""
    facts = read_lock(generated).ports.get(name, {}).get("facts", {})
    return computed_apart(facts.get("cfg_style", ""), facts.get("cfg_axes", {}))


@dataclass
class _Subject:
    """The stock pipeline, its cases, and what it answers to them."""

    pipeline: Any
    say: Callable[[str], None]
    wanted: tuple[Case, ...]
    rejected: dict[str, str] = field(default_factory=dict)
    references: dict[Case, Reference] = field(default_factory=dict)
    has: Mechanisms = field(default_factory=Mechanisms)
    displaced: dict[Any, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    sabotaged: Case = SABOTAGED
    branches: Axes = field(default_factory=dict)

    def __post_init__(self) -> None:
        for case in self.wanted:
            self._refer(case)
        if self.rejected.get(SABOTAGED.name, "").startswith(_STOCK_RAISES):
            self.sabotaged = SABOTAGED_ALONE
            self._refer(SABOTAGED_ALONE)
        name = self.sabotaged.name
        if self.sabotaged not in self.references:
            raise PorterError(
                f"case {name}: {self.rejected.get(name, 'missing')}",
                expected="a case that every mode can be proven on",
                todo="make the tiny checkpoint's weights livelier",
            )

    def _refer(self, case: Case) -> None:
        """Run stock on `case`; leave the case out where it can prove nothing."""
        self.say(f"stock: {case.name}")
        call = fresh(self.pipeline, case)
        try:
            with kept_processors(self.pipeline):
                found = reference(self.pipeline, call)
        except Exception as error:
            if case.callback is None and case.batch == 1 and not case.more:
                raise PorterError(
                    f"{type(self.pipeline).__name__} fails on {case.name}: {error}",
                    expected="a stock run",
                ) from error
            # Upstream's own limit: two prompts, or a callback that its loop does not stand.
            self.rejected[case.name] = (
                f"{_STOCK_RAISES} {type(error).__name__}: {error}"
            )
            return
        faults = (lost_keys, doubled_key) if found.attends_to_itself else (doubled_key,)
        for fault in faults:
            moved = self._stock_sabotage(call, fault, found)
            if not sabotage_shows(moved, found.floor):
                self.rejected[case.name] = f"{fault.__name__} moves it by {moved:.1e}"
                return
        if case == self.sabotaged:
            moved = self._stock_sabotage(call, lost_mask, found)
            self.has = replace(self.has, masks=sabotage_shows(moved, found.floor))
        self.references[case] = found

    def _stock_sabotage(self, call: Any, fault: Any, found: Reference) -> float:
        return relative_error(run_replaced(self.pipeline, call, fault), found.outputs)

    def cases(self, mode: Mode) -> tuple[Case, ...]:
        """The cases that `mode` has something to split on."""
        ported = self.has.batch_processors
        return tuple(c for c in self.references if c.suits(mode, ported=ported))

    def sabotaged_in(self, mode: Mode) -> Case:
        """The case that faults are injected into."""
        if self.sabotaged.suits(mode):
            return self.sabotaged
        plain = (c for c in self.cases(mode) if c.callback is None and not c.more)
        return next(plain, self.sabotaged)

    def displaced_outputs(
        self, plan: DisplacedPatches, case: Case
    ) -> tuple[torch.Tensor, ...]:
        """What PipeFusion should return for `case`; products of modes share it."""
        key = (plan, case)
        if key not in self.displaced:
            call = fresh(self.pipeline, case)
            self.displaced[key] = plan.run(self.pipeline, call, case.batch)
        return self.displaced[key]

    def callback_steps(self, case: Case) -> list[int] | None:
        """The steps at which stock calls the case's callback, if it counts its calls."""
        kwargs = case.kwargs(self.pipeline)
        counter: Any = kwargs.get("callback_on_step_end", kwargs.get("callback"))
        if not hasattr(counter, "calls"):
            return None
        self.pipeline(**kwargs)
        return list(counter.calls)


@dataclass(frozen=True)
class _Answers:
    """The right answers in one mode, by case."""

    reference: str
    outputs: Mapping[Case, tuple[torch.Tensor, ...]]


def _verdicts(
    subject: _Subject,
    modes: Sequence[Mode],
    folder: Path,
    name: str,
    target: str,
    checkpoint: Path,
    generated: Path,
) -> tuple[ModeVerdict, ...]:
    calls = {
        _call_name(case): packed(case.kwargs(subject.pipeline), case.callback)
        for case in subject.references
    }
    job = folder / "job"
    job.mkdir()
    runs = list(_runs(subject, modes))
    with start_replay(
        job,
        port=name,
        pipeline=target,
        checkpoint=checkpoint,
        generated=generated,
        calls=calls,
        runs=runs,
    ) as replay:
        regions = _regions(replay.describe(), subject)
        answers = {mode: _answers(subject, mode, regions) for mode in modes}
        results: dict[str, RunResult] = {}
        for result in replay.results():
            results[result.name] = result
            outcome = result.error or f"{result.seconds:.1f} s"
            subject.say(f"[{len(results)}/{len(runs)}] {result.name}: {outcome}")
    steps = {case: subject.callback_steps(case) for case in subject.references}
    return tuple(
        _verdict(subject, mode, answers[mode], results, steps) for mode in modes
    )


def _runs(subject: _Subject, modes: Sequence[Mode]) -> Iterator[RunRequest]:
    for mode in modes:
        cases = subject.cases(mode)
        if not cases:
            continue
        arguments = mode.arguments(STEPS)
        names = tuple(_call_name(case) for case in cases)
        yield RunRequest(
            _run_name(mode), mode.world_size, arguments, names, timeout=TIMEOUT
        )
        for fault in faults_for(mode, subject.has):
            yield RunRequest(
                _run_name(mode, fault),
                mode.world_size,
                arguments,
                (_call_name(subject.sabotaged_in(mode)),),
                fault,
                TIMEOUT,
            )


def _regions(port: Mapping[str, Any], subject: _Subject) -> tuple[str, ...] | None:
    """The block lists that the port cuts; None leaves the oracle to its own measure."""
    loops = [tuple(names) for names in port.get("block_loops", {}).values()]
    return loops[0] if len(set(loops)) == 1 else None


def _answers(
    subject: _Subject, mode: Mode, regions: tuple[str, ...] | None
) -> _Answers | OracleRefusal:
    stock = {case: subject.references[case].outputs for case in subject.cases(mode)}
    if not mode.is_displaced:
        return _Answers("stock", stock)
    branches = tuple(sorted(subject.branches.items())) if mode.cfg > 1 else ()
    plan = DisplacedPatches(
        mode.patches,
        mode.warmup_steps(STEPS),
        regions,
        branches,
        whole_steps=subject.has.shares == "steps",
    )
    try:
        displaced = {case: subject.displaced_outputs(plan, case) for case in stock}
    except OracleRefusal as refusal:
        return refusal
    return _Answers("oracle", displaced)


def _verdict(
    subject: _Subject,
    mode: Mode,
    answers: _Answers | OracleRefusal,
    results: Mapping[str, RunResult],
    steps: Mapping[Case, list[int] | None],
) -> ModeVerdict:
    if isinstance(answers, OracleRefusal):
        return ModeVerdict(mode, "oracle", failure=f"the oracle refuses: {answers}")
    result = results.get(_run_name(mode))
    if result is None or result.error is not None:
        failure = None if result is None else result.error
        return ModeVerdict(mode, answers.reference, failure=failure)
    measurements = tuple(
        Measurement(
            case.name,
            relative_error(result.outputs[_call_name(case)], answers.outputs[case]),
            subject.references[case].floor,
            all(s == steps[case] for s in result.callback_steps[_call_name(case)]),
        )
        for case in subject.cases(mode)
    )
    sabotages = tuple(
        _sabotage(subject, mode, fault, results[_run_name(mode, fault)], answers)
        for fault in faults_for(mode, subject.has)
    )
    return ModeVerdict(mode, answers.reference, measurements, sabotages)


def _sabotage(
    subject: _Subject,
    mode: Mode,
    fault: str,
    result: RunResult,
    answers: _Answers,
) -> Sabotage:
    case = subject.sabotaged_in(mode)
    floor = subject.references[case].floor
    if result.error is not None:
        return Sabotage(fault, math.nan, floor, f"the ranks stopped: {result.error}")
    outputs = result.outputs[_call_name(case)]
    error = relative_error(outputs, answers.outputs[case])
    note = "" if result.reached else "the broken function was never called"
    return Sabotage(fault, error, floor, note)


def _call_name(case: Case) -> str:
    return case.name.replace(" ", "-")


def _run_name(mode: Mode, fault: str | None = None) -> str:
    name = mode.name.replace(" x ", ".").replace("/", "-")
    return f"{name}--{fault}" if fault else name


@contextmanager
def _one_thread() -> Iterator[None]:
    """Ranks have one thread, and bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
