"""Classes of series: four sets of the UEA and UCR archives with their official split, by driven neural ODEs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.problems import driven
from pullback.problems.data import data_folder
from pullback.problems.driven import Driven, DrivenField
from pullback.problems.errors import DataError, missing_extra
from pullback.problems.models import seeded
from pullback.problems.odes import ode_block
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem
from pullback.problems.registry import register

_FOLDER = "ts_classification"
_TARGETS = (0.3, 0.1, 0.03)


def _remedy(file: str) -> str:
    return (
        f"put {file} of the UEA and UCR archive (timeseriesclassification.com), as arrays X_train, y_train, X_test, "
        f"y_test of shapes (N, channels, length) and (N,), in DATA/{_FOLDER}."
    )


@register("japanese-vowels")
def japanese_vowels(
    *,
    cosines: int = 8,
    hidden: int = 16,
    width: int = 32,
    pace: float = 4.0,
    batch_size: int | None = 64,
    solver: str = "rk4",
    steps: int = 8,
    tolerance: float = 1e-3,
    adjoint: bool = False,
    data: Path | None = None,
) -> Problem:
    """JapaneseVowels, 9 speakers from 12 channels of 7 to 29 values: driven neural ODE, mini-batches.

    Args:
        cosines: Of the path, for each channel.
        hidden: Numbers of the state.
        width: Hidden width of the field.
        pace: Factor on the field.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        data: Folder that contains ``ts_classification/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem: inputs (N, channels + 1, cosines) float32, coefficients of the series as they are in the archive
        and of the time; cross-entropy; official split.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    return _classes(
        "japanese-vowels",
        "JapaneseVowels",
        data,
        cosines,
        hidden,
        width,
        pace,
        batch_size,
        solver,
        steps,
        tolerance,
        adjoint,
    )


@register("articulary-words")
def articulary_words(
    *,
    cosines: int = 12,
    hidden: int = 24,
    width: int = 48,
    pace: float = 4.0,
    batch_size: int | None = 64,
    solver: str = "rk4",
    steps: int = 10,
    tolerance: float = 1e-3,
    adjoint: bool = False,
    data: Path | None = None,
) -> Problem:
    """ArticularyWordRecognition, words from 9 channels of 144 values, 25 classes: driven neural ODE, mini-batches.

    Args:
        cosines: Of the path, for each channel.
        hidden: Numbers of the state.
        width: Hidden width of the field.
        pace: Factor on the field.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        data: Folder that contains ``ts_classification/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem, as for ``japanese-vowels``.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    return _classes(
        "articulary-words", "ArticularyWordRecognition", data, cosines, hidden, width, pace, batch_size, solver, steps,
        tolerance, adjoint,
    )  # fmt: skip


@register("italy-power")
def italy_power(
    *,
    cosines: int = 12,
    hidden: int = 6,
    width: int = 12,
    pace: float = 4.0,
    batch_size: int | None = None,
    solver: str = "rk4",
    steps: int = 10,
    tolerance: float = 1e-3,
    adjoint: bool = False,
    data: Path | None = None,
) -> Problem:
    """ItalyPowerDemand, the half of the year from 24 values, 2 classes: driven neural ODE, full batch.

    Args:
        cosines: Of the path, for each channel.
        hidden: Numbers of the state.
        width: Hidden width of the field.
        pace: Factor on the field.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        data: Folder that contains ``ts_classification/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem, as for ``japanese-vowels``.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    return _classes(
        "italy-power",
        "ItalyPowerDemand",
        data,
        cosines,
        hidden,
        width,
        pace,
        batch_size,
        solver,
        steps,
        tolerance,
        adjoint,
    )


@register("arrow-head")
def arrow_head(
    *,
    cosines: int = 24,
    hidden: int = 8,
    width: int = 16,
    pace: float = 4.0,
    batch_size: int | None = None,
    solver: str = "rk4",
    steps: int = 16,
    tolerance: float = 1e-3,
    adjoint: bool = False,
    data: Path | None = None,
) -> Problem:
    """ArrowHead, kinds of arrow from outlines of 251 values, 3 classes: driven neural ODE, full batch.

    Args:
        cosines: Of the path, for each channel.
        hidden: Numbers of the state.
        width: Hidden width of the field.
        pace: Factor on the field.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        data: Folder that contains ``ts_classification/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem, as for ``japanese-vowels``.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    return _classes(
        "arrow-head", "ArrowHead", data, cosines, hidden, width, pace, batch_size, solver, steps, tolerance, adjoint
    )


def _classes(
    name: str,
    set_name: str,
    data: Path | None,
    count: int,
    hidden: int,
    width: int,
    pace: float,
    batch_size: int | None,
    solver: str,
    steps: int,
    tolerance: float,
    adjoint: bool,
) -> Problem:
    for option, value in (("cosines", count), ("hidden", hidden), ("width", width)):
        at_least(name, option, value)
    remedy = _remedy(f"{set_name}.npz")
    (x, y), (x_test, y_test) = _read(data_folder(name, data, remedy) / _FOLDER / f"{set_name}.npz", count, remedy)

    channels, classes = x.shape[1], int(y.max()) + 1

    def model() -> nn.Module:
        field = DrivenField(hidden, channels, width, pace)
        block = ode_block(name, field, solver, tolerance, adjoint=adjoint, steps=steps)
        return Driven(nn.Linear(channels, hidden), block, nn.Linear(hidden, classes))

    return Problem(
        name=name,
        make_model=seeded(model),
        train=(x, y),
        test=(x_test, y_test),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=_TARGETS,
        description=f"{set_name}, driven neural ODE, cross-entropy",
    )


def _read(path: Path, count: int, remedy: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Paths and classes of both parts."""
    try:
        import numpy as np
    except ImportError as error:
        raise missing_extra("series problems", "numpy", "problems") from error
    try:
        arrays: dict[str, Any] = dict(np.load(path, allow_pickle=False))
        parts = [(_paths(arrays[f"X_{part}"], count), arrays[f"y_{part}"]) for part in ("train", "test")]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {remedy}") from error
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {remedy}") from error
    (x, y), (x_test, y_test) = ((paths, torch.as_tensor(labels).long()) for paths, labels in parts)
    return (x, y), (x_test, y_test)


def _paths(series: Any, count: int) -> Tensor:
    """Cosine series of all rows; values behind the end of a shorter one are NaN and not looked at."""
    found = []
    for row in torch.as_tensor(series):
        kept = row[:, ~torch.isnan(row).any(0)]
        if not kept.shape[1]:
            raise ValueError("a series without values")
        found.append(driven.cosines(kept, count))
    return torch.stack(found).float()
