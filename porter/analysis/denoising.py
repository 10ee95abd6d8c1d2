"""Records of a denoising loop, as `porter.analysis.pipeline_source` reads them."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from porter.parsed import Statement


@dataclass(frozen=True)
class TransformerCall:
    """One call of a denoiser in the loop.

    Attributes:
        call: the call itself, without the `[0]` behind it.
        statement: the statement that holds it.
        guards: the tests under which it runs, outermost first, each on one line.
        target: the name that the statement binds, or None.
        inner_loop: it runs in a loop inside the denoising loop.
    """

    call: cst.Call
    statement: cst.SimpleStatementLine
    guards: tuple[str, ...]
    target: str | None
    inner_loop: bool


@dataclass(frozen=True)
class DenoisingLoop:
    """The loop over the timesteps.

    Attributes:
        loop: the `for` statement.
        frame: the statement to stand above: the `with` around the loop, or the loop.
        outer: the statement of `__call__`'s own body that holds the loop.
        body: the statements of a pass: neither the interrupt check nor the tail.
        interrupt: the check at the top of the body that ends the run early, or None.
        tail: callback, progress bar and the like, once a step.
        callback_block: the `if callback_on_step_end is not None` of the tail, or None.
        latents: the names that the loop carries and the scheduler steps; where they are
            several, each has its own schedule.
        in_place: those that the body stores into instead of binding them anew.
        calls: the denoiser's calls, in order.
        skips: tests above the first call under which the body leaves a step out.
        stops: tests of the tail under which the loop ends early.
        other_jumps: jumps that passes could take differently.
        around: the loop that it stands in, innermost, or None.
    """

    loop: cst.For
    frame: Statement
    outer: Statement
    body: tuple[Statement, ...]
    interrupt: cst.If | None
    tail: tuple[Statement, ...]
    callback_block: cst.If | None
    latents: tuple[str, ...]
    in_place: tuple[str, ...]
    calls: tuple[TransformerCall, ...]
    skips: tuple[cst.If, ...] = ()
    stops: tuple[cst.If, ...] = ()
    other_jumps: tuple[cst.Continue | cst.Break, ...] = ()
    around: cst.For | cst.While | None = None
