"""Products that take in a GELU behind them or the joining before them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.runtime.cuda.rewritten import check, kernels_in, names, rewritten
from xfuser_runtime.cuda import products
from xfuser_runtime.cuda.passes import CodePass

pytestmark = pytest.mark.usefixtures("inference")

ROWS = 256


class FeedForward(nn.Module):
    """A feed-forward layer as diffusers writes them: (B, S, C) to (B, S, C)."""

    def __init__(self, approximate: str = "tanh", bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=bias), nn.Linear(32, 8)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Joined(nn.Module):
    """Two tensors that are joined by channels and multiplied once."""

    def __init__(self, bias: bool = True, channels: int = 8) -> None:
        super().__init__()
        self.out = nn.Linear(2 * channels, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([x, x.sin()], dim=2))


def rows(channels: int = 8, count: int = ROWS) -> torch.Tensor:
    return torch.randn(2, count // 2, channels)


def test_a_gelu_behind_a_product() -> None:
    assert names(check(FeedForward(), rows())) == ["gelu_product"]


@pytest.mark.parametrize("bias", [True, False])
def test_joining_before_a_product(bias: bool) -> None:
    assert names(check(Joined(bias), rows())) == ["joined_product"]


def test_a_lost_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sabotage: the product of the first part alone."""
    module, x = Joined(), rows()
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda out, *_: out)
    call, _ = rewritten(module)
    found, expected = call(x), module(x)
    assert (found - expected).norm() > 1e-2 * expected.norm()


class Shared(FeedForward):
    """Others read what the product makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return self.down(F.gelu(up, approximate="tanh")) + up[..., :8]


@pytest.mark.parametrize(
    "module",
    [
        FeedForward("none"),
        FeedForward(bias=False),
        Shared(),
        Joined(channels=4),
    ],
)
def test_others_stay(module: nn.Module) -> None:
    assert not check(module, rows(4 if isinstance(module, Joined) else 8))


class Writing(FeedForward):
    """Something is written to beside the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * 2
        out[..., :2].addcmul_(x[..., 2:4], x[..., 4:6])
        return super().forward(out)


def test_what_is_written_beside_stays_written() -> None:
    assert names(check(Writing(), rows())) == ["gelu_product"]


class WritingBetween(Joined):
    """A part is written to once it is joined."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = x * 2
        joined = torch.cat([x, part], dim=2)
        part.add_(1)
        return self.out(joined) + part[..., :1]


def test_what_is_written_to_in_between_stays() -> None:
    assert not check(WritingBetween(), rows())


def test_few_columns_are_left_to_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_COLUMNS", 9)
    assert not check(Joined(), rows())


def test_few_rows_are_joined() -> None:
    assert not check(Joined(), rows(count=ROWS - 2))


@pytest.mark.parametrize("for_compiler", [True, False])
def test_nothing_changes_under_autocast_or_with_gradients(for_compiler: bool) -> None:
    module, x = FeedForward(), rows()
    with torch.autocast("cpu", torch.bfloat16):
        call, calls = rewritten(module, for_compiler=for_compiler)
        assert call(x).dtype == module(x).dtype == torch.bfloat16
    with torch.enable_grad():
        call, more = rewritten(module, for_compiler=for_compiler)
        call(x).sum().backward()
    assert calls and more and not kernels_in([*calls, *more])
    assert module.up.weight.grad is not None


def test_the_pass_has_a_key_for_the_cache_of_compiled_code() -> None:
    assert CodePass().uuid() == CodePass().uuid()


def stock_gelu(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b), approximate="tanh")


def stock_joined(
    x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    return F.linear(torch.cat([x, y], -1), w, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kernel", "stock", "shapes"),
    [
        (products.gelu_product, stock_gelu, [(3, 100, 64), (256, 64), (256,)]),
        (
            products.joined_product,
            stock_joined,
            [(3, 100, 64), (3, 100, 128), (256, 192), (256,)],
        ),
    ],
)
def test_on_a_gpu(
    kernel: Callable[..., torch.Tensor],
    stock: Callable[..., torch.Tensor],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    """As near to the result in doubles as the operations one by one are."""
    given = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    expected = stock(*(x.double() for x in given))

    def error(found: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    assert error(kernel(*given)) < 1.5 * error(stock(*given)) + 1e-6
