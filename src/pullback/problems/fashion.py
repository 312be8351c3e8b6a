"""Fashion-MNIST, read from a data folder: an MLP and convolutional networks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError
from pullback.problems.idx import read_idx
from pullback.problems.models import hidden_widths, mlp, seeded
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register
from pullback.problems.vision import image_net

_FOLDER = "fashion_mnist"
_REMEDY = f"put the four .gz files of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist) in DATA/{_FOLDER}."
# Of all training pixels divided by 255, so that a subset is scaled as the whole.
_MEAN, _SCALE = 0.2860, 0.3530
_TARGETS = (0.5, 0.3, 0.2)


@register("fashion-mnist")
def fashion_mnist(
    *,
    rows: int | None = None,
    validation_rows: int = 0,
    test_rows: int | None = None,
    loss_rows: int | None = None,
    batch_size: int | None = 128,
    depth: int | None = None,
    width: int = 256,
    data: Path | None = None,
) -> Problem:
    """Fashion-MNIST, 28 x 28 pixels, 10 classes: ReLU MLP 784-256-128-10, cross-entropy, mini-batches.

    Args:
        rows: How many of the first training rows to use, None for all 60000 but those for validation.
        validation_rows: How many of the last training rows of the file are validation data and not trained on.
        test_rows: How many of the first test rows to use, None for all 10000.
        loss_rows: On how many of the first training rows the training loss is reported, None for all.
        batch_size: Rows per step, or None for all.
        depth: Linear layers, all hidden ones `width` wide; none for three, the second hidden one half as wide.
        width: First hidden width.
        data: Folder that contains ``fashion_mnist/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; inputs (N, 784) float32, standardised with one mean and scale.

    Raises:
        DataError: If the data folder or a file is missing or damaged.
        SpecError: If a size makes no sense.
    """
    widths = [784, *hidden_widths("fashion-mnist", width, depth), 10]
    parts = _load("fashion-mnist", data, rows, validation_rows, test_rows, loss_rows, (784,))
    return Problem(
        name="fashion-mnist",
        make_model=seeded(lambda: mlp(widths, nn.ReLU)),
        train=parts.train,
        reported=parts.reported,
        validation=parts.validation,
        test=parts.test,
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=_TARGETS,
        description="Fashion-MNIST, ReLU MLP, cross-entropy",
    )


@register("fashion-mnist-cnn")
def fashion_mnist_cnn(
    *,
    rows: int | None = None,
    validation_rows: int = 0,
    test_rows: int | None = None,
    loss_rows: int | None = None,
    batch_size: int | None = 128,
    net: str = "small",
    channels: int | None = None,
    data: Path | None = None,
) -> Problem:
    """Fashion-MNIST, 28 x 28 pixels, 10 classes: convolutional network, cross-entropy, mini-batches.

    Args:
        rows: How many of the first training rows to use, None for all 60000 but those for validation.
        validation_rows: How many of the last training rows of the file are validation data and not trained on.
        test_rows: How many of the first test rows to use, None for all 10000.
        loss_rows: On how many of the first training rows the training loss is reported, None for all.
        batch_size: Rows per step, or None for all.
        net: "small" (two strided 3 x 3 convolutions and a linear layer), "conv4" (four 3 x 3 x 32 convolutions, two
            linear layers), "residual" or "inception".
        channels: Channels of the first layer, None for the network's own: 8, 32, 16 or 16.
        data: Folder that contains ``fashion_mnist/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; inputs (N, 1, 28, 28) float32, standardised with one mean and scale.

    Raises:
        DataError: If the data folder or a file is missing or damaged.
        SpecError: If there is no such network, or a size makes no sense.
    """
    build = image_net("fashion-mnist-cnn", net, (1, 28), channels)
    parts = _load("fashion-mnist-cnn", data, rows, validation_rows, test_rows, loss_rows, (1, 28, 28))
    return Problem(
        name="fashion-mnist-cnn",
        make_model=seeded(build),
        train=parts.train,
        reported=parts.reported,
        validation=parts.validation,
        test=parts.test,
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=_TARGETS,
        description=f"Fashion-MNIST, {net} network, cross-entropy",
    )


class _Parts(NamedTuple):
    """The splits by the names of their fields in `Problem`."""

    train: Split
    reported: Split | None
    validation: Split | None
    test: Split


def _load(
    owner: str,
    data: Path | None,
    rows: int | None,
    validation_rows: int,
    test_rows: int | None,
    loss_rows: int | None,
    shape: tuple[int, ...],
) -> _Parts:
    folder = data_folder(owner, data) / _FOLDER
    images, labels = _read(folder, "train")
    free = len(images) - at_least(owner, "validation_rows", validation_rows, 0)
    if free < 1:
        raise SpecError(f"validation_rows of {owner} is {validation_rows}; give 0 to {len(images) - 1}.")
    used = _checked(owner, "rows", rows, free)
    shown = _checked(owner, "loss_rows", loss_rows, used)
    train = _scaled(images[:used], shape), labels[:used].long()
    validation = _scaled(images[free:], shape), labels[free:].long()
    images, labels = _read(folder, "t10k")
    tested = _checked(owner, "test_rows", test_rows, len(images))
    return _Parts(
        train=train,
        reported=None if loss_rows is None else (train[0][:shown], train[1][:shown]),
        validation=validation if validation_rows else None,
        test=(_scaled(images[:tested], shape), labels[:tested].long()),
    )


def _read(folder: Path, part: str) -> Split:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3, _REMEDY)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1, _REMEDY)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise DataError(f"{part} of {folder} has images {tuple(images.shape)} and {len(labels)} labels; {_REMEDY}")
    return images, labels


def _checked(owner: str, option: str, rows: int | None, most: int) -> int:
    if rows is None:
        return most
    if not 1 <= rows <= most:
        raise SpecError(f"{option} of {owner} is {rows}; give 1 to {most}.")
    return rows


def _scaled(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (pixels.reshape(-1, *shape).float() / 255 - _MEAN) / _SCALE
