"""What a run of a flow leaves behind."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pullback.flow.endpoint import EndPoint

#: Costs below this share of the first are left out of the fitted slope.
FLOOR = 1e-10


class Moment(NamedTuple):
    """An accepted point.

    Attributes:
        s: the time.
        cost: C.
        predicted: the cost the law predicts; None where none is promised.
        smallest: smallest singular values of D, ascending (upper bounds for large D); None for the standard flow.
        largest: the largest one.
        deviation: distance of the outputs from the predicted line, over the length of the line.
        missed: ``|x' - v| / |v|``.
        seconds: wall time since the start.
    """

    s: float
    cost: float
    predicted: float | None
    smallest: list[float] | None
    largest: float | None
    deviation: float | None
    missed: float | None
    seconds: float


@dataclass(frozen=True)
class Loss:
    """A loss of rank.

    Attributes:
        s: when.
        cost: C there.
        ratio: smallest over largest singular value where it was located.
        rank: the rank left.
    """

    s: float
    cost: float
    ratio: float
    rank: int


@dataclass
class Certificate:
    """What was promised, and what came of it.

    Attributes:
        predicted: cost promised at the end of the run; None without a promise.
        reached: cost there.
        slope: slope of the logarithm of the cost against s, fitted down to 1e-10 of the first cost; None without
            points.
        expected: the slope of the law, -4c; None where there is no such law.
        deviation: largest distance of the outputs from the predicted line, over the length of the line.
        smallest: smallest singular value of D seen on the path.
        missed: largest ``|x' - v| / |v|``.
        held: whether the promise was kept: cost at most the predicted one plus a hundredth; None without a promise.
    """

    predicted: float | None
    reached: float
    slope: float | None
    expected: float | None
    deviation: float | None
    smallest: float | None
    missed: float | None
    held: bool | None


@dataclass
class Path:
    """The parameters along a run, between accepted points by cubic Hermite interpolation.

    Attributes:
        times: times s of the points.
        thetas: packed parameters there.
        slopes: theta' there.
    """

    times: list[float] = field(default_factory=list)
    thetas: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)

    def at(self, s: float) -> Tensor:
        """Packed parameters at time s, (K,).

        Raises:
            ValueError: if s is outside of the run.
        """
        if len(self.times) == 1 and s == self.times[0]:
            return self.thetas[0]
        k, u, h = self._place(s)
        a, b = self.thetas[k - 1], self.thetas[k]
        fa, fb = self.slopes[k - 1] * h, self.slopes[k] * h
        inner = (1 - 2 * u) * (b - a) + (u - 1) * fa + u * fb
        return (1 - u) * a + u * b + u * (u - 1) * inner

    def slope_at(self, s: float) -> Tensor:
        """Theta' of the interpolated path at time s, (K,).

        Raises:
            ValueError: if s is outside of the run.
        """
        k, u, h = self._place(s)
        secant = (self.thetas[k] - self.thetas[k - 1]) / h
        way = 6 * u * (1 - u)
        return way * secant + (1 - u) * (1 - 3 * u) * self.slopes[k - 1] + u * (3 * u - 2) * self.slopes[k]

    def _place(self, s: float) -> tuple[int, float, float]:
        """The interval's end, the place in it from 0 to 1, and its length."""
        if len(self.times) < 2 or not self.times[0] <= s <= self.times[-1]:
            raise ValueError(f"The path covers s from {self.times[0]:g} to {self.times[-1]:g}, not {s:g}.")
        k = min(max(1, bisect.bisect_left(self.times, s)), len(self.times) - 1)
        h = self.times[k] - self.times[k - 1]
        return k, (s - self.times[k - 1]) / h, h


@dataclass
class FlowRun:
    """The result of a run.

    Attributes:
        regime: which flow ran.
        rank: rank of D at the start.
        shape: QN and K.
        solver: how D^+ was taken.
        eps: the cost that was asked for; None without.
        stopping_time: the time promised for it beforehand; None where none is promised.
        cost: the cost reached.
        s: the time reached.
        ended: why the run ended: ``"time"``, ``"equilibrium"``, ``"rank"``, ``"interrupted"`` or a sentence.
        history: accepted points.
        losses: losses of rank, in order.
        end: the end point, classified; None after an interruption.
        certificate: promise and outcome.
        evaluations: of the field.
        seconds: wall time.
        notes: what there is to say, in sentences.
        path: the parameters along the run; None if it was not kept.
        outputs: some output numbers along the run, (points, numbers), for pictures.
        targets: the targets of these numbers; None for classes.
    """

    regime: str
    rank: int
    shape: tuple[int, int]
    solver: str
    eps: float | None
    stopping_time: float | None
    cost: float
    s: float
    ended: str
    history: list[Moment]
    losses: list[Loss]
    end: EndPoint | None
    certificate: Certificate
    evaluations: int
    seconds: float
    notes: list[str]
    path: Path | None = None
    outputs: list[list[float]] = field(default_factory=list)
    targets: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the parameters and the outputs, as plain numbers; what is not finite is None."""
        certificate = {key: _plain(value) for key, value in vars(self.certificate).items()}
        return {
            "regime": self.regime,
            "rank": self.rank,
            "outputs": self.shape[0],
            "parameters": self.shape[1],
            "solver": self.solver,
            "eps": _plain(self.eps),
            "stopping_time": _plain(self.stopping_time),
            "cost": _plain(self.cost),
            "s": _plain(self.s),
            "ended": self.ended,
            "end_point": None if self.end is None else {k: _plain(v) for k, v in vars(self.end).items()},
            "losses": [{key: _plain(value) for key, value in vars(loss).items()} for loss in self.losses],
            "certificate": certificate,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "notes": self.notes,
            "history": [{key: _plain(value) for key, value in m._asdict().items()} for m in self.history],
        }


def slope_of(history: list[Moment]) -> float | None:
    """Least-squares slope of ln C against s over the points down to :data:`FLOOR` of the first cost."""
    chosen = [m for m in history if m.cost > FLOOR * history[0].cost * 0.99]
    if len(chosen) < 3:
        return None
    s = torch.tensor([m.s for m in chosen], dtype=torch.float64)
    y = torch.tensor([math.log(m.cost) for m in chosen], dtype=torch.float64)
    s = s - s.mean()
    return float((s @ (y - y.mean())) / (s @ s))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
