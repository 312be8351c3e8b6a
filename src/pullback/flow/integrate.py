"""Adaptive integration by torchdiffeq, with errors measured where they matter: in the outputs.

A step's error e of the parameters is held to ``|D e| <= tol |x - y|`` and ``|e| <= tol |theta'| unit``: relative to the
distance still to go, since the field aims anew from wherever it is, and what was lost early decays with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pullback.flow.errors import FlowError
from pullback.flow.events import NEAR, Event, RankLoss
from pullback.flow.field import Ended, Field, Point

#: Called with every accepted point.
Accept = Callable[[Point], None]

METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_FIRST = 0.01
_HOPELESS = 1e12
_SHORTER = 8.0
_NEARLY = 1e-3


class _FoundError(Exception):
    """A loss of rank is within the tolerance behind the last accepted point."""


class Run:
    """The function torchdiffeq integrates; keeps the points it saw.

    Args:
        field: the velocity field.
        start: where the run begins.
        end: the time it ends at.
        events: what may end it before, by name.
        accept: called with every accepted point.
        tol: how well a loss of rank is located, in units of the aim's time.
    """

    def __init__(
        self, field: Field, start: Point, end: float, events: dict[str, Event], accept: Accept, tol: float
    ) -> None:
        self.field, self.events, self.accept, self.tol = field, events, accept, tol
        self.unit = field.aim.unit
        self.end = end
        self.node = self.last = start
        self.fired = ""

    def __call__(self, t: Tensor, theta: Tensor) -> Tensor:
        """The slope theta' in units of the aim's time."""
        if not self._known(self.last, float(t), theta):
            try:
                self.last = self.field.at(float(t) * self.unit, theta.clone())
            except FlowError:
                # A trial stage beyond what the field can do: an error that no tolerance takes, hence a shorter step.
                return torch.full_like(theta, _HOPELESS)
            if self._jumped():
                if float(t) - self.node.s / self.unit <= self.tol:
                    raise _FoundError
                return torch.full_like(theta, _HOPELESS)
        return self.last.slope * self.unit

    def _jumped(self) -> bool:
        """Whether a trial stage is behind a zero of the smallest singular value: no step may jump there and back."""
        watch, before = self.events.get("rank"), self.node.extremes
        if not isinstance(watch, RankLoss) or before is None or before.ratio > NEAR:
            return False
        return watch(self.last) + watch.tolerance < 0

    def _known(self, point: Point, t: float, theta: Tensor) -> bool:
        return abs(point.s - t * self.unit) <= 1e-13 * (1 + abs(point.s)) and torch.equal(point.theta, theta)

    def callback_step(self, t: Tensor, theta: Tensor, dt: Tensor) -> None:
        """A step begins: if it begins where the last one ended, that one was accepted."""
        self._settle(float(t), theta)

    def _settle(self, t: float, theta: Tensor) -> Point:
        if self._known(self.node, t, theta):
            return self.node
        point = self.last if self._known(self.last, t, theta) else self.field.at(t * self.unit, theta.clone())
        self.last = self.node = point
        for event in self.events.values():
            if isinstance(event, RankLoss):
                event.accepted(point)
        self.accept(point)
        return point

    def norm(self, error: Tensor) -> Tensor:
        """Size of an error of the parameters, see above."""
        point = self.node
        tiny = torch.finfo(error.dtype).tiny
        own: Tensor = error.norm() / (point.slope.norm() * self.unit).clamp_min(tiny)
        if point.D is None:
            return own
        scaled: Tensor = torch.maximum(own, point.D.matvec(error).norm() / max(point.size, tiny))
        return scaled

    def event(self, t: Tensor, theta: Tensor) -> Tensor:
        """Positive while the run goes on. Once an event has been met, that one alone is followed to its place."""
        if self.fired:
            return self._sign(self._value(self.fired, float(t), theta), theta)
        if float(t) >= self.end * (1 - 1e-14):
            self.fired = "time"
            return self._sign(-1.0, theta)
        if self._known(self.node, float(t), theta):
            return self._sign(1.0, theta)
        for name in self.events:
            if self._value(name, float(t), theta) <= 0:
                self.fired = name
                return self._sign(-1.0, theta)
        return self._sign(1.0, theta)

    def _value(self, name: str, t: float, theta: Tensor) -> float:
        if name == "time":
            return 1.0 if t < self.end else -1.0
        if self._known(self.node, t, theta):
            return 1.0
        if not self._known(self.last, t, theta):
            self.last = self.field.at(t * self.unit, theta.clone())
        return self.events[name](self.last)

    @staticmethod
    def _sign(value: float, like: Tensor) -> Tensor:
        return like.new_tensor(1.0 if value > 0 else -1.0)


def integrate(
    field: Field,
    start: Point,
    end: float,
    events: dict[str, Event],
    accept: Accept,
    *,
    method: str,
    tol: float,
) -> tuple[Point, str]:
    """Run the flow from a point until an event or the end.

    Args:
        field: the velocity field.
        start: where it begins.
        end: the time s it ends at.
        events: what may end it before, by name; positive at the start.
        accept: called with every accepted point, the start left out.
        method: one of torchdiffeq's adaptive methods.
        tol: tolerance of a step, see above.

    Returns:
        The last point, and which event it was: ``"time"`` or a name of ``events``.

    Raises:
        Ended: if a bound was reached, in words.
        FlowError: if the field cannot be evaluated, or torchdiffeq is not installed.
    """
    odeint = _odeint()
    unit = field.aim.unit
    for event in events.values():
        if isinstance(event, RankLoss):
            event.accepted(start)
    longest = float("inf")
    while True:
        run = Run(field, start, end / unit, events, accept, tol)
        t = torch.tensor([start.s / unit, end / unit], dtype=torch.float64)
        first = min(_FIRST, float(t[1] - t[0]) / 2, longest)
        options = {"norm": run.norm, "first_step": first, "max_step": longest, "step_t": t[1:], "dtype": torch.float64}
        try:
            at, path = odeint(
                run, start.theta, t, rtol=0.0, atol=tol, method=method, options=options, event_fn=run.event
            )
        except _FoundError:
            return run.node, "rank"
        except AssertionError as error:  # torchdiffeq's own
            if "rank" in events and nearly_lost(field, run.node):
                return run.node, "rank"
            raise Ended(
                f"stopped at s = {run.node.s:.6g}: the step fell below what time can resolve ({error}); the field is "
                "singular there (a lost rank?) or not smooth"
            ) from error
        if run.fired == "time":
            at = t[1]
        gap = float(at) - run.node.s / unit
        if run.fired != "rank" or gap <= tol:
            return run._settle(float(at), path[-1]), run.fired
        # The field is singular where the rank is lost, and no polynomial fits there: that step again, in shorter ones.
        start, longest = run.node, gap / _SHORTER


def nearly_lost(field: Field, point: Point) -> bool:
    """Whether steps that cannot get shorter are those in front of a loss of rank."""
    extremes = field.look(point)
    return extremes is not None and extremes.ratio < _NEARLY


def _odeint() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise FlowError(
            'Adaptive integration needs torchdiffeq: pip install "pullback[flow]"; method="discrete" does without.'
        ) from error
    found: Callable[..., Any] = odeint
    return found
