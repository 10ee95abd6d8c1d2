"""The loop's latents in what a transformer is given, and the segments of their stream."""

from __future__ import annotations

import pytest
import torch

from xfuser_runtime.transformers.latent_tokens import LatentTokens, loop_shape


def test_the_leading_run_is_found_by_its_values() -> None:
    latents = torch.randn(2, 6, 4)
    beside = torch.randn(2, 3, 4)
    assert loop_shape(torch.cat([latents, beside], 1), latents) == (2, 6, 4)
    doubled = torch.cat([torch.cat([latents, beside], 1)] * 2)
    assert loop_shape(doubled, latents) == (4, 6, 4)
    channels = torch.cat([latents, torch.randn(2, 6, 1)], 2)
    assert loop_shape(channels, latents) == (2, 6, 4)


def test_what_does_not_lead_is_not_taken_for_the_loops_latents() -> None:
    latents = torch.randn(2, 6, 4)
    after = torch.cat([torch.randn(2, 3, 4), latents], 1)
    assert loop_shape(after, latents) == (2, 9, 4)
    assert loop_shape(torch.cat([latents, latents], 1)[:, 1:], latents) == (2, 11, 4)
    assert loop_shape(latents, None) == (2, 6, 4)
    assert loop_shape(latents[:, :4], latents) == (2, 4, 4)


@pytest.mark.parametrize(
    ("context", "order", "rest"),
    [
        ("before", ("x.context", "x", "x.beside"), 5),
        ("after", ("x", "x.beside", "x.context"), 5),
        (None, ("x", "x.beside"), None),
    ],
)
def test_segments_stand_in_the_order_of_the_stream(
    context: str | None, order: tuple[str, ...], rest: int | None
) -> None:
    held = LatentTokens.of("x", {1: 1}, (1, 9, 4), (1, 6, 4))
    streams = {"text": 7, "x": 9 + (rest or 0)}
    cut, parts = held.segments(streams, "x", context)
    assert parts == {"x": order}
    wanted = {"text": 7, "x": 6, "x.beside": 3}
    assert cut == (wanted if rest is None else {**wanted, "x.context": rest})


def test_a_stream_of_latents_alone_is_one_segment() -> None:
    held = LatentTokens.of("x", {2: 2, 3: 2}, (1, 4, 8, 6), (1, 4, 8, 6))
    assert held.segments({"x": 12}, "x", None) == ({"x": 12}, {})
    assert (held.dim, held.extent, held.tokens_of_a_row) == (2, 8, 3)


def test_tokens_that_no_segment_explains_are_refused() -> None:
    held = LatentTokens.of("x", {1: 1}, (1, 9, 4), (1, 6, 4))
    with pytest.raises(ValueError, match="10 tokens for latents .* expected 9"):
        held.segments({"x": 10}, "x", None)
    with pytest.raises(ValueError, match="whole rows along dimension 2"):
        LatentTokens.of("x", {2: 1, 3: 1}, (1, 4, 8, 6), (1, 4, 8, 3))
