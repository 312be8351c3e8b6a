"""The data sets that scikit-learn carries with it: digits, wine, breast-cancer, diabetes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pullback.problems.errors import SpecError, missing_extra, nearest
from pullback.problems.models import mlp, seeded
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@register("digits")
def digits(*, width: int = 64, batch_size: int | None = 128, dtype: str = "float32") -> Problem:
    """Handwritten digits of 8 x 8 pixels, 10 classes: tanh MLP 64-64-32-10, cross-entropy, mini-batches.

    Args:
        width: First hidden width; the second is half of it.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 1437 training and 360 test rows, pixels divided by 16.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    train, test = _load("digits", _dtype("digits", dtype))
    widths = [64, _width("digits", width), max(1, width // 2), 10]
    return Problem(
        name="digits",
        make_model=seeded(lambda: mlp(widths, nn.Tanh, _DTYPES[dtype])),
        train=(train[0] / 16, train[1]),
        test=(test[0] / 16, test[1]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        dtype=_DTYPES[dtype],
        targets=(1e-1, 1e-2),
        description="scikit-learn digits, tanh MLP, cross-entropy",
    )


@register("wine")
def wine(*, width: int = 16, batch_size: int | None = None, dtype: str = "float32") -> Problem:
    """Chemistry of wines from 3 growers: tanh MLP 13-16-16-3, cross-entropy, full batch.

    Args:
        width: Both hidden widths.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 142 training and 36 test rows, standardised by the training rows.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    return _standardised_classes("wine", "wine", width, batch_size, dtype)


@register("breast-cancer")
def breast_cancer(*, width: int = 16, batch_size: int | None = None, dtype: str = "float32") -> Problem:
    """Cell nuclei, benign or malignant (Wisconsin): tanh MLP 30-16-16-2, cross-entropy, full batch.

    Args:
        width: Both hidden widths.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 455 training and 114 test rows, standardised by the training rows.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    return _standardised_classes("breast-cancer", "breast_cancer", width, batch_size, dtype)


@register("diabetes")
def diabetes(*, width: int = 16, batch_size: int | None = None, dtype: str = "float64") -> Problem:
    """Progress of diabetes after a year, regression: tanh MLP 10-16-16-1, squared error, full batch, float64.

    Args:
        width: Both hidden widths.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 353 training and 89 test rows, inputs and target standardised by the training rows, so
        the test metric is in standard deviations of the target.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    train, test = _load("diabetes", _dtype("diabetes", dtype))
    widths = [10, _width("diabetes", width), width, 1]
    inputs, outputs = _standardise(train[0], test[0]), _standardise(train[1], test[1])
    return Problem(
        name="diabetes",
        make_model=seeded(lambda: mlp(widths, nn.Tanh, _DTYPES[dtype])),
        train=(inputs[0], outputs[0].unsqueeze(1)),
        test=(inputs[1], outputs[1].unsqueeze(1)),
        criterion=nn.MSELoss(),
        batch_size=batch_size,
        dtype=_DTYPES[dtype],
        test_metric="rmse",
        targets=(0.1, 1e-3, 1e-6),
        description="scikit-learn diabetes, tanh MLP, squared error of the standardised target",
    )


def _standardised_classes(name: str, loader: str, width: int, batch_size: int | None, dtype: str) -> Problem:
    train, test = _load(loader, _dtype(name, dtype))
    inputs = _standardise(train[0], test[0])
    widths = [inputs[0].shape[1], _width(name, width), width, int(train[1].max()) + 1]
    return Problem(
        name=name,
        make_model=seeded(lambda: mlp(widths, nn.Tanh, _DTYPES[dtype])),
        train=(inputs[0], train[1]),
        test=(inputs[1], test[1]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        dtype=_DTYPES[dtype],
        targets=(1e-1, 1e-2, 1e-3),
        description=f"scikit-learn {name}, tanh MLP, cross-entropy",
    )


def _load(loader: str, dtype: torch.dtype) -> tuple[Split, Split]:
    """Reads a data set and parts it 80 to 20, the same for every seed, stratified if it has classes."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise missing_extra(f"the problem {loader.replace('_', '-')}", "scikit-learn", "problems") from error
    inputs, targets = getattr(datasets, f"load_{loader}")(return_X_y=True)
    classes = targets if targets.dtype.kind == "i" else None
    parts: list[Any] = train_test_split(inputs, targets, test_size=0.2, random_state=0, stratify=classes)
    kind = dtype if classes is None else torch.int64
    x_train, x_test = (torch.tensor(part, dtype=dtype) for part in parts[:2])
    y_train, y_test = (torch.tensor(part, dtype=kind) for part in parts[2:])
    return (x_train, y_train), (x_test, y_test)


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance per column, by the training rows alone."""
    mean, scale = train.mean(0), train.std(0, correction=0)
    return (train - mean) / scale, (test - mean) / scale


def _dtype(owner: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise SpecError(f"dtype of {owner} cannot be {name!r}.{nearest(name, _DTYPES)}")
    return _DTYPES[name]


def _width(owner: str, width: int) -> int:
    if width < 1:
        raise SpecError(f"width of {owner} is {width}; give 1 or more.")
    return width
