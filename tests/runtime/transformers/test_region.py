"""What a block region cuts: values by token, and values that are given once for all."""

from __future__ import annotations

import pytest
import torch

from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.transformers import region
from xfuser_runtime.transformers.latent_tokens import segments_of_kinds
from xfuser_runtime.transformers.region import BlockRegion


def _region(length: int) -> BlockRegion:
    return BlockRegion(
        layout=TokenLayout((Segment("x", length),), 1, 2),
        patch=None,
        shard=1,
        call_index=0,
        links=None,
        buffers={},
    )


def test_a_value_by_token_is_cut_and_one_for_all_tokens_is_not() -> None:
    region = _region(5)
    by_token = torch.arange(5.0).view(1, 5, 1, 1)
    assert region.shard(by_token, 1, "x", ndim=4).flatten().tolist() == [3, 4]
    once = torch.zeros(1, 5, 1)
    assert region.shard(once, 1, "x", ndim=4) is once
    broadcast = torch.zeros(1, 1, 1, 1)
    assert region.shard(broadcast, 1, "x", ndim=4) is broadcast
    assert region.shard(None, 1, "x", ndim=4) is None


def test_a_value_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 5 tokens of x"):
        _region(5).shard(torch.zeros(1, 6, 1, 1), 1, "x", ndim=4)
    with pytest.raises(ValueError, match="expected 5 tokens of x"):
        _region(5).shard(torch.zeros(1, 1, 1), 1, "x")


def _two_streams(patch: int | None = None, num_patches: int = 1) -> BlockRegion:
    """The region of shard 1 of 2, text of 3 tokens and an image of 8."""
    segments = (Segment("text", 3), Segment("image", 8, follows_latents=True))
    return BlockRegion(
        layout=TokenLayout(segments, num_patches, 2),
        patch=patch,
        shard=1,
        call_index=0,
        links=None,
        buffers={},
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("patch", "num_patches"), [(None, 1), (None, 2), (0, 2), (1, 2)]
)
def test_rows_lie_as_in_a_fresh_tensor(
    batch: int, patch: int | None, num_patches: int
) -> None:
    made = _two_streams(patch, num_patches)
    for name, length in (("text", 3), ("image", 8)):
        whole = torch.randn(batch, length, 5)
        rows = [
            index
            for start, stop in made.layout.ranges(name, patch, 1)
            for index in range(start, stop)
        ]
        found = made.shard(whole, 1, name)
        assert torch.equal(found, whole[:, rows])
        assert found.stride() == torch.empty_like(found).contiguous().stride() or (
            not rows
        )


def test_the_first_block_is_compiled_with_the_others() -> None:
    """Strides of a cut value decide whether the same code serves the next block."""
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(inputs)
        return module.forward

    torch._dynamo.reset()
    block = torch.compile(
        lambda x: (x * 2).contiguous(), backend=backend, dynamic=False
    )
    x = _two_streams().shard(torch.randn(2, 8, 5), 1, "image")
    for _ in range(3):
        x = block(x)
    assert len(compiled) == 1


def test_parts_of_a_blocks_output_lie_as_fresh_tensors_without_a_copy() -> None:
    """With one sample; of more samples a copy would cost more than a second compilation."""
    joined = torch.randn(1, 7, 5)
    text, image = _two_streams().hand_over(joined[:, :3], joined[:, 3:])
    assert (text.stride(0), image.stride(0)) == (15, 20)
    assert image.data_ptr() == joined[:, 3:].data_ptr()
    pair = torch.randn(2, 7, 5)[:, :3]
    assert _two_streams().hand_over(pair) is pair
    assert _two_streams().hand_over(None) is None


def test_of_a_list_of_pairs_the_tokens_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(x: torch.Tensor, dim: int, lengths: object, group: object) -> object:
        assert lengths == (3, 2)
        return torch.cat([x.new_zeros(1, 3, 1), x], dim=dim)

    monkeypatch.setattr(region, "all_gather", gather)
    monkeypatch.setattr(region, "get_sp_group", lambda: None)
    hint, scale = torch.ones(1, 2, 1), torch.tensor(2.0)
    ((whole, same),) = _region(5).gather([(hint, scale)], 1, "x", ndim=3)
    assert whole.flatten().tolist() == [0, 0, 0, 1, 1]
    assert same is scale


def test_each_gathered_value_keeps_the_rows_of_its_own_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(region, "all_gather", lambda x, *_: x)
    monkeypatch.setattr(region, "get_sp_group", lambda: None)
    segments = (Segment("x", 4, follows_latents=True),)
    buffers: dict[str, torch.Tensor] = {}
    for patch in (None, 0, 1):
        made = BlockRegion(
            layout=TokenLayout(segments, 2, 1),
            patch=patch,
            shard=0,
            call_index=0,
            links=None,
            buffers=buffers,
        )
        rows = 4 if patch is None else 2
        found = [
            made.gather(torch.full((1, rows, 1), float(value)), 1, "x")
            for value in (1, 2)
        ]
    assert [whole.flatten().tolist() for whole in found] == [[1.0] * 4, [2.0] * 4]


def test_what_a_caller_keeps_of_a_whole_pass_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segments = (Segment("x", 8, follows_latents=True),)
    buffers: dict[str, torch.Tensor] = {}
    made = {
        patch: BlockRegion(
            layout=TokenLayout(segments, 2, 2),
            patch=patch,
            shard=0,
            call_index=0,
            links=None,
            buffers=buffers,
        )
        for patch in (None, 0)
    }
    monkeypatch.setattr(region, "all_gather", lambda x, *_: torch.cat([x, x], dim=1))
    monkeypatch.setattr(region, "get_sp_group", lambda: None)
    kept = made[None].gather(torch.ones(1, 4, 1), 1, "x")
    later = made[0].gather(torch.full((1, 2, 1), 2.0), 1, "x")
    assert later.flatten().tolist() == [2.0] * 4 + [1.0] * 4
    assert kept.flatten().tolist() == [1.0] * 8


def test_tokens_that_each_sample_repeats_are_cut_in_each() -> None:
    value = torch.arange(10.0).view(10, 1)
    found = _region(5).shard({"mod": value}, 0, "x", repeated=True)
    assert found["mod"].flatten().tolist() == [3, 4, 8, 9]


def test_each_kind_of_tokens_is_cut_by_itself() -> None:
    streams, parts = segments_of_kinds({"x": 8, "text": 3}, {"x": (3, 5)})
    assert streams == {"x.0": 3, "x.1": 5, "text": 3}
    segments = tuple(Segment(name, length) for name, length in streams.items())
    made = BlockRegion(
        layout=TokenLayout(segments, 1, 2),
        patch=None,
        shard=1,
        call_index=0,
        links=None,
        buffers={},
        parts=parts,
    )
    value = torch.arange(8.0).view(1, 8)
    assert made.shard(value, 1, "x").flatten().tolist() == [2, 6, 7]
    assert made.shard(value[:, 3:], 1, "x.1").flatten().tolist() == [6, 7]
    assert (made.rows("x.0"), made.rows("x.1"), made.rows("x")) == (1, 2, 3)
    with pytest.raises(ValueError, match=r"8 tokens of x, expected 3 \+ 4"):
        segments_of_kinds({"x": 8}, {"x": (3, 4)})
    with pytest.raises(ValueError, match="expected whole passes"):
        segments_of_kinds({"x": 8}, {"x": (3, 5)}, 2)
