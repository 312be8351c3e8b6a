r"""The discrete scheme: Gauss-Newton steps along the line in output space, with step control.

A step of time h goes to where the flow in output space will be, :math:`\theta^+ = \theta + D^+ (x(s + h) - x(s))`.
For squared cost that is an Euler step of length :math:`\eta / 2c`, :math:`\eta = 1 - e^{-2ch}`, hence Gauss-Newton with
step length :math:`\eta` (theory 14), on a clock by which straight lines take no error: what is left is the curvature
of the model, and the step is chosen so that it stays below the tolerance.
"""

from __future__ import annotations

from pullback.flow.events import Event, RankLoss
from pullback.flow.field import Ended, Field, Point
from pullback.flow.integrate import Accept, nearly_lost

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 3.0
_FIRST = 0.1


def discretise(
    field: Field, start: Point, end: float, events: dict[str, Event], accept: Accept, *, tol: float
) -> tuple[Point, str]:
    """Run the scheme; arguments and results as :func:`pullback.flow.integrate.integrate`.

    Args:
        field: the velocity field.
        start: where it begins.
        end: the time s it ends at.
        events: what may end it before, by name.
        accept: called with every accepted point.
        tol: what a step may miss of the way that is left, ``|x - x(s + h)| <= tol |x - y|``.

    Raises:
        Ended: if a bound was reached, or steps fell below what time can resolve.
    """
    aim, system = field.aim, field.system
    point, h = start, _FIRST * aim.unit
    for event in events.values():
        if isinstance(event, RankLoss):
            event.accepted(start)
    while point.s < end:
        h = min(h, end - point.s)
        if not point.s + h > point.s + 1e-14 * aim.unit:
            if "rank" in events and nearly_lost(field, point):
                return point, "rank"
            raise Ended(f"stopped at s = {point.s:.6g}: the step fell below what time can resolve; use an ODE method")
        aimed = aim.advance(point.s, point.x, h)
        assert point.inverse is not None
        move = point.inverse.apply(aimed - point.x)
        theta = point.theta + move
        system.put(theta)
        reached = aim.coordinates(system.outputs())
        # What is outside of the range of D is no error of the step.
        expected = point.x + point.D.matvec(move) if point.D is not None else aimed
        missed = float((reached - expected).norm()) / max(aim.size(point.s, point.x), 1e-300)
        # A step of length h misses by the square of it.
        change = min(_GROW, max(_SHRINK, _SAFETY * (tol / max(missed, 1e-300)) ** 0.5))
        if not missed <= tol:
            h *= min(change, 0.5)
            field.bounds.check(field.count, field.began)
            field.count += 1
            system.put(point.theta)
            continue
        s = end if point.s + h >= end * (1 - 1e-14) else point.s + h
        ahead = field.at(s, theta)
        met = next((name for name, event in events.items() if event(ahead) <= 0), "")
        if met == "rank":
            if h <= tol * aim.unit:
                return point, "rank"
            h *= 0.5  # halved until the place is known
            continue
        point = ahead
        for event in events.values():
            if isinstance(event, RankLoss):
                event.accepted(point)
        accept(point)
        if met:
            return point, met
        h *= change
    return point, "time"
