"""What blocks get from a region: own rows, in memory as a block's own outputs lie."""

from __future__ import annotations

import pytest
import torch

from xfuser_runtime.distributed.layout import Segment, TokenLayout
from xfuser_runtime.transformers.region import BlockRegion


def region(patch: int | None = None, num_patches: int = 1) -> BlockRegion:
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
    made = region(patch, num_patches)
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
    x = region().shard(torch.randn(2, 8, 5), 1, "image")
    for _ in range(3):
        x = block(x)
    assert len(compiled) == 1
