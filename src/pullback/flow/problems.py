"""Problems for flows: model, all inputs at once, targets; in float64."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.flow.aims import Aim
from pullback.flow.classes import CrossEntropy
from pullback.flow.nets import FoldNet, fold_time
from pullback.problems.errors import SpecError, nearest
from pullback.problems.models import mlp, seeded
from pullback.problems.options import Value, check_options, parse_spec
from pullback.problems.preparation import at_least, data_generator, standardise
from pullback.problems.problem_file import is_file_spec
from pullback.problems.registry import entries, load_problem


@dataclass(frozen=True)
class FlowProblem:
    """What a flow needs.

    Attributes:
        name: how it was asked for.
        make_model: makes the model from a seed.
        inputs: all inputs, float64.
        targets: all targets, float64 in the shape of the outputs, or labels.
        notes: what was done to the data, in sentences.
        loss_time: when the rank will be lost, where that is known.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    inputs: Tensor
    targets: Tensor | Aim
    notes: tuple[str, ...] = ()
    loss_time: Callable[[int], float] | None = field(default=None)


def concrete(*, rows: int = 256, layers: int = 1, width: int | None = None, data: Path | None = None) -> FlowProblem:
    """Strength of concrete (UCI): tanh MLP, standardised target, repeated inputs dropped; over-parametrised.

    Args:
        rows: Distinct rows, drawn once for all seeds from split 0.
        layers: Hidden layers.
        width: Hidden width, or none for the smallest with four parameters for every output.
        data: Folder that contains ``uci_regression/``, or None for PULLBACK_DATA.
    """
    from pullback.problems.uci import uci

    x, y = uci(name="concrete", split=0, validation=0.0, data=data).train
    return _distinct("concrete", x, y, rows, layers, width)


def diabetes(*, rows: int = 256, layers: int = 1, width: int | None = None) -> FlowProblem:
    """Progress of diabetes after a year: tanh MLP, standardised target; over-parametrised.

    Args:
        rows: Rows, drawn once for all seeds from the training rows.
        layers: Hidden layers.
        width: Hidden width, or none for the smallest with four parameters for every output.
    """
    x, y = load_problem("diabetes").train
    return _distinct("diabetes", x, y, rows, layers, width)


def digits_regression(*, rows: int = 300, width: int = 4, pool: int = 2) -> FlowProblem:
    """Digits as regression to one-hot targets, standardised pixels: tanh MLP, one hidden layer; under-parametrised.

    Args:
        rows: Rows, the first of the training rows.
        width: Hidden width.
        pool: Pixels of a side that are averaged: 1, 2 or 4.
    """
    x, y = load_problem("digits-regression:dtype=float64").train
    at_least("digits-regression", "rows", rows)
    at_least("digits-regression", "width", width)
    if pool not in (1, 2, 4):
        raise SpecError(f"digits-regression:pool must be 1, 2 or 4, got {pool}.")
    x, y = x[:rows], y[:rows]
    x = nn.functional.avg_pool2d(x.view(-1, 1, 8, 8), pool).flatten(1)
    moves = (x != x[0]).any(0)
    x = x[:, moves]
    x = (x - x.mean(0)) / x.std(0, correction=0)
    still = int((~moves).sum())
    notes = (f"{still} of {len(moves)} pixels are the same in all rows and were dropped.",) if still else ()
    made = seeded(lambda: mlp([x.shape[1], width, 10], nn.Tanh, torch.float64))
    return FlowProblem("digits-regression", made, x, y, notes)


def rank_loss(*, rows: int = 6, features: int = 8) -> FlowProblem:
    """A net of one squared linear unit, and one target below zero: D loses its rank at a time known beforehand.

    Args:
        rows: Samples, all targets but the first within reach.
        features: Inputs.
    """
    if at_least("rank-loss", "features", features) < at_least("rank-loss", "rows", rows):
        raise SpecError(f"rank-loss needs at least as many features as rows, got {features} and {rows}.")
    generator = data_generator(0)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.5
    y[0] = -0.5

    def made(seed: int) -> nn.Module:
        return FoldNet(x, seed)

    return FlowProblem("rank-loss", made, x, y, loss_time=lambda seed: fold_time(made(seed), x, y))


