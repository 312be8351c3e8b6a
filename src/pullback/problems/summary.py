"""Medians and quartiles over the seeds of each optimizer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from pullback.problems.record import Json, Run
from pullback.problems.target import Target, name_of


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles, interpolated linearly between the sorted values.

    Attributes:
        low: The first quartile.
        median: The second.
        high: The third.
        count: Over how many values.
        worst: The largest.
    """

    low: float
    median: float
    high: float
    count: int
    worst: float

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
            return cls(numbers[0], numbers[0], numbers[0], 1, numbers[0])
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(low, median, high, len(numbers), max(numbers))


@dataclass(frozen=True)
class Arrival:
    """When the runs of an optimizer reached a target level; a run that never did counts as later than all.

    Attributes:
        count: How many runs reached it.
        runs: Of how many.
        seconds: Median of the seconds to it, None if half of the runs or more never reached it.
        worst_seconds: The seconds of the slowest run, None if one never reached it.
        steps: Median of the steps, likewise.
        worst_steps: The steps of the slowest run, likewise.
    """

    count: int
    runs: int
    seconds: float | None
    worst_seconds: float | None
    steps: float | None
    worst_steps: float | None

    @classmethod
    def of(cls, runs: Sequence[Run], level: Target) -> Arrival:
        """Summarises arrivals.

        Args:
            runs: The runs of one optimizer, failed ones too; at least one.
            level: A training loss, or a level on the validation data.

        Returns:
            The summary.
        """
        found = [run.arrival(level) for run in runs]
        seconds = [math.inf if evaluation is None else evaluation.seconds for evaluation in found]
        steps = [math.inf if evaluation is None else float(evaluation.step) for evaluation in found]
        return cls(
            sum(evaluation is not None for evaluation in found),
            len(runs),
            *(_finite(pick(values)) for values in (seconds, steps) for pick in (statistics.median, max)),
        )


@dataclass(frozen=True)
class Summary:
    """One optimizer over its seeds. Runs that failed count in `reached` alone.

    Attributes:
        label: The optimizer with its options.
        runs: How many runs there are.
        failed: How many of them failed or were interrupted.
        loss: Final training loss.
        test: Final test metric.
        validation_score: Final test metric on the validation data.
        steps: Steps taken.
        trials: Trials per step, None for optimizers that try nothing.
        ms_per_step: Charged milliseconds per step.
        seconds: Charged seconds.
        nfe: Evaluations of vector fields in the last forward pass, None without ODE blocks.
        t1: The time at which the first ODE block ended, None without ODE blocks.
        reached: For each target level, when it was reached.
    """

    label: str
    runs: int
    failed: int
    loss: Quartiles | None
    test: Quartiles | None
    validation_score: Quartiles | None
    steps: Quartiles | None
    trials: Quartiles | None
    ms_per_step: Quartiles | None
    seconds: Quartiles | None
    nfe: Quartiles | None
    t1: Quartiles | None
    reached: dict[Target, Arrival]

    def to_json(self) -> Json:
        """Converts to what ``json.dumps(..., allow_nan=False)`` accepts.

        Returns:
            A dictionary; for each quantity its median, quartiles, count and worst, or None.
        """
        # Apart from `reached`: asdict would turn its keys to dictionaries too.
        values = asdict(replace(self, reached={}))
        return values | {"reached": {name_of(level): asdict(arrival) for level, arrival in self.reached.items()}}


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
    levels = dict.fromkeys(level for run in runs for level in run.levels)
    return Summary(
        label=label,
        runs=len(runs),
        failed=len(runs) - len(whole),
        loss=Quartiles.of(run.loss for run in whole),
        test=Quartiles.of(run.test for run in whole),
        validation_score=Quartiles.of(run.validation_score for run in whole),
        steps=Quartiles.of(run.steps for run in whole),
        trials=Quartiles.of(run.trials_per_step for run in whole),
        ms_per_step=Quartiles.of(run.ms_per_step for run in whole),
        seconds=Quartiles.of(run.seconds for run in whole),
        nfe=Quartiles.of(run.nfe for run in whole),
        t1=Quartiles.of(run.t1 for run in whole),
        reached={level: Arrival.of(runs, level) for level in levels},
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
