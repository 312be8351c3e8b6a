"""Medians and quartiles over the seeds of each optimizer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pullback.problems.record import Run


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles, interpolated linearly between the sorted values.

    Attributes:
        low: The first quartile.
        median: The second.
        high: The third.
        count: Over how many values.
    """

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Quartiles | None:
        """Summarises values.

        Args:
            values: Numbers; None and what is not finite is left out.

        Returns:
            The quartiles, or None if nothing is left.
        """
        numbers = [value for value in values if value is not None and math.isfinite(value)]
        if not numbers:
            return None
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0], 1)
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(low, median, high, len(numbers))


@dataclass(frozen=True)
class Summary:
    """One optimizer over its seeds. Runs that failed count in `reached` alone.

    Attributes:
        label: The optimizer with its options.
        runs: How many runs there are.
        failed: How many of them failed or were interrupted.
        loss: Final training loss.
        test: Final test metric.
        steps: Steps taken.
        ms_per_step: Charged milliseconds per step.
        seconds: Charged seconds.
        reached: For each target level, the seconds to it, over the runs that reached it.
    """

    label: str
    runs: int
    failed: int
    loss: Quartiles | None
    test: Quartiles | None
    steps: Quartiles | None
    ms_per_step: Quartiles | None
    seconds: Quartiles | None
    reached: dict[float, Quartiles | None]


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Summarises runs by optimizer.

    Args:
        runs: Runs on one problem, in any order.

    Returns:
        One summary per optimizer, in the order of first appearance.
    """
    labels = dict.fromkeys(run.label for run in runs)
    return [_summary(label, [run for run in runs if run.label == label]) for label in labels]


def _summary(label: str, runs: Sequence[Run]) -> Summary:
    whole = [run for run in runs if run.failure is None]
    levels = dict.fromkeys(level for run in runs for level in run.targets)
    return Summary(
        label=label,
        runs=len(runs),
        failed=len(runs) - len(whole),
        loss=Quartiles.of(run.loss for run in whole),
        test=Quartiles.of(run.test for run in whole),
        steps=Quartiles.of(run.steps for run in whole),
        ms_per_step=Quartiles.of(run.ms_per_step for run in whole),
        seconds=Quartiles.of(run.seconds for run in whole),
        reached={level: Quartiles.of(run.reached.get(level) for run in runs) for level in levels},
    )
