"""What follows the last block loop runs again on some of its tokens, and shows which are mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from porter.analysis.block_loops import find_block_loops, find_method
from porter.analysis.facts import LoopFacts, Tail, TokenAxis
from porter.parsed import ParsedModule
from porter.probe.capture import TransformerCall
from porter.probe.tail import measure_tail

B, C, OUT = 2, 8, 3
SIZES = (6, 12)
_AXIS = TokenAxis(1, ("x",), ndim=3)


class Modulating(nn.Module):
    """The usual tail: a norm, a modulation for all tokens, a projection."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (C,)) * (1 + temb)


class Averaging(nn.Module):
    """Every token hears of all others."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=1, keepdim=True)


class Grouping(nn.Module):
    """Tokens hear of those of their group, which halves leave whole."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        frames = x.unflatten(1, (-1, 3))
        return (frames + frames.mean(dim=2, keepdim=True)).flatten(1, 2)


class Placing(nn.Module):
    """Each token gets the value of its place."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1])[:, None]


class Dropping(nn.Module):
    """Drops what stands in front of the last tokens, of which these calls have no more."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = SIZES[0]

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return x[:, -self.kept :]


class Toy(nn.Module):
    """A tail whose first module the test gives."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.norm = Modulating() if norm is None else norm
        self.proj = nn.Linear(C, OUT)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        batch = len(x)
        for block in self.blocks:
            x = block(x)

        x = self.norm(x, temb)
        out = self.proj(x)
        return out.reshape(batch, -1)


class Wide(Toy):
    """Values that are no tokens stand between, some of them made with the stream's type."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        count = x.shape[1]
        for block in self.blocks:
            x = block(x)
        if temb.ndim == 3:
            shift, scale = (temb + 1).chunk(2, dim=2)
        else:
            shift, scale = (temb[:, None] + 1).chunk(2, dim=2)
        shift = shift.to(x.dtype)
        x = x.float().unflatten(2, (2, -1)) * (1 + scale[:, :, None])
        x = (x.flatten(2) + shift.repeat(1, 1, 2)).type_as(x)
        x = self.proj(x)
        x = x.squeeze(1)
        return x.reshape(len(x), count, -1)


class Sliced(Toy):
    """Takes all tokens, in calls like these."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        count = x.shape[1]
        for block in self.blocks:
            x = block(x)
        x = self.proj(x)[:, -count:]
        return x


class Remembering(Toy):
    """The stream is read after the tail, besides what the tail makes of it."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.norm(x, temb)
        out = self.proj(x)
        return torch.cat([out, x], dim=2)


class Sometimes(Toy):
    """Some calls run no loop."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if temb.ndim == 3:
            for block in self.blocks:
                x = block(x)
        x = self.proj(x)
        return x


def test_statements_that_map_each_token_by_itself_are_found() -> None:
    assert _measured(Toy()) == Tail(
        "x", ("x = self.norm(x, temb)", "out = self.proj(x)"), "out"
    )


@pytest.mark.parametrize("mix", [Averaging, Grouping, Placing, Dropping])
def test_a_tail_that_mixes_tokens_has_none(mix: type[nn.Module]) -> None:
    assert _measured(Toy(mix()), SIZES[:1]) is None


def test_a_modulation_by_token_is_left_alone() -> None:
    assert _measured(Toy(), by_token=True) is None


def test_one_call_of_several_is_enough_to_leave_it_alone() -> None:
    assert _measured(Toy(Dropping())) is None


def test_values_beside_the_stream_stay_and_a_squeeze_ends_it() -> None:
    found = _measured(Wide(), channels=C)
    assert found is not None
    assert (found.stream, found.result) == ("x", "x")
    assert found.statements[0] == "shift = shift.to(x.dtype)"
    assert found.statements[-1] == "x = self.proj(x)"


def test_it_ends_where_the_stream_is_read_besides() -> None:
    assert _measured(Remembering()) == Tail("x", ("x = self.norm(x, temb)",), "x")


@pytest.mark.parametrize("model", [Sliced, Sometimes])
def test_syntax_alone_leaves_it_alone(model: type[Toy]) -> None:
    assert _measured(model()) is None


def test_tokens_that_only_some_calls_have_are_left_alone() -> None:
    axis = TokenAxis(1, ("x",), ndim=3, optional=True)
    assert _measured(Toy(), axis=axis) is None


def _measured(
    model: Toy,
    sizes: tuple[int, ...] = SIZES,
    *,
    by_token: bool = False,
    channels: int = C,
    axis: TokenAxis = _AXIS,
) -> Tail | None:
    torch.manual_seed(0)
    source = ParsedModule(__name__, "toy.py", Path(__file__).read_text("utf-8"))
    owner = source.class_def(type(model).__name__)
    forward = find_method(source, owner, "forward")
    (loop,) = find_block_loops(source, forward)
    facts = LoopFacts(
        blocks="blocks",
        lengths={"x": ("x", 1)},
        latents="x",
        context=None,
        rows=(),
        values={"x": (axis,)},
    )
    calls = [
        TransformerCall(
            "transformer",
            {
                "x": torch.randn(B, size, C),
                "temb": torch.randn(B, size if by_token else 1, channels),
            },
        )
        for size in sizes
    ]
    return measure_tail(model, source, forward, loop, facts, calls)
