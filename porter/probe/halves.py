"""Whether the two halves of a guided batch can be computed apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from porter.analysis.facts import Axes
from porter.probe.capture import copied
from porter.verify.branches import cut

#: A half computed beside the other differs by rounding; a lost token is far beyond.
TOLERANCE = 1e-3


def halves_agree(
    model: Any, arguments: Mapping[str, Any], axes: Axes, batch: int
) -> bool:
    """Whether each half of a doubled batch gives the same alone as beside the other.

    Args:
        model: the transformer.
        arguments: of a guided call, by parameter.
        axes: the doubled axes of the arguments.
        batch: number of prompts; a half has as many rows.
    """
    whole = _rows(_run(model, copied(arguments)))
    if len(whole) != 2 * batch:
        return True  # a call on one branch alone
    for half in range(2):
        mine = slice(half * batch, (half + 1) * batch)
        try:
            alone = _rows(_run(model, cut(copied(arguments), axes, mine)))
        except (RuntimeError, ValueError, IndexError):
            return False
        if len(alone) != batch or any(
            one.shape != two.shape
            or not torch.allclose(one, two, rtol=0, atol=TOLERANCE)
            for one, two in zip(alone, whole[mine], strict=True)
        ):
            return False
    return True


def _run(model: Any, arguments: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return model(**arguments)


def _rows(output: Any) -> list[torch.Tensor]:
    """The samples of a transformer's output: a tensor, or a list with one a sample."""
    return list(output[0])
