"""The command line: one short function a command.

Exit codes: 0 fine, 1 drift or refused, 2 error.
"""

from __future__ import annotations

import atexit
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from porter.errors import InternalError, PorterError
from porter.generate import Plan, drift, plan, plan_all
from porter.report import Report, diff_json, port_json, state

app = typer.Typer(
    name="porter",
    help="Ports diffusers' transformer pipelines to a parallel runtime by rule.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Names = Annotated[
    list[str] | None,
    typer.Argument(help="pipeline classes, or package.module:ClassName"),
]
Output = Annotated[Path, typer.Option(help="folder of the ports and porter.lock")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Traceback = Annotated[bool, typer.Option(help="show tracebacks of errors")]
GENERATED = Path("generated")


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Registers a function that returns an exit code; errors become one line."""

    def register(function: Callable[..., int]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            try:
                code = function(**options)
            except PorterError as error:
                if options.get("traceback"):
                    raise
                Report().error(error)
                code = error.exit_code
            except Exception as error:
                if options.get("traceback"):
                    raise
                found = f"{type(error).__name__}: {error}".splitlines()[0]
                todo = "this is a fault of porter; --traceback shows where"
                Report().error(PorterError(found, todo=todo))
                code = 2
            raise typer.Exit(code)

        app.command(name)(run)
        return run

    return register


@command("add-model")
def add_model(
    names: Names = None,
    output: Output = GENERATED,
    check: Annotated[bool, typer.Option(help="write nothing; 1 if it would")] = False,
    diff: Annotated[bool, typer.Option(help="write nothing; show the diff")] = False,
    every: Annotated[bool, typer.Option("--all", help="all pipelines")] = False,
    with_: Annotated[
        Path | None, typer.Option("--with", help="a file with a subclass of the port")
    ] = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> int:
    """Port pipelines: read the installed source, rewrite it, write the files."""
    from porter.source import pipeline_classes

    report = Report(as_json=as_json)
    wanted = _split(names)
    if not wanted and not every:
        raise PorterError("no pipeline", expected="NAME... or --all")
    if wanted and every:
        raise PorterError(f"--all beside {wanted[0]}", expected="one of them")
    if with_ is not None and len(wanted) != 1:
        raise PorterError("--with for several pipelines", expected="one NAME")
    made = (
        plan_all(pipeline_classes(), output, progress=report.message)
        if every
        else plan(wanted, output, override=with_, progress=report.message)
    )
    changed = made.would_change(output) if check or diff else made.write(output)
    _tell(report, made, changed, diff=diff, table=every)
    for error in made.failed.values():
        if traceback and isinstance(error, InternalError):
            report.message(error.trace or str(error))
    return made.exit_code or int(check and bool(changed))


@command("diff")
def diff(
    names: Names = None,
    output: Output = GENERATED,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> int:
    """Show how ports differ from upstream, each hunk with its rule and manual section."""
    from porter.lock import read_lock
    from porter.port import make_port, port_again, render_ports

    report = Report(as_json=as_json)
    lock = read_lock(output)
    ports = [
        port_again(name, lock.ports[name]) if name in lock.ports else make_port(name)
        for name in _split(names) or sorted(lock.ports)
    ]
    outputs = render_ports(ports)
    if as_json:
        report.json({port.name: diff_json(port, outputs) for port in ports})
    else:
        for port in ports:
            report.diff(port, outputs)
    return 0


@command("check")
def check(
    output: Output = GENERATED, as_json: AsJson = False, traceback: Traceback = False
) -> int:
    """Regenerate every port of the lock in memory and name what has drifted."""
    report = Report(as_json=as_json)
    found = drift(output)
    if as_json:
        report.json(found)
    for name, reasons in found.items():
        if not as_json:
            report.line(f"{name}: {'drifted' if reasons else 'as the lock says'}")
            for reason in reasons:
                report.line(f"  {reason}")
    if not found:
        report.message("no ports in the lock")
    return int(any(found.values()))


@command("verify")
def verify(
    names: Names = None,
    output: Output = GENERATED,
    modes: Annotated[str | None, typer.Option(help="comma-separated modes")] = None,
    tier: Annotated[
        str,
        typer.Option(help="without --modes: full, core (a mode of each kind), fast"),
    ] = "full",
    missing: Annotated[bool, typer.Option(help="only modes without a proof")] = False,
    processes: Annotated[int, typer.Option(min=1, help="ports at a time")] = 1,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> int:
    """Compare ports with stock diffusers, mode by mode, and keep the proofs."""
    from porter import verify as verification

    chosen = None if modes is None else [mode.strip() for mode in modes.split(",")]
    if tier not in list(verification.Tier):
        raise PorterError(
            f"--tier {tier}", expected=", ".join(verification.Tier), todo="name one"
        )
    selection = verification.Selection(
        None if chosen is None else verification.parse_modes(chosen),
        verification.Tier(tier),
        missing,
    )
    return int(
        verification.run(  # type: ignore[attr-defined,unused-ignore]
            _split(names),
            selection,
            generated=output,
            processes=processes,
            as_json=as_json,
        )
    )


@command("coverage")
def coverage(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the table as JSON")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="write the table as Markdown")
    ] = None,
    output: Output = GENERATED,
    task: Annotated[
        str | None, typer.Option(help="one task alone, for example text-to-image")
    ] = None,
    traceback: Traceback = False,
) -> int:
    """Say of every pipeline in diffusers which parallel modes are proven."""
    from porter.coverage import survey
    from porter.coverage_report import json_text, markdown_text, plain_text

    found = survey(output, task)
    Report().line(plain_text(found))
    for file, text in ((json_file, json_text), (markdown, markdown_text)):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text(found), encoding="utf-8")
    return 0


@command("list-rules")
def list_rules(as_json: AsJson = False, traceback: Traceback = False) -> int:
    """List the rules with the manual's sections, in the order in which they apply."""
    from porter.rules import attention, pipeline, transformer

    report = Report(as_json=as_json)
    rows = [
        {"id": rule.id, "kind": kind, "manual": rule.manual, "summary": rule.summary}
        for kind, package in (
            ("pipeline", pipeline),
            ("transformer", transformer),
            ("attention", attention),
        )
        for rule in (each() for each in package.RULES)
    ]
    if as_json:
        report.json(rows)
    else:
        for row in rows:
            report.line(
                f"{row['kind']:<12}{row['id']:<24}{row['manual']:<12}{row['summary']}"
            )
    return 0


@command("make-checkpoint")
def make_checkpoint(
    name: Annotated[str, typer.Argument(help="pipeline class")],
    folder: Annotated[Path, typer.Argument(help="folder to make")],
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
    traceback: Traceback = False,
) -> int:
    """Make a tiny checkpoint folder with random weights that stock diffusers loads."""
    import importlib

    from porter import source
    from porter.shrink import make_checkpoint as make

    upstream = source.load(name)
    module = importlib.import_module(upstream.module.name)
    make(getattr(module, upstream.class_name), folder, seed=seed)
    Report().line(f"{folder.as_posix()}: a tiny {upstream.class_name}")
    return 0


def main() -> None:
    """The console script."""
    # Trees and modules are many small objects that live to the end: looking through them
    # for garbage at the usual rate takes a third of a port's time.
    gc.set_threshold(1_000_000)
    # And the last look, when the interpreter ends, takes a second and a half.
    atexit.register(gc.freeze)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # `package.module:ClassName` may name a module of the current folder.
        sys.path.insert(0, str(Path.cwd()))
    app()


def _split(names: list[str] | None) -> list[str]:
    return [part for name in names or [] for part in name.split(",") if part]


def _tell(
    report: Report, made: Plan, changed: list[str], *, diff: bool, table: bool
) -> None:
    if report.as_json:
        data: dict[str, Any] = {
            name: port_json(port, changed) for name, port in made.ports.items()
        }
        for name, error in made.failed.items():
            data[name] = {"status": state(error), "reason": str(error)}
        report.json(data)
        return
    for name, port in made.ports.items():
        if diff:
            report.diff(port, made.outputs)
        elif not table:
            report.port(port, changed)
            if not made.lock.ports[name].get("proofs"):
                report.message(f"nothing is proven yet: porter verify {name}")
    if table and not diff:
        report.results({**made.ports, **made.failed})
