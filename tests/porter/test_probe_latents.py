"""The probe finds which latents feed which tokens, and the runtime counts alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from porter import source
from porter.analysis.block_loops import find_block_loops, find_method
from porter.probe.capture import TransformerCall
from porter.probe.latents import LatentProbe, Place
from tests.toys import latent_shapes
from xfuser_runtime.transformers.latent_tokens import LatentTokens


def _probe(name: str, latents: Any) -> LatentProbe:
    torch.manual_seed(0)
    module = source.load(f"tests.toys.latent_shapes:{name}").module
    forward = find_method(module, module.class_def(name), "forward")
    loops = find_block_loops(module, forward)
    call = TransformerCall("transformer", {"hidden_states": latents})
    model = getattr(latent_shapes, name)()
    return LatentProbe(model, module, forward, loops, call)


@pytest.mark.parametrize(
    ("name", "stream", "shape", "rows", "place"),
    [
        ("VideoModel", "hidden_states", (1, 3, 5, 4, 6), ((2, 1), (3, 2), (4, 2)), 30),
        # The stream runs over the frames fastest.
        (
            "ColumnsFirstModel",
            "hidden_states",
            (1, 3, 5, 4, 6),
            ((4, 2), (3, 2), (2, 1)),
            30,
        ),
        ("AudioModel", "x", (2, 3, 7), ((2, 1),), 7),
        # One frame counts no tokens, the rows of the picture do.
        ("VideoModel", "hidden_states", (1, 3, 1, 4, 6), ((3, 2), (4, 2)), 6),
    ],
)
def test_rows_of_the_latents(
    name: str,
    stream: str,
    shape: tuple[int, ...],
    rows: tuple[tuple[int, int], ...],
    place: int,
) -> None:
    probe = _probe(name, torch.randn(shape))
    assert probe.rows("blocks", stream, 1) == rows
    assert LatentTokens.of("x", dict(rows), shape, shape).count == place


def test_tokens_that_share_latents_have_no_rows() -> None:
    probe = _probe("OverlapModel", torch.randn(1, 3, 5, 4, 6))
    assert probe.place("blocks", "hidden_states", 1) == Place(0, 30, 30)
    assert probe.rows("blocks", "hidden_states", 1) == ()


def test_tokens_of_the_model_stand_before_those_of_the_latents() -> None:
    probe = _probe("AudioModel", torch.randn(2, 3, 7))
    assert probe.place("blocks", "x", 1) == Place(2, 9, 9)


def test_another_stream_holds_no_latents() -> None:
    probe = _probe("AudioModel", torch.randn(2, 3, 7))
    assert probe.place("blocks", "context", 1) is None


def test_latents_without_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no token stream that follows the rows"):
        LatentTokens.of("x", {}, (1, 3, 5, 4, 6), (1, 3, 5, 4, 6))
    with pytest.raises(ValueError, match="no token stream that follows the rows"):
        LatentTokens.of(None, {2: 1}, (1, 3, 5, 4, 6), (1, 3, 5, 4, 6))
    with pytest.raises(ValueError, match="expected tokens of {3: 2} elements"):
        LatentTokens.of("x", {3: 2}, (1, 3, 5, 5, 6), (1, 3, 5, 5, 6))
    held = LatentTokens.of("x", {2: 1}, (1, 3, 7), (1, 3, 7))
    with pytest.raises(ValueError, match="9 tokens for latents of shape"):
        held.segments({"x": 9}, "x", None)


def test_context_is_a_segment_of_its_own() -> None:
    held = LatentTokens.of("x", {2: 1}, (1, 3, 7), (1, 3, 7))
    cut, parts = held.segments({"x": 9}, "x", "before")
    assert cut == {"x": 7, "x.context": 2}
    assert parts == {"x": ("x.context", "x")}
    assert held.tokens_of_a_row == 1


def test_a_single_frame_is_cut_into_its_rows() -> None:
    rows = {2: 1, 3: 2, 4: 2}
    assert LatentTokens.of("x", rows, (1, 3, 5, 4, 6), (1, 3, 5, 4, 6)).dim == 2
    one = LatentTokens.of("x", rows, (1, 3, 1, 4, 6), (1, 3, 1, 4, 6))
    assert (one.dim, one.extent, one.tokens_of_a_row) == (3, 4, 3)


def test_only_what_follows_the_latents_moves_with_them() -> None:
    probe = _probe("AudioModel", torch.randn(2, 3, 7))
    assert probe.ndim == 3
    assert probe.moves("blocks", "x")
    assert not probe.moves("blocks", "context")
    assert not probe.moves("blocks", "nothing")
