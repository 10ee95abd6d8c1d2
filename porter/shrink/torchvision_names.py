"""What diffusers' own code asks of torchvision, for machines that cannot have it.

torchvision is built for one build of torch, so it may be missing beside another.  Modules of
diffusers import from it under a test of their own; a tiny copy then stops at a name that
nobody bound.  Where the real package is missing, :func:`provide` carries out those imports
with the few functions below, which do what torchvision's do.  No other library sees them.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PACKAGE = "torchvision"
GUARD = "is_torchvision_available"
"""Name of diffusers' test, which modules import when they have guarded imports."""


class InterpolationMode(enum.Enum):
    """Ways to resize; the one that bodies ask for."""

    NEAREST = "nearest"


def resize(
    img: torch.Tensor, size: Sequence[int], interpolation: InterpolationMode
) -> torch.Tensor:
    """``img`` (..., H, W) at ``size``, each pixel the one at or above and left of its place.

    Raises:
        ValueError: ``size`` is no height and width.
    """
    if len(size) != 2:
        raise ValueError(f"resize got size {list(size)}, expected height and width")
    lead = img.shape[:-2]
    flat = img.reshape(-1, 1, *img.shape[-2:]).float()
    resized = F.interpolate(flat, size=tuple(size), mode=interpolation.value)
    return resized.reshape(*lead, *size).to(img.dtype)


def to_tensor(picture: Any) -> torch.Tensor:
    """A picture of bytes as (C, H, W) from 0 to 1."""
    array = np.array(picture, np.uint8, copy=True)
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1).float() / 255


class Compose:
    """Applies one function after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        """The result of the last function."""
        for transform in self.transforms:
            value = transform(value)
        return value


class Lambda:
    """Applies a function."""

    def __init__(self, lambd: Callable[[Any], Any]) -> None:
        self.lambd = lambd

    def __call__(self, value: Any) -> Any:
        """The function's result."""
        return self.lambd(value)


class ToTensor:
    """:func:`to_tensor` as an object."""

    def __call__(self, picture: Any) -> torch.Tensor:
        """A picture of bytes as (C, H, W) from 0 to 1."""
        return to_tensor(picture)


class Normalize:
    """Brings each channel from ``mean`` and ``std`` to zero and one."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], inplace: bool = False
    ) -> None:
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """A picture (C, H, W); always a new tensor, which no caller can tell."""
        return (picture - self.mean) / self.std


def provide() -> bool:
    """Carry out the guarded imports of every module of diffusers that is loaded.

    Call it once the class to run is imported; calling it again serves what was loaded
    since.

    Returns:
        Whether torchvision is missing and a loaded module asks for it.
    """
    from diffusers.utils import import_utils

    if import_utils.is_torchvision_available():
        return False
    served: list[ModuleType] = []
    with _installed():
        # An import may load another module that has guarded imports.
        while found := [m for m in _guarded_modules() if m not in served]:
            for module in found:
                _carry_out(module)
            served += found
    return bool(served)


@contextmanager
def _installed() -> Iterator[None]:
    """`import torchvision` finds this module's names, here and now."""
    functional = ModuleType(f"{PACKAGE}.transforms.functional")
    vars(functional).update(resize=resize, to_tensor=to_tensor)
    transforms = ModuleType(f"{PACKAGE}.transforms")
    vars(transforms).update(
        functional=functional,
        InterpolationMode=InterpolationMode,
        Compose=Compose,
        Lambda=Lambda,
        ToTensor=ToTensor,
        Normalize=Normalize,
    )
    package = ModuleType(PACKAGE)
    vars(package).update(transforms=transforms)
    modules = {module.__name__: module for module in (package, transforms, functional)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _guarded_modules() -> list[ModuleType]:
    """Loaded modules of pipelines and models whose guarded imports name torchvision."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("diffusers.pipelines.", "diffusers.models."))
        and GUARD in vars(module)
        and _guarded_imports(module)
    ]


@functools.cache
def _guarded_imports(module: ModuleType) -> list[ast.stmt]:
    return [
        statement
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == f"{GUARD}()"
        for statement in node.body
    ]


def _carry_out(module: ModuleType) -> None:
    body = ast.Module(_guarded_imports(module), type_ignores=[])
    exec(compile(body, str(module.__file__), "exec"), vars(module))
