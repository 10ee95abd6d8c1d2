"""Conv2d and PatchEmbed on bands of rows, over ranks and over patches, against whole images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from tests.ranks import run_ranks
from xfuser_runtime.config import EngineConfig, ParallelConfig
from xfuser_runtime.distributed.parallel_state import (
    get_sp_group,
    initialize_model_parallel,
)
from xfuser_runtime.distributed.runtime_state import (
    destroy_runtime_state,
    initialize_runtime_state,
)
from xfuser_runtime.layers import RowBands, conv, row_bands, wrap_layer

GATE, CAUGHT = 2e-6, 30.0

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "same": lambda: nn.Conv2d(3, 4, (5, 3), padding="same"),
    "valid": lambda: nn.Conv2d(3, 4, (3, 1)),
    "stride 2": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "stride 2, wide": lambda: nn.Conv2d(3, 4, 5, stride=2, padding=2),
    "patchify": lambda: nn.Conv2d(3, 4, 2, stride=2),
    "dilated": lambda: nn.Conv2d(3, 4, 3, padding=4, dilation=4),
    "wide halo": lambda: nn.Conv2d(3, 4, 11, padding=5),
    "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "columns wrap": lambda: nn.Conv2d(
        3, 4, (1, 3), padding=(0, 1), padding_mode="circular"
    ),
    "two layers, upsampled": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.SiLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 2, 3, padding=1),
    ),
}
BORDERS = {2: (0, 4, 10), 4: (0, 2, 4, 8, 10)}


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    yield
    destroy_runtime_state()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CONVOLUTIONS[name]()
    return model.eval()


def wrapped(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, PatchEmbed)):
            wrap_layer(module)
    return model


def image(name: str, seed: int = 0, height: int = 10) -> torch.Tensor:
    channels = 4 if name == "grouped" else 3
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, height, 10, generator=generator)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def errors_on_ranks(
    names: list[str], ranks: int, sabotage: Callable[[], None] | None = None
) -> dict[str, float]:
    def body(rank: int) -> dict[str, torch.Tensor]:
        initialize_model_parallel(ParallelConfig(ring_degree=ranks))
        if sabotage is not None:
            sabotage()
        borders = BORDERS[ranks]
        bands = RowBands(borders, rank, get_sp_group())
        found = {}
        for name in names:
            model = wrapped(made(name))
            with torch.no_grad(), row_bands(model, bands):
                found[name] = model(
                    image(name)[:, :, borders[rank] : borders[rank + 1]]
                )
        return found

    results = run_ranks(body, ranks)
    return {
        name: error(
            torch.cat([r[name] for r in results], dim=2), made(name)(image(name))
        )
        for name in names
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_bands_on_ranks_match_the_whole_image(ranks: int) -> None:
    found = errors_on_ranks(list(CONVOLUTIONS), ranks)
    assert not {name: e for name, e in found.items() if e > GATE}


def drop_halo() -> None:
    """What the neighbours send does not arrive."""
    genuine = conv.all_to_all

    def lossy(pieces: Any, shapes: Any, group: Any) -> Any:
        return [[x.zero_() for x in row] for row in genuine(pieces, shapes, group)]

    conv.all_to_all = lossy


def shift_halo() -> None:
    genuine = conv.all_to_all

    def shifted(pieces: Any, shapes: Any, group: Any) -> Any:
        return [[x.roll(1, 3) for x in row] for row in genuine(pieces, shapes, group)]

    conv.all_to_all = shifted


@pytest.mark.parametrize("sabotage", [drop_halo, shift_halo])
@pytest.mark.parametrize("name", ["3x3", "wide halo", "two layers, upsampled"])
def test_sabotaged_exchange_is_caught(name: str, sabotage: Callable[[], None]) -> None:
    assert errors_on_ranks([name], 2, sabotage)[name] >= CAUGHT * GATE


def passes(model: nn.Module, borders: tuple[int, ...], name: str) -> list[torch.Tensor]:
    """A whole pass on image 1, then image 2 patch by patch."""
    state = initialize_runtime_state(EngineConfig())
    state.start_pass(step=0, patch=None)
    outputs = []
    with torch.no_grad():
        with row_bands(model, RowBands(borders, None)):
            outputs.append(model(image(name, 1)))
        for band in range(len(borders) - 1):
            state.start_pass(step=1, patch=band)
            rows = image(name, 2)[:, :, borders[band] : borders[band + 1]]
            with row_bands(model, RowBands(borders, band)):
                outputs.append(model(rows))
    return outputs


def patch_error(name: str, stale_seed: int = 1) -> float:
    """Largest error of a pass against images put together from fresh and stale rows."""
    borders = BORDERS[4]
    whole, *patches = passes(wrapped(made(name)), borders, name)
    with torch.no_grad():
        worst = error(whole, made(name)(image(name, 1)))
        mixed = image(name, stale_seed).clone()
        for band, found in enumerate(patches):
            here = slice(borders[band], borders[band + 1])
            mixed[:, :, here] = image(name, 2)[:, :, here]
            out = made(name)(mixed)
            scale = out.shape[2] / 10
            expected = out[:, :, int(here.start * scale) : int(here.stop * scale)]
            worst = max(worst, error(found, expected))
    return worst


@pytest.mark.parametrize(
    "name", ["3x3", "same", "stride 2, wide", "dilated", "wide halo"]
)
def test_patches_see_stale_halos(name: str) -> None:
    assert patch_error(name) <= GATE
    # The same check fails when the halo of the whole image were fresh.
    assert patch_error(name, stale_seed=2) >= CAUGHT * GATE


def test_whole_images_are_upstreams_call() -> None:
    for name in CONVOLUTIONS:
        assert torch.equal(wrapped(made(name))(image(name)), made(name)(image(name)))


def test_conv_refusals() -> None:
    bands = RowBands((0, 5, 10), 0)
    reflecting = wrap_layer(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    with (
        row_bands(reflecting, bands),
        pytest.raises(ValueError, match="'reflect' on ban"),
    ):
        reflecting(image("3x3")[:, :, :5])
    strided = wrapped(made("patchify"))
    with (
        row_bands(strided, bands),
        pytest.raises(ValueError, match="multiples of the st"),
    ):
        strided(image("3x3")[:, :, :5])
    with pytest.raises(ValueError, match="expected them to rise from 0"):
        RowBands((0, 5, 5, 10), 0)
    with pytest.raises(ValueError, match="expected borders on whole rows"):
        RowBands((0, 4, 10), 0).scaled(3)


def test_a_layer_without_a_wrapper_is_refused() -> None:
    with pytest.raises(ValueError, match="Layer Conv3d is not supported by xFuser"):
        wrap_layer(nn.Conv3d(1, 1, 1))


def test_subclasses_of_a_layer() -> None:
    class Plain(nn.Conv2d):
        """Keeps Conv2d's forward."""

    class Own(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    layer = Plain(3, 4, 1)
    assert wrap_layer(wrap_layer(layer)) is layer
    assert isinstance(layer, conv.xFuserConv2dWrapper) and layer.__class__ is Plain
    with pytest.raises(ValueError, match="Layer Own is not supported by xFuser"):
        wrap_layer(Own(3, 4, 1))


EMBEDDINGS: dict[str, Callable[[], PatchEmbed]] = {
    "own size": lambda: PatchEmbed(10, 10, 2, 3, 8),
    "interpolated": lambda: PatchEmbed(16, 16, 2, 3, 8, interpolation_scale=2),
    "cropped": lambda: PatchEmbed(16, 16, 2, 3, 8, pos_embed_max_size=12),
    "normed": lambda: PatchEmbed(16, 16, 2, 3, 8, layer_norm=True),
    "without positions": lambda: PatchEmbed(16, 16, 2, 3, 8, pos_embed_type=None),
}


def embed_error(name: str, *, shifted: bool = False) -> float:
    torch.manual_seed(0)
    model = EMBEDDINGS[name]()
    expected, borders = model(image("3x3")), (0, 4, 10)
    wrapped(model)
    found = []
    for band in range(2):
        rows = image("3x3")[:, :, borders[band] : borders[band + 1]]
        at = RowBands((0, 6, 10), 1 - band) if shifted else RowBands(borders, band)
        with row_bands(model, at):
            found.append(model(rows))
    return error(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_patch_embed_gives_the_bands_tokens(name: str) -> None:
    assert embed_error(name) <= GATE


@pytest.mark.parametrize("name", ["own size", "interpolated", "cropped", "normed"])
def test_position_rows_off_by_a_band_are_caught(name: str) -> None:
    assert embed_error(name, shifted=True) >= CAUGHT * GATE


def test_patch_embed_refuses_half_patches() -> None:
    model = wrap_layer(EMBEDDINGS["own size"]())
    with (
        row_bands(model, RowBands((0, 3, 10), 0)),
        pytest.raises(ValueError, match="multiples of the patch size"),
    ):
        model(image("3x3")[:, :, :3])
