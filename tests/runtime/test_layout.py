"""The token layout, as properties: nothing lost, nothing twice, two orders that agree."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xfuser_runtime.distributed.layout import Segment, TokenLayout

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    """Text, latents and sometimes a second stream of latents; lengths that seldom divide."""
    row = draw(st.integers(1, 5))
    rows = draw(st.integers(1, 12))
    segments = [
        Segment("text", draw(st.integers(0, 40))),
        Segment("image", row * rows, row, follows_latents=True),
    ]
    if draw(st.booleans()):
        other = draw(st.integers(1, 4))
        length = other * draw(st.integers(0, 12))
        segments.append(Segment("control", length, other, follows_latents=True))
    return TokenLayout(
        (
            tuple(draw(st.permutations(segments)))
            if len(segments) == 2
            else tuple(segments)
        ),
        num_patches=draw(st.integers(1, rows)),
        num_shards=draw(st.integers(1, 5)),
    )


def _names(layout: TokenLayout) -> tuple[str, ...]:
    return tuple(segment.name for segment in layout.segments)


def _rows(layout: TokenLayout, name: str, patch: int | None, shard: int) -> list[int]:
    return [row for span in layout.ranges(name, patch, shard) for row in range(*span)]


@given(layouts())
def test_shards_of_patches_partition_each_segment(layout: TokenLayout) -> None:
    for segment in layout.segments:
        rows = [
            row
            for patch in range(layout.num_patches)
            for shard in range(layout.num_shards)
            for row in _rows(layout, segment.name, patch, shard)
        ]
        assert rows == list(range(segment.length))


@given(layouts())
def test_a_shard_owns_the_same_rows_in_whole_and_patch_passes(
    layout: TokenLayout,
) -> None:
    for name in _names(layout):
        for shard in range(layout.num_shards):
            by_patch = [
                row
                for patch in range(layout.num_patches)
                for row in _rows(layout, name, patch, shard)
            ]
            assert _rows(layout, name, None, shard) == by_patch


@given(layouts())
def test_ranges_are_merged_and_not_empty(layout: TokenLayout) -> None:
    for name in _names(layout):
        for shard in range(layout.num_shards):
            spans = layout.ranges(name, None, shard)
            assert all(start < stop for start, stop in spans)
            assert all(left[1] < right[0] for left, right in pairwise(spans))


@given(layouts())
def test_shards_are_balanced(layout: TokenLayout) -> None:
    for name in _names(layout):
        for patch in range(layout.num_patches):
            lengths = layout.lengths((name,), patch)
            assert max(lengths) - min(lengths) <= 1


@given(layouts())
def test_patches_end_on_whole_rows_and_none_is_empty(layout: TokenLayout) -> None:
    for segment in layout.segments:
        for patch in range(layout.num_patches):
            size = sum(layout.lengths((segment.name,), patch))
            if segment.follows_latents:
                assert size % segment.row == 0
    assert all(start < stop for start, stop in pairwise(layout.patch_borders()))
    assert layout.patch_rows(0)[0] == 0


@given(st.integers(0, 300), st.integers(1, 60), st.integers(1, 40), st.integers(1, 8))
def test_patches_are_balanced(text: int, rows: int, row: int, patches: int) -> None:
    patches = min(patches, rows)
    layout = TokenLayout(
        (Segment("text", text), Segment("image", rows * row, row, True)), patches, 1
    )
    texts = [layout.length(("text",), p, 0) for p in range(patches)]
    images = [layout.length(("image",), p, 0) for p in range(patches)]
    assert max(texts) - min(texts) <= 1
    assert max(images) - min(images) in (0, row)


def test_a_text_as_long_as_the_patches_are_many_leaves_none_without() -> None:
    layout = TokenLayout((Segment("text", 4), Segment("image", 256, 4, True)), 4, 1)
    assert [layout.length(("text",), p, 0) for p in range(4)] == [1, 1, 1, 1]


@given(layouts(), st.data())
def test_cache_order_is_a_bijection_that_patch_passes_agree_with(
    layout: TokenLayout, data: st.DataObject
) -> None:
    """Filling a cache in a whole pass or patch by patch puts every row in the same place."""
    names = tuple(data.draw(st.permutations(_names(layout))))
    count = data.draw(st.integers(1, layout.num_shards))
    shards = data.draw(st.permutations(range(layout.num_shards)))[:count]
    gathered = [
        (name, row)
        for shard in shards
        for name in names
        for row in _rows(layout, name, None, shard)
    ]
    start, size = layout.cache_range(names, None, shards)
    assert (start, size) == (0, len(gathered))
    whole: list[tuple[str, int] | None] = [None] * size
    for source, destination, length in layout.whole_to_cache(names, shards):
        assert length > 0
        for offset in range(length):
            assert whole[destination + offset] is None
            whole[destination + offset] = gathered[source + offset]
    by_patch = []
    for patch in range(layout.num_patches):
        assert layout.cache_range(names, patch, shards)[0] == len(by_patch)
        by_patch += [
            (name, row)
            for shard in shards
            for name in names
            for row in _rows(layout, name, patch, shard)
        ]
        assert layout.cache_range(names, patch, shards)[1] == len(by_patch)
    assert whole == by_patch


@given(layouts())
def test_one_patch_needs_one_move(layout: TokenLayout) -> None:
    if layout.num_patches == 1:
        shards = range(layout.num_shards)
        moves = layout.whole_to_cache(_names(layout), shards)
        total = sum(segment.length for segment in layout.segments)
        assert moves == (((0, 0, total),) if total else ())


def test_fewer_rows_than_shards() -> None:
    layout = TokenLayout((Segment("image", 3, 1, True),), 3, 4)
    assert [layout.ranges("image", 1, shard) for shard in range(4)] == [
        ((1, 2),),
        (),
        (),
        (),
    ]
    assert layout.lengths(("image",), None) == (3, 0, 0, 0)


def test_known_example() -> None:
    layout = TokenLayout((Segment("text", 5), Segment("image", 16, 4, True)), 2, 2)
    assert layout.patch_borders() == (0, 2, 4)
    assert layout.ranges("text", None, 0) == ((0, 2), (3, 4))
    assert layout.ranges("text", 1, 0) == ((3, 4),)
    assert layout.ranges("image", None, 0) == ((0, 4), (8, 12))
    assert layout.lengths(("text", "image"), None) == (11, 10)
    assert layout.cache_range(("text", "image"), 1, (0, 1)) == (11, 21)
    assert layout.whole_to_cache(("text", "image"), (0, 1)) == (
        (0, 0, 2),
        (2, 11, 1),
        (3, 2, 4),
        (7, 12, 4),
        (11, 6, 1),
        (12, 16, 1),
        (13, 7, 4),
        (17, 17, 4),
    )


def test_a_region_of_text_alone_has_no_latent_rows() -> None:
    layout = TokenLayout((Segment("text", 5),), 2, 2)
    assert layout.lengths(("text",), 0) == (2, 1)
    assert layout.lengths(("text",), 1) == (1, 1)
    with pytest.raises(ValueError, match="without one that follows the latents"):
        layout.patch_rows(0)


IMAGE = Segment("image", 12, 4, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ((IMAGE,), 4, 1),
            "4 patches for 3 latent rows, expected at most one patch a row",
        ),
        (((IMAGE, IMAGE), 1, 1), "names .* repeat"),
        (((IMAGE,), 0, 1), "0 patches and 1 shards, expected at least 1"),
        (
            ((Segment("image", 13, 4, True),), 2, 1),
            "13 tokens, expected a multiple .* of 4",
        ),
    ],
)
def test_bad_layouts_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(*arguments)  # type: ignore[arg-type]


def test_bad_questions_are_refused() -> None:
    layout = TokenLayout((IMAGE,), 1, 2)
    with pytest.raises(
        ValueError, match="'text' is not in the layout, expected one of: image"
    ):
        layout.ranges("text", None, 0)
    with pytest.raises(ValueError, match="shard 2 of 2, expected 0 to 1"):
        layout.ranges("image", None, 2)
    with pytest.raises(ValueError, match="expected length >= 0 and row >= 1"):
        Segment("image", 4, 0)


def test_layouts_are_hashable_and_equal_by_value() -> None:
    assert hash(TokenLayout((IMAGE,), 2, 2)) == hash(TokenLayout((IMAGE,), 2, 2))
    assert TokenLayout((IMAGE,), 2, 2) != TokenLayout((IMAGE,), 3, 2)


def test_integers_alone_need_no_torch() -> None:
    """The module is loaded by its path, past packages that import more."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('layout', {sys.modules[TokenLayout.__module__].__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['layout'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
