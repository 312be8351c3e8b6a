"""One run: integration in phases, each with a rank less, and the record of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pullback.flow.aims import Squared
from pullback.flow.constrained import constrained_lift
from pullback.flow.discrete import discretise
from pullback.flow.endpoint import EndPoint, classify
from pullback.flow.errors import FlowError
from pullback.flow.events import Equilibrium, Event, RankLoss
from pullback.flow.field import Bounds, Ended, Field, Point, lift_of
from pullback.flow.integrate import integrate
from pullback.flow.record import Certificate, FlowRun, Loss, Moment, Path, slope_of

if TYPE_CHECKING:
    from pullback.flow.adapted import AdaptedFlow

#: Called with the share of the time that is done and the smallest singular value.
Progress = Callable[[float, float | None], None]

#: Where no stopping time is promised the run may take so many units of time (a residual's e-folds).
HORIZON = 40.0
#: |P v| / |v| at which a point counts as an equilibrium.
STILL = 1e-6
_SHOWN = 8
INTERRUPTED = "interrupted"


class Work:
    """One run of a flow, from the weights as they are.

    Args:
        flow: the flow, prepared.
        eps: cost to stop at, None without.
        promise: the time promised for it; None where none is.
        end: the time to end at.
        method: how to integrate.
        tol: tolerance of a step.
    """

    def __init__(
        self, flow: AdaptedFlow, eps: float | None, promise: float | None, end: float, method: str, tol: float
    ) -> None:
        self.flow, self.eps, self.promise, self.end = flow, eps, promise, end
        self.method, self.tol = method, tol
        self.field = Field(flow.system, flow.aim, lift_of(flow.choice), flow.alpha, Bounds(0, 0.0))
        self.field.condition = flow.choice.condition
        self.monitor = True
        self.kept: Path | None = None
        self.progress: Progress | None = None
        self.history: list[Moment] = []
        self.shown: list[list[float]] = []
        self.losses: list[Loss] = []
        self.notes = list(flow.notes)
        self.length = flow.aim.size(0.0, flow.x0)
        self.point: Point | None = None

    def go(self) -> FlowRun:
        """Run it."""
        flow = self.flow
        theta = flow.system.get()
        began = self.field.began = time.monotonic()
        self.accept(self.field.at(0.0, theta))
        try:
            ended = self.phases()
        except KeyboardInterrupt:
            ended = INTERRUPTED
        except (Ended, FlowError) as reason:
            ended = str(reason)
        point = self.point
        assert point is not None
        flow.system.put(point.theta)
        end = None
        if ended != INTERRUPTED:
            end = classify(
                flow.system,
                flow.aim,
                point,
                eps=self.eps,
                tolerance=flow.choice.tolerance,
                force=max(STILL, 10 * self.step_tol()),
                rank=self.losses[-1].rank if self.losses else None,
            )
            flow.system.put(point.theta)
            self.say_how_still(end)
        targets: list[float] | None = None
        if isinstance(flow.aim, Squared):
            targets = flow.aim.target(point.s)[:_SHOWN].tolist()
        return FlowRun(
            flow.regime, flow.rank, (flow.choice.rows, flow.choice.columns),
            flow.choice.solver if point.inverse is None else point.inverse.name,
            self.eps, self.promise, point.cost, point.s, ended, self.history, self.losses, end, self.certificate(),
            self.field.count, time.monotonic() - began, self.notes, self.kept, self.shown, targets,
        )  # fmt: skip

    def say_how_still(self, end: EndPoint) -> None:
        """Say how fast the cost still falls where no time is promised and the run was cut short of an equilibrium."""
        aim, promised = self.flow.aim, self.flow.promised and not self.losses
        if promised or end.kind != "no equilibrium" or end.force is None or not isinstance(aim, Squared):
            return
        # dC/ds = -|P v|^2 (theory 14); over a unit 1/(2c) that is 2 force^2 of C.
        self.notes.append(
            f"No equilibrium yet: the cost still falls by {2 * end.force**2:.1e} of itself in a time of {aim.unit:g}."
        )

    def phases(self) -> str:
        """One integration after another, each with a rank less."""
        while True:
            point = self.point
            assert point is not None
            events = self.events()
            met = next((name for name, event in events.items() if event(point) <= 0), None)
            if met is None:
                scheme = self.discrete if self.method == "discrete" else self.adaptive
                last, met = scheme(point, events)
                if last is not point and (not self.history or self.history[-1].s < last.s):
                    self.accept(last)
            if met != "rank":
                return "time" if met == "time" else met
            self.lose()

    def step_tol(self) -> float:
        """Directions of lost modes are known to fewer digits than the field before."""
        return max(self.tol, 1e-6) if self.losses else self.tol

    def adaptive(self, point: Point, events: dict[str, Event]) -> tuple[Point, str]:
        """By torchdiffeq."""
        return integrate(self.field, point, self.end, events, self.accept, method=self.method, tol=self.step_tol())

    def discrete(self, point: Point, events: dict[str, Event]) -> tuple[Point, str]:
        """By the discrete scheme."""
        return discretise(self.field, point, self.end, events, self.accept, tol=self.step_tol())

    def events(self) -> dict[str, Event]:
        """What may end this phase."""
        flow = self.flow
        found: dict[str, Event] = {}
        watched = flow.regime != "any-rank" and flow.choice.solver != "lsmr" and not self.losses
        if self.monitor and flow.alpha > 0 and watched:
            found["rank"] = RankLoss(self.field, flow.choice.tolerance)
        if flow.alpha == 1 and (not flow.promised or self.losses):
            found["equilibrium"] = Equilibrium(STILL)
        return found

    def lose(self) -> None:
        """Note the loss of rank and go on with the constrained system."""
        point = self.point
        assert point is not None
        assert point.D is not None
        extremes = self.field.look(point)
        assert extremes is not None
        # Modes that have fallen with the smallest one are lost with it.
        share = max(10 * self.flow.choice.tolerance, 10 * extremes.ratio)
        lost = sum(value <= share * extremes.largest for value in extremes.smallest) or 1
        left = min(point.D.rows, point.D.columns) - lost
        self.losses.append(Loss(point.s, point.cost, extremes.ratio, left))
        self.notes.append(
            f"The rank of D fell to {left} at s = {point.s:.6g}; from there the constrained system runs"
            + (", and the stopping time holds no more." if self.flow.promised else ".")
        )
        if self.promise is not None:
            # That time is void: there is another place to arrive at.
            self.end = max(self.end, point.s + HORIZON * self.flow.aim.unit)
        self.field.lift = constrained_lift(self.flow.system, point.D, lost)
        self.point = self.field.at(point.s, point.theta)

    def accept(self, point: Point) -> None:
        """Note an accepted point."""
        self.point = point
        flow, aim = self.flow, self.flow.aim
        extremes = self.field.look(point) if self.monitor else None
        line = aim.advance(0.0, flow.x0, point.s) if flow.promised else None
        deviation = None if line is None else float((point.x - line).norm()) / self.length
        self.history.append(
            Moment(
                point.s,
                point.cost,
                None if line is None else aim.cost(point.s, line),
                None if extremes is None else extremes.smallest,
                None if extremes is None else extremes.largest,
                deviation,
                None if point.D is None else point.missed(),
                time.monotonic() - self.field.began,
            )
        )
        self.shown.append(point.x[:_SHOWN].tolist())
        if self.kept is not None:
            self.kept.times.append(point.s)
            self.kept.thetas.append(point.theta)
            self.kept.slopes.append(point.slope)
        if self.progress is not None:
            self.progress(point.s / self.end, None if extremes is None else extremes.smallest[0])

    def certificate(self) -> Certificate:
        """Promise and outcome."""
        flow, last = self.flow, self.history[-1]
        expected = -4 * flow.aim.c if isinstance(flow.aim, Squared) and flow.promised else None
        deviations = [m.deviation for m in self.history if m.deviation is not None]
        values = [m.smallest[0] for m in self.history if m.smallest is not None]
        missed = [m.missed for m in self.history if m.missed is not None]
        held = None
        if self.promise is not None and self.eps is not None:
            held = last.s >= self.promise * (1 - 1e-12) and last.cost <= self.eps * 1.01
        return Certificate(
            last.predicted, last.cost, slope_of(self.history), expected, max(deviations, default=None),
            min(values, default=None), max(missed, default=None), held,
        )  # fmt: skip
