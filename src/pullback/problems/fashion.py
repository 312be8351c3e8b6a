"""Fashion-MNIST, read from a data folder: an MLP and a small convolutional network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError
from pullback.problems.idx import read_idx
from pullback.problems.models import mlp, seeded
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register

_FOLDER = "fashion_mnist"
_REMEDY = f"put the four .gz files of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist) in DATA/{_FOLDER}."
# Of all training pixels divided by 255, so that a subset is scaled as the whole.
_MEAN, _SCALE = 0.2860, 0.3530
_TARGETS = (0.5, 0.3, 0.2)


@register("fashion-mnist")
def fashion_mnist(
    *,
    rows: int | None = None,
    test_rows: int | None = None,
    batch_size: int | None = 128,
    width: int = 256,
    data: Path | None = None,
) -> Problem:
    """Fashion-MNIST, 28 x 28 pixels, 10 classes: ReLU MLP 784-256-128-10, cross-entropy, mini-batches.

    Args:
        rows: How many of the first training rows to use, None for all 60000.
        test_rows: How many of the first test rows to use, None for all 10000.
        batch_size: Rows per step, or None for all.
        width: First hidden width; the second is half of it.
        data: Folder that contains ``fashion_mnist/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; inputs (N, 784) float32, standardised with one mean and scale.

    Raises:
        DataError: If the data folder or a file is missing or damaged.
        SpecError: If a size makes no sense.
    """
    if width < 1:
        raise SpecError(f"width of fashion-mnist is {width}; give 1 or more.")
    train, test = _load("fashion-mnist", data, rows, test_rows)
    return Problem(
        name="fashion-mnist",
        make_model=seeded(lambda: mlp([784, width, max(1, width // 2), 10], nn.ReLU)),
        train=(train[0].flatten(1), train[1]),
        test=(test[0].flatten(1), test[1]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=_TARGETS,
        description="Fashion-MNIST, ReLU MLP, cross-entropy",
    )


@register("fashion-mnist-cnn")
def fashion_mnist_cnn(
    *,
    rows: int | None = None,
    test_rows: int | None = None,
    batch_size: int | None = 128,
    channels: int = 8,
    data: Path | None = None,
) -> Problem:
    """Fashion-MNIST, 28 x 28 pixels, 10 classes: two strided 3 x 3 convolutions and a linear layer, ReLU.

    Args:
        rows: How many of the first training rows to use, None for all 60000.
        test_rows: How many of the first test rows to use, None for all 10000.
        batch_size: Rows per step, or None for all.
        channels: Channels of the first convolution; the second has twice as many.
        data: Folder that contains ``fashion_mnist/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; inputs (N, 1, 28, 28) float32, standardised with one mean and scale.

    Raises:
        DataError: If the data folder or a file is missing or damaged.
        SpecError: If a size makes no sense.
    """
    if channels < 1:
        raise SpecError(f"channels of fashion-mnist-cnn is {channels}; give 1 or more.")
    train, test = _load("fashion-mnist-cnn", data, rows, test_rows)
    return Problem(
        name="fashion-mnist-cnn",
        make_model=seeded(lambda: _cnn(channels)),
        train=train,
        test=test,
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=_TARGETS,
        description="Fashion-MNIST, small ReLU CNN, cross-entropy",
    )


def _cnn(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 49, 10),
    )


def _load(owner: str, data: Path | None, rows: int | None, test_rows: int | None) -> tuple[Split, Split]:
    folder = data_folder(owner, data) / _FOLDER
    return _split(owner, folder, "train", "rows", rows), _split(owner, folder, "t10k", "test_rows", test_rows)


def _split(owner: str, folder: Path, part: str, option: str, rows: int | None) -> Split:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3, _REMEDY)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1, _REMEDY)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise DataError(f"{part} of {folder} has images {tuple(images.shape)} and {len(labels)} labels; {_REMEDY}")
    if rows is not None and not 1 <= rows <= len(images):
        raise SpecError(f"{option} of {owner} is {rows}; give 1 to {len(images)}.")
    inputs: Tensor = (images[:rows, None].float() / 255 - _MEAN) / _SCALE
    return inputs, labels[:rows].to(torch.int64)
