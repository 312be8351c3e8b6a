"""What a step did, and how every parameter is treated: plain records to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["exact", "frozen", "linearised", "sampled", "fallback", "unused", "pending"]


@dataclass(frozen=True)
class StepRecord:
    """One call of ``step``.

    Attributes:
        loss: loss before the step, of everything ``backward`` was called on that the tape saw.
        predicted: decrease the quadratic model promised for the step that was kept (or last tried).
        actual: decrease that a trial loss found; None without a trial.
        accepted: whether the step was kept. If not, weights are bit for bit as before.
        mu: damping of that step.
        scale: factor on the direction (1 for a joint solve); with feedback how far along the arc.
        rank: R, the rows of U.
        trials: steps tried; with feedback attempts, each of one damping and up to five sweeps.
        spaces: ``"dual"`` or ``"primal"`` and the rung of the Cholesky ladder, per group.
        seconds: time per phase: sweep, curvature, solve, trial; with feedback also look, and the trial is the sweeps.
        runs: forward passes after the one that was recorded, over all trials.
        note: with feedback which sweep was kept, ``"feedback"`` or ``"anticipation"``; for a single stage
            ``"acceleration"`` (a geodesic step) or ``"plain"``. In open loop why a trial had no loss, if one had none
            because an ODE could not be solved.
    """

    loss: float
    predicted: float
    actual: float | None
    accepted: bool
    mu: float
    scale: float
    rank: int
    trials: int
    spaces: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    note: str = ""

    @property
    def gain(self) -> float | None:
        """Actual over predicted decrease."""
        return None if self.actual is None or self.predicted == 0 else self.actual / self.predicted


@dataclass(frozen=True)
class Covered:
    """How one parameter is treated.

    Attributes:
        name: its name in the model.
        numel: its size.
        status: exact, frozen, linearised, sampled, fallback, unused, or pending before the first step.
        why: one phrase.
    """

    name: str
    numel: int
    status: Status
    why: str


@dataclass(frozen=True)
class Coverage:
    """A report over all parameters; print it.

    Attributes:
        parameters: one entry per parameter.
        sweep: how columns are pulled back, with the timing that chose it.
        frozen: BatchNorm layers whose batch statistics the metric holds constant.
    """

    parameters: tuple[Covered, ...]
    sweep: str
    frozen: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Covered:
        for entry in self.parameters:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def __str__(self) -> str:
        head = ("parameter", "numbers", "status", "why")
        rows = [(e.name, f"{e.numel:,}", e.status, e.why) for e in self.parameters]
        width = [max(len(row[k]) for row in [head, *rows]) for k in range(3)]
        lines = [f"{a:<{width[0]}}  {b:>{width[1]}}  {c:<{width[2]}}  {d}".rstrip() for a, b, c, d in [head, *rows]]
        held = [f"held constant in the metric: batch statistics of {', '.join(self.frozen)}"] if self.frozen else []
        return "\n".join([*lines, *held, f"sweep: {self.sweep}"])