def _distinct(name: str, x: Tensor, y: Tensor, rows: int, layers: int, width: int | None) -> FlowProblem:
    kept = first_of_each(x)
    dropped = len(x) - len(kept)
    if not 1 <= rows <= len(kept):
        raise SpecError(f"rows of {name} is {rows}; give 1 to {len(kept)}, the distinct inputs.")
    at_least(name, "layers", layers)
    chosen = kept[torch.randperm(len(kept), generator=data_generator(0))[:rows]]
    (x,), (y,) = standardise(x[chosen].double()), standardise(y[chosen].double())
    wide = smallest_width(x.shape[1], layers, 4 * rows) if width is None else at_least(name, "width", width)
    made = seeded(lambda: mlp([x.shape[1], *[wide] * layers, 1], nn.Tanh, torch.float64))
    notes = (f"{dropped} of {dropped + len(kept)} rows repeat an input and were dropped.",) if dropped else ()
    return FlowProblem(name, made, x, y, notes)


def first_of_each(x: Tensor) -> Tensor:
    """Positions of the first of every set of equal rows, ascending."""
    groups = torch.unique(x, dim=0, return_inverse=True)[1]
    first = torch.full((int(groups.max()) + 1,), len(x), dtype=torch.int64)
    first.scatter_reduce_(0, groups, torch.arange(len(x)), "amin")
    return first.sort().values


def smallest_width(inputs: int, layers: int, parameters: int) -> int:
    """Least hidden width of an MLP with one output and at least so many parameters."""
    width = 1
    while (inputs + 1) * width + (layers - 1) * (width + 1) * width + width + 1 < parameters:
        width += 1
    return width


FLOW_PROBLEMS: dict[str, Callable[..., FlowProblem]] = {
    "concrete": concrete,
    "diabetes": diabetes,
    "digits-regression": digits_regression,
    "rank-loss": rank_loss,
}


def load_flow_problem(text: str, data: str | Path | None = None) -> FlowProblem:
    """Load what the command line asks for.

    Args:
        text: ``name:key=value,...`` of a problem here; of a problem of :func:`pullback.problems.load_problem` whose
            criterion is ``MSELoss`` or ``CrossEntropyLoss``; or ``file.py:function``.
        data: the data folder, or None for PULLBACK_DATA.

    Raises:
        SpecError: if there is no such problem or option, or its loss makes no flow.
        DataError: if data are missing.
    """
    folder = None if data is None else Path(data)
    if not is_file_spec(text):
        name, options = parse_spec(text)
        if name in FLOW_PROBLEMS:
            return _make(text, name, options, folder)
        names = {*FLOW_PROBLEMS, *(entry.name for entry in entries())}
        if name not in names:
            raise SpecError(f"there is no problem called {name!r}.{nearest(name, names)}")
    problem = load_problem(text, folder)
    x, y = problem.train
    x = x.double() if x.is_floating_point() else x
    kind = type(problem.criterion)
    if kind not in (nn.MSELoss, nn.CrossEntropyLoss):
        known = nearest(text, FLOW_PROBLEMS)
        raise SpecError(f"{text} has the loss {kind.__name__}; flows are for MSELoss and CrossEntropyLoss.{known}")
    aim: Tensor | Aim = CrossEntropy(y) if kind is nn.CrossEntropyLoss else y.double()
    return FlowProblem(text, lambda seed: problem.build_model(seed).double(), x, aim)


def _make(text: str, name: str, options: Mapping[str, Value], data: Path | None) -> FlowProblem:
    factory = FLOW_PROBLEMS[name]
    every = inspect.signature(factory).parameters
    hints = typing.get_type_hints(factory)
    checked: dict[str, Any] = check_options(name, options, {key: hints[key] for key in every if key != "data"})
    made = factory(**checked, **({"data": data} if "data" in every else {}))
    return FlowProblem(text, made.make_model, made.inputs, made.targets, made.notes, made.loss_time)
