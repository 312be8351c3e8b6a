"""A certificate: all that was found about a training, to print and to keep."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from pullback.certification.constants import constants_dict
from pullback.certification.rates import Ends
from pullback.certification.settings import DescentSpec
from pullback.certification.statements import Statement, statements
from pullback.certification.training import Path
from pullback.problems.optimizer_spec import OptimizerSpec
from pullback.stability import Constants, Fit, Twins
from pullback.stability.bounds import Bound

#: What keeps the lemma from applying, by optimizer; others are named in general.
_STATE = "its steps depend on earlier ones (moments, momentum or curvature pairs), so they are no map of the weights"
_MOVING = "its metric moves with the weights and holds the data, also through its damping"
_WHY = {
    "layerwise-metric": _MOVING,
    "gauss-newton": _MOVING,
    "feedback": _MOVING,
    "kronecker": _MOVING,
    "kronecker-game": _MOVING,
    "sgd": "momentum and batches are not in the lemma; without both it is descent, which has a bound",
}


@dataclass
class Certificate:
    """What is known of a training; print it.

    Attributes:
        problem: its name with options.
        spec: the optimizer.
        seed: of the run.
        batch_size: rows per step; None for all of them, as descent takes.
        size: K, trained numbers.
        n: training samples.
        path: the training that was looked at.
        ends: rates along it.
        constants: of it; None if not reached.
        reports: twins, by n.
        fits: exponents of n of distance and loss change; None for fewer than three n.
        notes: what was changed about the problem.
        ended: "whole", "seconds" if the time was up, or "interrupted".
        phases: those that were gone through.
        seconds: wall time, whole and by phase.
        machine: what it was measured on.
    """

    problem: str
    spec: DescentSpec | OptimizerSpec
    seed: int
    batch_size: int | None
    size: int
    n: int
    path: Path
    ends: list[Ends] = field(default_factory=list)
    constants: Constants | None = None
    reports: list[Twins] = field(default_factory=list)
    fits: tuple[Fit, Fit] | None = None
    notes: tuple[str, ...] = ()
    ended: str = "whole"
    phases: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=dict)

    @property
    def statements(self) -> list[Statement]:
        """All that it says, proved sentences first."""
        return statements(self)

    @property
    def why_no_bound(self) -> str:
        """Why twins of this optimizer have no derived bound; empty for descent."""
        if isinstance(self.spec, DescentSpec):
            return ""
        why = _WHY.get(self.spec.name, _STATE)
        batches = "" if self.batch_size is None else f"; a step sees {self.batch_size} of {self.n} samples"
        return f"the lemma of theory 16 needs equal full-batch steps in a fixed metric: {why}{batches}"

    @property
    def bounds(self) -> list[dict[str, Any]]:
        """Bounds of twins by n and name: medians, and the largest ratio of what was measured."""
        rows = []
        for report in self.reports:
            for name, bounds in _by_name(report).items():
                rows.append(_row(report, name, bounds))
        return rows

    def __str__(self) -> str:
        from pullback.certification.text import written

        return written(self)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain numbers and words."""
        path, action = self.path, self.path.action
        losses = [list(pair) for pair in path.losses]
        fitted = None if self.fits is None else {"distance": self.fits[0].to_dict(), "loss": self.fits[1].to_dict()}
        return {
            "problem": self.problem,
            "optimizer": self.spec.label,
            "seed": self.seed,
            "ended": self.ended,
            "parameters": self.size,
            "n": self.n,
            "batch_size": self.batch_size,
            "notes": list(self.notes),
            "training": {
                "steps": path.steps,
                "loss": [pair[1] for pair in losses[:: len(losses) - 1]] if len(losses) > 1 else None,
                "losses": losses,
                "metric": path.metric,
            },
            "rates": [end.to_dict(path.h) for end in self.ends],
            "constants": None if self.constants is None else constants_dict(self.constants, self.ends, path),
            "twins": [report.to_dict() for report in self.reports],
            "exponents": fitted,
            "bounds": self.bounds,
            "action": None if action is None else action.to_dict() | {"discrete": path.discrete},
            "certificate": [one.to_dict() for one in self.statements],
            "seconds": dict(self.seconds),
            "machine": dict(self.machine),
        }


def _by_name(report: Twins) -> dict[str, list[Bound]]:
    found: dict[str, list[Bound]] = {}
    for twin in report.pairs:
        for bound in twin.bounds:
            found.setdefault(bound.name, []).append(bound)
    return found


def _row(report: Twins, name: str, bounds: list[Bound]) -> dict[str, Any]:
    distances = [b.distance for b in bounds if b.distance is not None]
    first = bounds[0]
    return {
        "n": report.n,
        "name": name,
        "pairs": len(bounds),
        "derived": first.derived,
        "distance_kind": first.distance_kind,
        "loss_kind": first.kind,
        "distance": statistics.median(distances) if distances else None,
        "loss": statistics.median(b.loss for b in bounds),
        "largest_distance_ratio": max(report.ratios(name)) if distances else None,
        "largest_loss_ratio": max(report.ratios(name, loss=True)),
        "broken": report.broken(name) if first.derived else None,
    }
