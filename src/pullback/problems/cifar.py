"""The first 4000 training images of CIFAR-10, read from a data folder."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, missing_extra
from pullback.problems.models import seeded
from pullback.problems.problem import Problem
from pullback.problems.registry import register
from pullback.problems.vision import image_net

_FILE = "cifar10/cifar10_exact_first4000.npz"
_REMEDY = (
    "it holds X (4000, 32, 32, 3) and y (4000,), both uint8: the first 4000 images of the official training batches; "
    f"put it in DATA/{_FILE}."
)
_SHAPE = (4000, 32, 32, 3)
_TRAINED = 3200


@register("cifar10")
def cifar10(
    *,
    net: str = "conv4",
    channels: int | None = None,
    batch_size: int | None = 128,
    data: Path | None = None,
) -> Problem:
    """CIFAR-10, the first 4000 training images, 10 classes: convolutional network, cross-entropy, mini-batches.

    Rows 0 to 3199 are trained on, rows 3200 to 3999 are the validation data. There is no test split: what is chosen
    by the validation data and reported on them is optimistic, and no number here compares with published ones.

    Args:
        net: "conv4" (four 3 x 3 x 32 convolutions, two linear layers), "residual", "inception" or "small".
        channels: Channels of the first layer, None for the network's own: 32, 16, 16 or 8.
        batch_size: Rows per step, or None for all.
        data: Folder that contains ``cifar10/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; inputs (N, 3, 32, 32) float32, standardised per colour by the rows trained on.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If there is no such network, or a size makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    build = image_net("cifar10", net, (3, 32), channels)
    pixels, labels = _read(data_folder("cifar10", data, _REMEDY) / _FILE)
    images = pixels.permute(0, 3, 1, 2).float() / 255
    mean, scale = (f(images[:_TRAINED]).reshape(1, 3, 1, 1) for f in (_mean, _scale))
    images = (images - mean) / scale
    return Problem(
        name="cifar10",
        make_model=seeded(build),
        train=(images[:_TRAINED], labels[:_TRAINED]),
        validation=(images[_TRAINED:], labels[_TRAINED:]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=(1.0, 0.3, 0.1),
        description=f"CIFAR-10, 3200 images, {net} network, cross-entropy",
    )


def _mean(images: Tensor) -> Tensor:
    return images.mean((0, 2, 3))


def _scale(images: Tensor) -> Tensor:
    return images.std((0, 2, 3), correction=0)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        import numpy as np
    except ImportError as error:
        raise missing_extra("the problem cifar10", "numpy", "problems") from error
    try:
        # Opened here, since numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: list[Any] = [file["X"], file["y"]]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REMEDY}") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {_REMEDY}") from error
    images, labels = arrays
    if images.shape != _SHAPE or labels.shape != _SHAPE[:1] or images.dtype != np.uint8 or labels.max() > 9:
        raise DataError(f"{path} has images {images.shape} {images.dtype} and labels {labels.shape}; {_REMEDY}")
    return torch.from_numpy(images), torch.from_numpy(labels).to(torch.int64)
