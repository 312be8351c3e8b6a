"""The data sets that scikit-learn carries with it: digits (classes or regression), wine, breast-cancer, diabetes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pullback.problems.errors import missing_extra
from pullback.problems.models import hidden_widths, mlp, seeded
from pullback.problems.preparation import DTYPES, dtype_of, standardise
from pullback.problems.problem import Problem, Split, accuracy
from pullback.problems.registry import register


@register("digits")
def digits(
    *, depth: int | None = None, width: int = 64, batch_size: int | None = 128, dtype: str = "float32"
) -> Problem:
    """Handwritten digits of 8 x 8 pixels, 10 classes: tanh MLP 64-64-32-10, cross-entropy, mini-batches.

    Args:
        depth: Linear layers, all hidden ones `width` wide; none for three, the second hidden one half as wide.
        width: First hidden width.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 1437 training and 360 test rows, pixels divided by 16.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    train, test = _load("digits", dtype_of("digits", dtype))
    widths = [64, *hidden_widths("digits", width, depth), 10]
    return Problem(
        name="digits",
        make_model=seeded(lambda: mlp(widths, nn.Tanh, DTYPES[dtype])),
        train=(train[0] / 16, train[1]),
        test=(test[0] / 16, test[1]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        dtype=DTYPES[dtype],
        targets=(1e-1, 1e-2),
        description="scikit-learn digits, tanh MLP, cross-entropy",
    )


@register("digits-regression")
def digits_regression(
    *, depth: int | None = None, width: int = 64, batch_size: int | None = 128, dtype: str = "float32"
) -> Problem:
    """Handwritten digits as regression to one-hot targets: tanh MLP 64-64-32-10, squared error, mini-batches.

    Args:
        depth: Linear layers, all hidden ones `width` wide; none for three, the second hidden one half as wide.
        width: First hidden width.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 1437 training and 360 test rows, pixels divided by 16, targets of shape (N, 10); the test
        metric is the accuracy of the largest output.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    classes = digits(depth=depth, width=width, batch_size=batch_size, dtype=dtype)
    assert classes.test is not None
    return replace(
        classes,
        name="digits-regression",
        train=(classes.train[0], one_hot(classes.train[1]).to(classes.dtype)),
        test=(classes.test[0], one_hot(classes.test[1]).to(classes.dtype)),
        criterion=nn.MSELoss(),
        test_metric=_one_hot_accuracy,
        targets=(1e-2, 1e-3),
        description="scikit-learn digits, tanh MLP, squared error of one-hot targets",
    )


def _one_hot_accuracy(outputs: Tensor, targets: Tensor) -> float:
    return accuracy(outputs, targets.argmax(1))


_one_hot_accuracy.__name__ = "accuracy"


@register("wine")
def wine(*, depth: int = 3, width: int = 16, batch_size: int | None = None, dtype: str = "float32") -> Problem:
    """Chemistry of wines from 3 growers: tanh MLP 13-16-16-3, cross-entropy, full batch.

    Args:
        depth: Linear layers; 1 is a linear model.
        width: Hidden width.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 142 training and 36 test rows, standardised by the training rows.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    return _standardised_classes("wine", "wine", depth, width, batch_size, dtype)


@register("breast-cancer")
def breast_cancer(*, depth: int = 3, width: int = 16, batch_size: int | None = None, dtype: str = "float32") -> Problem:
    """Cell nuclei, benign or malignant (Wisconsin): tanh MLP 30-16-16-2, cross-entropy, full batch.

    Args:
        depth: Linear layers; 1 is a linear model.
        width: Hidden width.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 455 training and 114 test rows, standardised by the training rows.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    return _standardised_classes("breast-cancer", "breast_cancer", depth, width, batch_size, dtype)


@register("diabetes")
def diabetes(*, depth: int = 3, width: int = 16, batch_size: int | None = None, dtype: str = "float64") -> Problem:
    """Progress of diabetes after a year, regression: tanh MLP 10-16-16-1, squared error, full batch, float64.

    Args:
        depth: Linear layers; 1 is a linear model.
        width: Hidden width.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".

    Returns:
        The problem: 353 training and 89 test rows, inputs and target standardised by the training rows, so
        the test metric is in standard deviations of the target.

    Raises:
        SpecError: If the dtype or a size makes no sense.
        MissingExtraError: If scikit-learn is not installed.
    """
    train, test = _load("diabetes", dtype_of("diabetes", dtype))
    widths = [10, *hidden_widths("diabetes", width, depth), 1]
    inputs, outputs = standardise(train[0], test[0]), standardise(train[1], test[1])
    return Problem(
        name="diabetes",
        make_model=seeded(lambda: mlp(widths, nn.Tanh, DTYPES[dtype])),
        train=(inputs[0], outputs[0].unsqueeze(1)),
        test=(inputs[1], outputs[1].unsqueeze(1)),
        criterion=nn.MSELoss(),
        batch_size=batch_size,
        dtype=DTYPES[dtype],
        test_metric="rmse",
        targets=(0.1, 1e-3, 1e-6),
        description="scikit-learn diabetes, tanh MLP, squared error of the standardised target",
    )


def _standardised_classes(
    name: str, loader: str, depth: int, width: int, batch_size: int | None, dtype: str
) -> Problem:
    train, test = _load(loader, dtype_of(name, dtype))
    inputs = standardise(train[0], test[0])
    widths = [inputs[0].shape[1], *hidden_widths(name, width, depth), int(train[1].max()) + 1]
    return Problem(
        name=name,
        make_model=seeded(lambda: mlp(widths, nn.Tanh, DTYPES[dtype])),
        train=(inputs[0], train[1]),
        test=(inputs[1], test[1]),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        dtype=DTYPES[dtype],
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
