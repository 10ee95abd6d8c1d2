"""Pictures on disk: saving a pipeline's output, and how far two pictures are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from xfuser_runtime.errors import InputError, NotSupportedError


def save_output(output: Any, path: Path, *, replica: int = 0) -> list[Path]:
    """Write the first field of a pipeline's output to files.

    Args:
        output: what the pipeline returned; its first field is a list of pictures
            (`output_type` "pil"), or an array or tensor with the batch first.
        path: the file of a single picture. Several are numbered: `name_0.png`, ...
        replica: data-parallel rank; replicas after the first add their number as well,
            since each holds the pictures of its own prompts.

    Returns:
        The files, in the order of the pictures. An array is one file, `name.npy` or
        `name.pt`.

    Raises:
        NotSupportedError: the output is no list of pictures, array or tensor.
    """
    if replica:
        path = path.with_stem(f"{path.stem}_replica{replica}")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = output[0]
    if isinstance(images, torch.Tensor):
        path = path.with_suffix(".pt")
        torch.save(images.cpu(), path)
        return [path]
    if isinstance(images, np.ndarray):
        path = path.with_suffix(".npy")
        np.save(path, images)
        return [path]
    if not all(isinstance(image, Image.Image) for image in images):
        raise NotSupportedError(
            f"an output of {type(images).__name__}, expected pictures, an array or a "
            "tensor; use --output_type np to save it as an array"
        )
    return _save_images(images, path)


def _save_images(images: Sequence[Image.Image], path: Path) -> list[Path]:
    if len(images) == 1:
        files = [path]
    else:
        files = [path.with_stem(f"{path.stem}_{i}") for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def image_difference(path: Path, reference: Path) -> tuple[float, int]:
    """Mean and largest difference of two pictures, in levels of 255.

    Raises:
        InputError: the pictures are of different sizes or modes.
    """
    with Image.open(path) as image, Image.open(reference) as expected:
        if (image.size, image.mode) != (expected.size, expected.mode):
            raise InputError(
                f"{reference}: a picture of {expected.size} {expected.mode}, expected "
                f"{image.size} {image.mode} as in {path}; make both with the same flags"
            )
        pixels = np.asarray(image, dtype=np.int16)
        distance = np.abs(pixels - np.asarray(expected, dtype=np.int16))
    return float(distance.mean()), int(distance.max())
