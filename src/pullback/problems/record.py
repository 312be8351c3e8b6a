"""What a run leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from pullback.problems.options import Value, format_spec
from pullback.problems.target import Target, ValidationTarget, met, name_of

Json: TypeAlias = dict[str, Any]

INTERRUPTED = "interrupted"


class Evaluation(NamedTuple):
    """The state of a run at one moment.

    Attributes:
        seconds: Charged seconds: training steps only.
        step: Steps taken.
        loss: The criterion on the training data, in eval mode; may be NaN or infinite.
        test: The test metric, or None if the problem has no test data or keeps them sealed until the end.
        validation: The criterion on the validation data, or None if there are none.
        validation_score: The test metric on the validation data, or None if there are none.
        nfe: Evaluations of vector fields in the last forward pass of the step (before the first step: of the
            evaluation), or None if the model has no ODE block.
        t1: The time at which the first ODE block ends, or None.
    """

    seconds: float
    step: int
    loss: float
    test: float | None
    validation: float | None = None
    validation_score: float | None = None
    nfe: int | None = None
    t1: float | None = None


@dataclass(frozen=True)
class Run:
    """One optimizer on one problem with one seed.

    Attributes:
        optimizer: The optimizer's name.
        options: Its options other than defaults.
        seed: Drives the model's initial parameters and the order of the batches.
        steps: Steps taken.
        seconds: Charged wall-clock seconds: training steps only.
        cpu_seconds: Processor seconds of the same steps, all threads together.
        history: Evaluations, the first before any step; never empty unless the run was interrupted at once.
        targets: Training losses whose time of arrival is asked for.
        validation_targets: Levels on the validation data whose time of arrival is asked for.
        failure: Why the run ended early, one line, or None.
        coverage: How the optimizer treated each parameter, if it says so.
        trials: How often the loss was computed to find the steps, if the optimizer tries steps: trial steps of
            ours, calls of the closure. None for optimizers that step blindly.
    """

    optimizer: str
    options: dict[str, Value]
    seed: int
    steps: int
    seconds: float
    cpu_seconds: float
    history: tuple[Evaluation, ...]
    targets: tuple[float, ...] = ()
    failure: str | None = None
    coverage: str | None = None
    trials: int | None = None
    validation_targets: tuple[ValidationTarget, ...] = ()

    @property
    def label(self) -> str:
        """``name:key=value,...``."""
        return format_spec(self.optimizer, self.options)

    @property
    def loss(self) -> float | None:
        """The last training loss, None if it is not finite."""
        return _finite(self.history[-1].loss) if self.history else None

    @property
    def best_loss(self) -> float | None:
        """The least training loss, None if none was finite."""
        losses = [evaluation.loss for evaluation in self.history if math.isfinite(evaluation.loss)]
        return min(losses, default=None)

    @property
    def test(self) -> float | None:
        """The last test metric, None if there is none or it is not finite."""
        return _finite(self.history[-1].test) if self.history else None

    @property
    def validation_score(self) -> float | None:
        """The last test metric on the validation data, None if there is none or it is not finite."""
        return _finite(self.history[-1].validation_score) if self.history else None

    @property
    def nfe(self) -> int | None:
        """The last number of evaluations of vector fields in a forward pass, None without ODE blocks."""
        return self.history[-1].nfe if self.history else None

    @property
    def t1(self) -> float | None:
        """The last time at which the first ODE block ended, None without ODE blocks."""
        return self.history[-1].t1 if self.history else None

    @property
    def ms_per_step(self) -> float | None:
        """Charged milliseconds per step, None before the first step."""
        return 1e3 * self.seconds / self.steps if self.steps else None

    @property
    def trials_per_step(self) -> float | None:
        """Trials per step, None where nothing is tried."""
        return self.trials / self.steps if self.trials and self.steps else None

    @property
    def levels(self) -> tuple[Target, ...]:
        """All levels whose time of arrival is asked for."""
        return (*self.targets, *self.validation_targets)

    def arrival(self, level: Target) -> Evaluation | None:
        """The first evaluation that has reached a level.

        Args:
            level: A training loss, or a level on the validation data.

        Returns:
            The evaluation, None if there is none.
        """
        return next((evaluation for evaluation in self.history if met(level, evaluation)), None)

    @property
    def reached(self) -> dict[Target, float | None]:
        """For each level the charged seconds of the first evaluation that has reached it, None if never."""
        found = {level: self.arrival(level) for level in self.levels}
        return {level: None if evaluation is None else evaluation.seconds for level, evaluation in found.items()}

    @property
    def steps_to(self) -> dict[Target, int | None]:
        """For each level the steps of the first evaluation that has reached it, None if never."""
        found = {level: self.arrival(level) for level in self.levels}
        return {level: None if evaluation is None else evaluation.step for level, evaluation in found.items()}

    def to_json(self) -> Json:
        """Converts to what ``json.dumps(..., allow_nan=False)`` accepts.

        Returns:
            A dictionary; whatever is not finite is None.
        """
        return {
            "optimizer": self.optimizer,
            "options": {key: plain(value) for key, value in self.options.items()},
            "seed": self.seed,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "ms_per_step": self.ms_per_step,
            "trials_per_step": self.trials_per_step,
            "loss": self.loss,
            "best_loss": self.best_loss,
            "test": self.test,
            "validation_score": self.validation_score,
            "history": [[plain(number) for number in evaluation[:6]] for evaluation in self.history],
            "ode": None if self.nfe is None else _over_time(self.history),
            "reached": {name_of(level): seconds for level, seconds in self.reached.items()},
            "steps_to": {name_of(level): steps for level, steps in self.steps_to.items()},
            "failure": self.failure,
        }


@dataclass(frozen=True)
class Comparison:
    """Runs on one problem.

    Attributes:
        problem: The problem's name.
        metric: The name of its test metric.
        machine: What the times were measured on, from `pullback.problems.machine.machine`.
        runs: The runs, in the order they were made.
    """

    problem: str
    metric: str
    machine: dict[str, str | int]
    runs: tuple[Run, ...]

    def to_json(self) -> Json:
        """Converts to what ``json.dumps(..., allow_nan=False)`` accepts.

        Returns:
            A dictionary with the keys problem, metric, machine, summary (one entry per optimizer) and runs
            (with the history of every seed).
        """
        from pullback.problems.summary import summarise  # It builds on this module.

        return {
            "problem": self.problem,
            "metric": self.metric,
            "machine": self.machine,
            "summary": [summary.to_json() for summary in summarise(self.runs)],
            "runs": [run.to_json() for run in self.runs],
        }


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C during a run; carries what was reached.

    Attributes:
        run: The record so far, its failure "interrupted".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(INTERRUPTED)
        self.run = run


def _over_time(history: tuple[Evaluation, ...]) -> Json:
    return {
        key: [plain(getattr(evaluation, key)) for evaluation in history] for key in ("seconds", "step", "nfe", "t1")
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def plain(value: Value) -> Any:
    """Converts a value to what ``json.dumps(..., allow_nan=False)`` accepts.

    Args:
        value: The value of an option, or a number of a history.

    Returns:
        The value; None for what is not finite, a list for a tuple.
    """
    if isinstance(value, float):
        return _finite(value)
    return list(value) if isinstance(value, tuple) else value
