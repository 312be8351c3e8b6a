r"""The velocity field :math:`\theta' = D^+ v` as a function that an integrator calls, and what it saw on the way.

Time is counted in units of the aim, :math:`\tau = s / unit`, in which a residual decays by the factor e.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.flow.aims import Aim
from pullback.flow.inverse import Extremes, Inverse
from pullback.flow.regimes import Choice
from pullback.flow.system import Jacobian, OutputSystem


class Ended(Exception):  # noqa: N818 (not an error: a bound was reached)
    """A bound was reached; the message is the reason."""


@dataclass
class Point:
    """One evaluation of the field.

    Attributes:
        s: the time.
        theta: packed parameters, (K,).
        slope: theta', (K,).
        x: coordinates of the outputs, (R,).
        wanted: the velocity v that the aim asks for, (R,).
        D: the Jacobian; None for the standard flow.
        inverse: its pseudo-inverse.
        cost: C.
        size: what errors of x are compared with.
        extremes: ends of the spectrum of D, once asked for.
    """

    s: float
    theta: Tensor
    slope: Tensor
    x: Tensor
    wanted: Tensor
    D: Jacobian | None
    inverse: Inverse | None
    cost: float
    size: float
    extremes: Extremes | None = None

    def missed(self) -> float:
        """|x' - v| / |v|: what of the wanted velocity is outside of the range of D, or round-off."""
        assert self.D is not None
        return float((self.D.matvec(self.slope) - self.wanted).norm() / self.wanted.norm().clamp_min(1e-300))


@dataclass
class Bounds:
    """How long a run may take.

    Attributes:
        evaluations: of the field.
        seconds: of wall time.
    """

    evaluations: int
    seconds: float

    def check(self, done: int, began: float) -> None:
        """Raise Ended if a bound is reached."""
        if done >= self.evaluations:
            raise Ended(
                f"stopped after {done} evaluations; D is badly conditioned or the tolerance too tight: "
                "give it more (evaluations=...), a larger tol, or a model with a better condition"
            )
        if time.monotonic() - began >= self.seconds:
            raise Ended(f"stopped after {self.seconds:g} seconds; give it more (seconds=...)")


#: Takes the wanted velocity, the Jacobian and its condition as last known to theta' and the pseudo-inverse used.
Lift = Callable[[OutputSystem, Jacobian, Tensor, float | None], tuple[Tensor, Inverse]]


def lift_of(choice: Choice) -> Lift:
    """The horizontal lift of the wanted velocity, :math:`D^+ v`."""

    def lift(system: OutputSystem, D: Jacobian, v: Tensor, condition: float | None) -> tuple[Tensor, Inverse]:
        inverse = choice.invert(D, condition)
        return inverse.apply(v), inverse

    return lift


class Field:
    r"""The field along a homotopy, :math:`\theta' = (1 - \alpha) D^\top v + \alpha D^+ v`.

    :math:`\alpha = 1` is the adapted flow, 0 the standard gradient flow, which takes one backward pass and no D.

    Args:
        system: the model on its inputs.
        aim: where outputs should go.
        lift: how the wanted velocity becomes theta'.
        alpha: place on the homotopy, from 0 to 1.
        bounds: when to give up.
    """

    def __init__(self, system: OutputSystem, aim: Aim, lift: Lift, alpha: float, bounds: Bounds) -> None:
        self.system, self.aim, self.lift, self.alpha, self.bounds = system, aim, lift, alpha, bounds
        self.condition: float | None = None
        self.guess: tuple[Tensor, Tensor] | None = None
        self.count = 0
        self.began = time.monotonic()

    def at(self, s: float, theta: Tensor) -> Point:
        """Evaluate the field.

        Raises:
            FlowError: if something is not finite, or D^+ cannot be taken.
            Ended: if a bound is reached.
        """
        self.bounds.check(self.count, self.began)
        self.count += 1
        self.system.put(theta)
        if self.alpha == 0:
            return self._standard(s, theta)
        D = self.system.linearise()
        x = self.aim.coordinates(D.z)
        v = self.aim.velocity(s, x)
        slope, inverse = self.lift(self.system, D, v, self.condition)
        if self.alpha != 1:
            slope = self.alpha * slope + (1 - self.alpha) * D.rmatvec(v)
        return Point(s, theta, slope, x, v, D, inverse, self.aim.cost(s, x), self.aim.size(s, x))

    def _standard(self, s: float, theta: Tensor) -> Point:
        z = self.system.outputs()
        x = self.aim.coordinates(z)
        v = self.aim.velocity(s, x)
        slope = self.system.pull(self.aim.spread(v, z))
        return Point(s, theta, slope, x, v, None, None, self.aim.cost(s, x), self.aim.size(s, x))

    def look(self, point: Point) -> Extremes | None:
        """The ends of the spectrum there, each computed once and from where the last were."""
        if point.extremes is None and point.inverse is not None:
            point.extremes = point.inverse.extremes(self.guess)
            self.guess = point.extremes.guess
            ratio = point.extremes.ratio
            self.condition = 1 / ratio if ratio > 0 else float("inf")
        return point.extremes


def finite(theta: Tensor) -> bool:
    """Whether all numbers are."""
    return bool(torch.isfinite(theta).all())
