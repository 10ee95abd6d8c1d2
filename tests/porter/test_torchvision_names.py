"""Stand-ins for torchvision's functions, and their place in modules of diffusers."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from porter.shrink.torchvision_names import (
    GUARD,
    InterpolationMode,
    _carry_out,
    _guarded_imports,
    _installed,
    provide,
    resize,
    to_tensor,
)

GUARDED = f"""
from diffusers.utils import {GUARD}

if {GUARD}():
    import torchvision.transforms.functional
    from torchvision import transforms
"""


def test_resize_takes_the_pixel_at_or_before_each_place() -> None:
    # What torchvision's does for NEAREST: row floor(i * rows / height) and so the columns.
    picture = torch.arange(2 * 7 * 10.0).view(1, 2, 7, 10)
    rows, columns = torch.tensor([0, 2, 4]), torch.tensor([0, 2, 5, 7])
    found = resize(picture, [3, 4], interpolation=InterpolationMode.NEAREST)
    assert torch.equal(found, picture[:, :, rows][..., columns])
    assert torch.equal(
        resize(picture[0].byte(), [3, 4], InterpolationMode.NEAREST), found[0].byte()
    )


def test_resize_wants_height_and_width() -> None:
    with pytest.raises(ValueError, match="expected height and width"):
        resize(torch.zeros(1, 4, 4), [2], interpolation=InterpolationMode.NEAREST)


def test_pictures_become_channels_from_zero_to_one() -> None:
    colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    found = to_tensor(Image.fromarray(colours, "RGB"))
    assert torch.equal(found, torch.from_numpy(colours).permute(2, 0, 1) / 255)
    grey = to_tensor(Image.fromarray(colours[..., 0], "L"))
    assert torch.equal(grey[0], torch.from_numpy(colours[..., 0]) / 255)


def test_transforms_are_applied_in_turn() -> None:
    with _installed():
        from torchvision import transforms
    steps = [transforms.Lambda(lambda picture: picture.rotate(180))]
    steps += [
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
    ]
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    found = transforms.Compose(steps)(Image.fromarray(colours, "RGB"))
    expected = torch.from_numpy(colours).permute(2, 0, 1).flip(1, 2) / 255 * 2 - 1
    assert torch.allclose(found, expected)


def test_guarded_imports_are_carried_out_in_the_module_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("guarded") / "guarded_names.py"
    path.write_text(GUARDED)
    monkeypatch.syspath_prepend(str(path.parent))
    import guarded_names  # type: ignore[import-not-found]

    assert len(_guarded_imports(guarded_names)) == 2
    with _installed():
        _carry_out(guarded_names)
    assert guarded_names.transforms.functional.resize is resize
    assert guarded_names.torchvision.transforms.functional.to_tensor is to_tensor
    assert "torchvision" not in sys.modules


def test_names_are_provided_where_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import diffusers.models.transformers.transformer_cosmos as asking
    from diffusers.utils import import_utils

    monkeypatch.setattr(import_utils, "_torchvision_available", True)
    monkeypatch.delattr(asking, "transforms", raising=False)
    assert not provide()
    assert not hasattr(asking, "transforms")
    monkeypatch.setattr(import_utils, "_torchvision_available", False)
    assert provide()
    assert isinstance(asking.transforms, ModuleType)
    assert asking.transforms.InterpolationMode.NEAREST is InterpolationMode.NEAREST
