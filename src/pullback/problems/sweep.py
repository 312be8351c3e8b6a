"""Which options are best: the runs of a comparison as the cells of grids."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pullback.problems.errors import SpecError, nearest
from pullback.problems.grid import Grid
from pullback.problems.options import Value, format_spec
from pullback.problems.problem import Problem
from pullback.problems.record import INTERRUPTED, Comparison, Json, Run, plain
from pullback.problems.target import LOSS, rises

_PARTS = ("loss", "validation", "validation-loss", "test")


@dataclass(frozen=True)
class Measure:
    """What the cells of a sweep are judged by: a quantity at the end of each run.

    Attributes:
        part: "loss" for the training loss, "validation" or "test" for the test metric on those data,
            "validation-loss" for the loss on the validation data.
        quantity: "loss", or the name of the test metric.
    """

    part: str
    quantity: str

    @classmethod
    def of(cls, problem: Problem, part: str | None = None) -> Measure:
        """Chooses what a problem is judged by.

        Args:
            problem: The problem.
            part: "loss", "validation", "validation-loss" or "test"; None for "validation" where there are validation
                data and the training loss where not, since what is chosen by the test data cannot be tested on them.

        Returns:
            The measure.

        Raises:
            SpecError: If the problem has no such data or keeps them sealed, or nobody knows which way is better.
        """
        if part is None:
            part = "loss" if problem.validation is None else "validation"
        if part not in _PARTS:
            raise SpecError(f"--metric cannot be {part!r}.{nearest(part, _PARTS)}")
        if part.startswith("validation") and problem.validation is None:
            raise SpecError(f"{problem.name} has no validation data; choose by the training loss (--metric loss).")
        if part == "test" and problem.test is None and problem.model_metric is None:
            raise SpecError(f"{problem.name} has no test data; choose by the training loss (--metric loss).")
        if part == "test" and problem.sealed:
            raise SpecError(f"the test data of {problem.name} are sealed; choose by --metric validation or loss.")
        chosen = cls(part, LOSS if part.endswith("loss") else problem.metric_name)
        rises(chosen.quantity)
        return chosen

    def __str__(self) -> str:
        part = {"loss": "training", "validation-loss": "validation"}.get(self.part, self.part)
        return f"{part} {self.quantity}"

    @property
    def rises(self) -> bool:
        """Whether more is better."""
        return rises(self.quantity)

    def value(self, run: Run) -> float | None:
        """The quantity at the end of a run.

        Args:
            run: The run.

        Returns:
            The value; None if the run failed, diverged (its training loss ended above where it began), or the value
            is not finite.
        """
        if run.failure is not None or not run.history or run.history[-1].loss > run.history[0].loss:
            return None
        last = run.history[-1]
        value = {
            "loss": last.loss,
            "validation": last.validation_score,
            "validation-loss": last.validation,
            "test": last.test,
        }[self.part]
        return value if value is not None and math.isfinite(value) else None

    def better(self, values: Sequence[float]) -> float:
        """The best of some values.

        Args:
            values: At least one.

        Returns:
            The largest or the smallest.
        """
        return max(values) if self.rises else min(values)


@dataclass(frozen=True)
class Cell:
    """One combination of options over its seeds. A run that failed or diverged counts as worse than all others.

    Attributes:
        optimizer: The optimizer's name.
        options: Its options.
        runs: How many runs there are; one that was interrupted is none.
        failed: How many of them failed, diverged or ended with no finite value.
        median: The median, None if half of the runs or more failed, or there are none.
        best: The value of the best seed, None if all failed.
        worst: The value of the worst seed, None if one failed.
    """

    optimizer: str
    options: dict[str, Value]
    runs: int
    failed: int
    median: float | None
    best: float | None
    worst: float | None

    @classmethod
    def of(cls, optimizer: str, options: dict[str, Value], runs: Sequence[Run], measure: Measure) -> Cell:
        """Judges the runs of one combination.

        Args:
            optimizer: The optimizer's name.
            options: Its options.
            runs: Its runs.
            measure: What they are judged by.

        Returns:
            The cell.
        """
        values = [measure.value(run) for run in runs if run.failure != INTERRUPTED]
        lost = -math.inf if measure.rises else math.inf
        numbers = sorted((lost if value is None else value for value in values), reverse=measure.rises)
        failed = values.count(None)
        ends = (numbers[0], numbers[-1]) if numbers else (lost, lost)
        median = statistics.median(numbers) if numbers else lost
        return cls(optimizer, options, len(values), failed, *map(_finite, (median, *ends)))

    @property
    def label(self) -> str:
        """``name:key=value,...``."""
        return format_spec(self.optimizer, self.options)

    def to_json(self) -> Json:
        """Converts to what ``json.dumps(..., allow_nan=False)`` accepts.

        Returns:
            A dictionary of the attributes.
        """
        return vars(self) | {"options": {key: plain(value) for key, value in self.options.items()}}


@dataclass(frozen=True)
class Sweep:
    """The runs of some grids on one problem.

    Attributes:
        comparison: The runs.
        grids: The grids, one per optimizer.
        measure: What the cells are judged by.
    """

    comparison: Comparison
    grids: tuple[Grid, ...]
    measure: Measure

    def cells(self, grid: Grid) -> list[Cell]:
        """Judges every combination of a grid.

        Args:
            grid: One of the grids.

        Returns:
            One cell per combination, in the order of the grid.
        """
        groups: dict[str, list[Run]] = {}
        for run in self.comparison.runs:
            groups.setdefault(run.label, []).append(run)
        return [Cell.of(spec.name, spec.options, groups.get(spec.label, []), self.measure) for spec in grid.specs()]

    def best(self, grid: Grid) -> Cell | None:
        """The cell with the best median.

        Args:
            grid: One of the grids.

        Returns:
            The first such cell, None if none has a median.
        """
        return best_of(self.cells(grid), self.measure)

    def to_json(self) -> Json:
        """Converts to what ``json.dumps(..., allow_nan=False)`` accepts.

        Returns:
            The dictionary of the comparison, with ``by``, ``higher_is_better``, ``cells`` and, per optimizer, the
            ``best`` cell's label added.
        """
        found = {grid.name: self.best(grid) for grid in self.grids}
        return self.comparison.to_json() | {
            "by": str(self.measure),
            "higher_is_better": self.measure.rises,
            "cells": [cell.to_json() for grid in self.grids for cell in self.cells(grid)],
            "best": {name: None if cell is None else cell.label for name, cell in found.items()},
        }


def best_of(cells: Sequence[Cell], measure: Measure) -> Cell | None:
    """The cell with the best median.

    Args:
        cells: Some cells.
        measure: What they are judged by.

    Returns:
        The first such cell, None if none has a median.
    """
    medians = [cell.median for cell in cells if cell.median is not None]
    if not medians:
        return None
    best = measure.better(medians)
    return next(cell for cell in cells if cell.median == best)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
