"""Facts of one transformer class that several pipelines or components measured.

They feed it differently: one passes a modulation for every token, another one for all; one
passes a mask, another none.  The generated wrapper serves them all, so its facts are those
of all together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from porter.analysis.facts import LoopFacts, TokenAxis, TransformerFacts
from porter.analysis.mixing import MixingFacts
from porter.errors import Refusal


def merged(
    first: TransformerFacts, second: TransformerFacts, class_name: str
) -> TransformerFacts:
    """The facts that hold for both; a value that only one holds by token is optional.

    Args:
        first, second: measured on the same class.
        class_name: for the message.

    Raises:
        Refusal: they contradict each other.
    """
    if first == second or second.whole:
        # A pipeline that needs it whole never splits it: the other's form serves both.
        return first
    if first.whole:
        return second
    loops = {loop.blocks: loop for loop in first.loops}
    others = {loop.blocks: loop for loop in second.loops}
    if not (loops.keys() <= others.keys() or others.keys() <= loops.keys()):
        raise _clash(
            class_name, f"loops over {sorted(loops)} and over {sorted(others)}"
        )
    longer = first.loops if len(loops) >= len(others) else second.loops
    attention = _joined(first.attention, second.attention, "keys", class_name)
    return TransformerFacts(
        loops=tuple(
            (
                _loop(loops[loop.blocks], others[loop.blocks], class_name)
                if loop.blocks in loops and loop.blocks in others
                else loop
            )
            for loop in longer
        ),
        attention=attention,
        processors=tuple(sorted({*first.processors, *second.processors})),
        layers=tuple(sorted({*first.layers, *second.layers})),
        queries=_joined(first.queries, second.queries, "queries", class_name),
        mixing=_mixing(first.mixing, second.mixing, class_name),
        batch_processors=tuple(
            sorted({*first.batch_processors, *second.batch_processors})
        ),
    )


def _mixing(first: MixingFacts, second: MixingFacts, class_name: str) -> MixingFacts:
    """What both need; what one use alone needs does no harm to the other."""
    found: dict[str, Any] = {}
    for item in fields(MixingFacts):
        one, other = getattr(first, item.name), getattr(second, item.name)
        if isinstance(one, tuple):
            found[item.name] = tuple(sorted({*one, *other}))
            continue
        for key in one.keys() & other.keys():
            if one[key] != other[key] and item.name != "refused":
                raise _clash(class_name, f"other {item.name} of {key}")
        found[item.name] = {**other, **one}
    return MixingFacts(**found)


def _joined(
    first: Mapping[str, tuple[str, ...]],
    second: Mapping[str, tuple[str, ...]],
    what: str,
    class_name: str,
) -> dict[str, tuple[str, ...]]:
    """Streams by path or name from both."""
    joined = dict(first)
    for path, streams in second.items():
        if joined.setdefault(path, streams) != streams:
            raise _clash(class_name, f"{what} of {path} in two orders")
    return joined


def _loop(first: LoopFacts, second: LoopFacts, class_name: str) -> LoopFacts:
    if (first.lengths, first.whole) != (second.lengths, second.whole):
        raise _clash(class_name, f"other streams in {first.blocks}")
    for name in ("latents", "context"):
        if len({getattr(first, name), getattr(second, name)} - {None}) > 1:
            raise _clash(class_name, f"other {name} in {first.blocks}")
    return replace(
        first,
        latents=first.latents or second.latents,
        context=first.context or second.context,
        **_rows(first, second, class_name),
        values={
            name: _axes(name, first.values, second.values, class_name)
            for name in dict.fromkeys((*first.values, *second.values))
        },
        filled=tuple(sorted({*first.filled, *second.filled})),
        classes=tuple(sorted({*first.classes, *second.classes})),
        after={**second.after, **first.after},
        travels=tuple(sorted({*first.travels, *second.travels})),
        fresh={**second.fresh, **first.fresh},
        companions={
            name: tuple(sorted({*classes, *second.companions.get(name, ())}))
            for name, classes in first.companions.items()
        },
        counts=_joined(first.counts, second.counts, "counts", class_name),
        # One gives by token what the other gives once: a tail for both takes whole tokens.
        tail=first.tail if first.tail == second.tail else None,
    )


def _rows(first: LoopFacts, second: LoopFacts, class_name: str) -> dict[str, Any]:
    """The rows of both, by the number of dimensions of the latents.

    Of an image and of a video of as many dimensions, those of the video: a single frame
    counts no tokens.
    """
    found = {first.ndim: first.rows, **first.other_rows}
    for ndim, rows in {second.ndim: second.rows, **second.other_rows}.items():
        one, other = sorted((found.get(ndim, ()), rows), key=len)
        if one != tuple(row for row in other if row in one):
            raise _clash(class_name, f"other rows of the latents in {first.blocks}")
        found[ndim] = other
    ndim = min(found)
    return {"ndim": ndim, "rows": found.pop(ndim), "other_rows": found}


def _axes(
    name: str,
    first: Mapping[str, tuple[TokenAxis, ...]],
    second: Mapping[str, tuple[TokenAxis, ...]],
    class_name: str,
) -> tuple[TokenAxis, ...]:
    if name in first and name in second:
        one, other = (_required(values[name]) for values in (first, second))
        if one != other:
            raise _clash(class_name, f"other token axes of {name}")
        optional = any(axis.optional for axis in (*first[name], *second[name]))
        return tuple(replace(axis, optional=optional) for axis in one)
    return tuple(
        replace(axis, optional=True) for axis in first.get(name, second.get(name, ()))
    )


def _required(axes: tuple[TokenAxis, ...]) -> tuple[TokenAxis, ...]:
    return tuple(replace(axis, optional=False) for axis in axes)


def _clash(class_name: str, found: Any) -> Refusal:
    return Refusal(
        f"two uses of {class_name} with {found}",
        expected="one form of the wrapper that serves both",
        todo="port one of the pipelines into another folder with --output",
    )
