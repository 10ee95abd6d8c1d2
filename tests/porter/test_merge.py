"""A transformer that two pipelines feed differently: facts that serve both."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from porter.analysis.facts import (
    LoopFacts,
    PipelineFacts,
    Tail,
    TokenAxis,
    TransformerFacts,
    facts_from_json,
    to_json,
)
from porter.analysis.merge import merged
from porter.errors import Refusal

_STREAM = TokenAxis(1, ("x",), ndim=3)
_LOOP = LoopFacts(
    blocks="blocks",
    lengths={"x": ("x", 1)},
    latents="x",
    context=None,
    rows=((3, 2), (4, 2)),
    values={"x": (_STREAM,)},
)
_BY_TOKEN = replace(
    _LOOP,
    rows=((2, 1), (3, 2), (4, 2)),
    values={"x": (_STREAM,), "temb": (TokenAxis(1, ("x",), ndim=4),)},
)


def _facts(*loops: LoopFacts, keys: tuple[str, ...] = ("x",)) -> TransformerFacts:
    return TransformerFacts(loops, {"blocks.*.attn": keys}, ("toy.Proc",), ())


def test_a_value_that_one_pipeline_gives_by_token_is_optional() -> None:
    for pair in ((_LOOP, _BY_TOKEN), (_BY_TOKEN, _LOOP)):
        found = merged(_facts(pair[0]), _facts(pair[1]), "Toy").loops[0]
        assert found.values["temb"] == (TokenAxis(1, ("x",), ndim=4, optional=True),)
        assert found.values["x"] == (_STREAM,)
        # A single frame counts no tokens; the video's rows hold for both.
        assert found.rows == _BY_TOKEN.rows
    again = merged(merged(_facts(_LOOP), _facts(_BY_TOKEN), "Toy"), _facts(_LOOP), "T")
    assert again == merged(_facts(_LOOP), _facts(_BY_TOKEN), "Toy")


def test_latents_of_an_image_and_of_a_video_are_told_by_their_dimensions() -> None:
    image = replace(_LOOP, ndim=4, rows=((2, 1), (3, 1)))
    video = replace(_LOOP, ndim=5, rows=((3, 1), (4, 1)))
    for pair in ((image, video), (video, image)):
        found = merged(_facts(pair[0]), _facts(pair[1]), "Toy").loops[0]
        assert (found.ndim, found.rows) == (4, image.rows)
        assert found.other_rows == {5: video.rows}
    again = merged(_facts(found), _facts(video), "Toy")
    assert again == _facts(found)


def test_a_tail_that_one_pipeline_lacks_serves_neither() -> None:
    tail = Tail("x", ("x = self.norm(x)", "y = self.proj(x)"), "y")
    late, shorter = (
        replace(_LOOP, tail=each) for each in (tail, replace(tail, result="x"))
    )
    assert merged(_facts(late), _facts(late), "Toy").loops[0].tail == tail
    assert merged(_facts(late), _facts(_LOOP), "Toy").loops[0].tail is None
    assert merged(_facts(_BY_TOKEN), _facts(late), "Toy").loops[0].tail is None
    assert merged(_facts(late), _facts(shorter), "Toy").loops[0].tail is None
    whole = PipelineFacts("none", {}, {"transformer": _facts(late)})
    assert facts_from_json(json.loads(json.dumps(to_json(whole)))) == whole


def test_facts_that_agree_stay_as_they_are() -> None:
    assert merged(_facts(_LOOP), _facts(_LOOP), "Toy") == _facts(_LOOP)


def test_a_pipeline_that_needs_it_whole_takes_the_form_of_the_other() -> None:
    whole, split = TransformerFacts((), {}, (), (), whole="toy.py:1: it"), _facts(_LOOP)
    assert merged(whole, split, "Toy") == merged(split, whole, "Toy") == split
    assert merged(whole, replace(whole, whole="toy.py:2: more"), "Toy") == whole


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_facts(replace(_LOOP, lengths={"y": ("y", 1)})), "other streams in blocks"),
        (_facts(replace(_LOOP, rows=((2, 2), (3, 2)))), "other rows of the latents"),
        (_facts(replace(_LOOP, latents="y")), "other latents in blocks"),
        (_facts(replace(_LOOP, values={"x": (TokenAxis(0, ("x",), ndim=3),)})), "axes"),
        (_facts(_LOOP, keys=("y", "x")), "keys of blocks.*.attn in two orders"),
        (_facts(replace(_LOOP, blocks="others")), "loops over"),
    ],
)
def test_contradictions_are_refused(other: TransformerFacts, message: str) -> None:
    with pytest.raises(Refusal, match=message.replace("*", r"\*")):
        merged(_facts(_LOOP), other, "Toy")
