"""What a transformer is refused for when it is wrapped."""

from __future__ import annotations

import pytest
from torch import nn

from xfuser_runtime.distributed import parallel_state
from xfuser_runtime.transformers import xFuserTransformerBaseWrapper
from xfuser_runtime.transformers.base_transformer import _check_blocks


def test_an_unknown_class_of_block_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])
    _check_blocks(model, {"blocks": ("Linear", "ReLU")})
    with pytest.raises(ValueError, match="a ReLU in blocks, expected Linear"):
        _check_blocks(model, {"blocks": ("Linear",)})


@pytest.mark.parametrize("degree", ["sequence", "pipeline"])
def test_a_model_without_regions_is_one_ranks(
    degree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(nn.Module):
        pass

    class Wrapper(xFuserTransformerBaseWrapper, Model):
        pass

    name = f"get_{degree}_parallel_world_size"
    monkeypatch.setattr(parallel_state, name, lambda: 2)
    model = Model()
    with pytest.raises(ValueError, match="for one call of a Model, expected one rank"):
        Wrapper.wrap(model)
    assert type(model) is Model
