"""Classes of series: four sets of the UEA and UCR archives with their split, by neural controlled and driven ODEs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.problems import driven
from pullback.problems.data import data_folder
from pullback.problems.driven import FIELDS, Driven
from pullback.problems.errors import DataError, SpecError, missing_extra
from pullback.problems.models import seeded
from pullback.problems.odes import ode_block
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem
from pullback.problems.registry import register

Field = Literal["cde", "driven"]

_PACES: dict[Field, float] = {"cde": 1.0, "driven": 4.0}
_KINDS: dict[Field, str] = {"cde": "neural CDE", "driven": "driven neural ODE"}
_FOLDER = "ts_classification"
_TARGETS = (0.3, 0.1, 0.03)
_OPTIONS = """
    Args:
        field: "cde" for a matrix of the state times the path's slope, "driven" for a field that reads its value.
        cosines: Of the path, for each channel.
        hidden: Numbers of the state.
        width: Hidden width of the field.
        pace: Factor on the field; None for 1 with "cde" and 4 with "driven".
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        learn_t1: Whether the time at which the flow ends is learned, from 1 on.
        penalty: c of its cost c/2 t1^2, which the reported losses leave out.
        data: Folder that contains ``ts_classification/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem: inputs (N, channels + 1, cosines) float32, coefficients of the series and of the time, every
        channel standardised by the training rows; cross-entropy; official split.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
        MissingExtraError: If numpy is not installed.
    """


def _remedy(file: str) -> str:
    return (
        f"put {file} of the UEA and UCR archive (timeseriesclassification.com), as arrays X_train, y_train, X_test, "
        f"y_test of shapes (N, channels, length) and (N,), in DATA/{_FOLDER}."
    )


def _set(
    name: str,
    file: str,
    about: str,
    *,
    field: Field,
    cosines: int,
    hidden: int,
    width: int,
    batch_size: int | None = None,
    steps: int,
) -> Callable[..., Problem]:
    """Registers one set; the arguments behind the words are the defaults of its options."""
    size = batch_size

    @register(name)
    def problem(
        *,
        field: Field = field,
        cosines: int = cosines,
        hidden: int = hidden,
        width: int = width,
        pace: float | None = None,
        batch_size: int | None = size,
        solver: str = "rk4",
        steps: int = steps,
        tolerance: float = 1e-3,
        adjoint: bool = False,
        learn_t1: bool = False,
        penalty: float = 0.1,
        data: Path | None = None,
    ) -> Problem:
        if field not in FIELDS:
            raise SpecError(f"field of {name} cannot be {field!r}; give {' or '.join(FIELDS)}.")
        kind = _KINDS[field]
        for option, value in (("cosines", cosines), ("hidden", hidden), ("width", width)):
            at_least(name, option, value)
        remedy = _remedy(f"{file}.npz")
        (x, y), test = _read(data_folder(name, data, remedy) / _FOLDER / f"{file}.npz", cosines, remedy)
        channels, classes = x.shape[1], int(y.max()) + 1

        def model() -> nn.Module:
            own = FIELDS[field](hidden, channels, width, _PACES[field] if pace is None else pace)
            block = ode_block(
                name, own, solver, tolerance, adjoint=adjoint, steps=steps, learn_t1=learn_t1, penalty=penalty
            )
            return Driven(nn.Linear(channels, hidden), block, nn.Linear(hidden, classes))

        return Problem(
            name=name,
            make_model=seeded(model),
            train=(x, y),
            test=test,
            criterion=nn.CrossEntropyLoss(),
            batch_size=batch_size,
            targets=_TARGETS,
            description=f"{file}, {kind}, cross-entropy",
        )

    problem.__doc__ = f"""{about}: {_KINDS[field]}, {"full batch" if size is None else "mini-batches"}.
{_OPTIONS}"""
    return problem


japanese_vowels = _set(
    "japanese-vowels", "JapaneseVowels", "JapaneseVowels, 9 speakers from 12 channels of 7 to 29 values",
    field="driven", cosines=8, hidden=16, width=32, batch_size=64, steps=8,
)  # fmt: skip
articulary_words = _set(
    "articulary-words", "ArticularyWordRecognition",
    "ArticularyWordRecognition, words from 9 channels of 144 values, 25 classes",
    field="cde", cosines=12, hidden=24, width=48, batch_size=64, steps=10,
)  # fmt: skip
italy_power = _set(
    "italy-power", "ItalyPowerDemand", "ItalyPowerDemand, the half of the year from 24 values, 2 classes",
    field="cde", cosines=12, hidden=6, width=12, steps=10,
)  # fmt: skip
arrow_head = _set(
    "arrow-head", "ArrowHead", "ArrowHead, kinds of arrow from outlines of 251 values, 3 classes",
    field="cde", cosines=24, hidden=8, width=16, steps=16,
)  # fmt: skip


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
    x, x_test = driven.standardise_paths(x, x_test)
    return (x.float(), y), (x_test.float(), y_test)


def _paths(series: Any, count: int) -> Tensor:
    """Cosine series of all rows; values behind the end of a shorter one are NaN and not looked at."""
    found = []
    for row in torch.as_tensor(series):
        kept = row[:, ~torch.isnan(row).any(0)]
        if not kept.shape[1]:
            raise ValueError("a series without values")
        found.append(driven.cosines(kept, count))
    return torch.stack(found)
