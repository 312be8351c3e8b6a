"""One attempt at a step: at a given damping, move the weights and say what became of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pullback.control import Direction, mix, solve
from pullback.errors import SolverError
from pullback.optim.options import Momentum
from pullback.optim.ridge import along
from pullback.optim.search import Clock
from pullback.optim.system import System


@dataclass
class Attempt:
    """What was tried.

    Attributes:
        step: the step s by parameter; the weights are moved by it.
        mu: damping it was solved with.
        scale: factor on the direction.
        slope: g . s.
        predicted: decrease the quadratic model promises.
        after: loss after it, None if it was not evaluated.
        spaces: how each group was solved.
        runs: forward passes it took.
        note: which of several sweeps it was, if there were several.
        grow: factor on mu if the step is kept, instead of what its gain ratio would say; None for the ratio.
    """

    step: dict[int, Tensor]
    mu: float
    scale: float
    slope: float
    predicted: float
    after: float | None
    spaces: tuple[str, ...]
    runs: int
    note: str = ""
    grow: float | None = None


class Policy(Protocol):
    """Makes attempts from one linearisation."""

    @property
    def params(self) -> list[Tensor]:
        """All parameters that move."""

    @property
    def e0(self) -> Tensor:
        """The residual."""

    @property
    def unit(self) -> float:
        """Mean diagonal of the Gram, in which damping is bounded."""

    def attempt(self, mu: float) -> Attempt:
        """Move the weights by a step of damping ``mu``."""


@dataclass
class OpenLoop:
    """Every group solves for itself, all at once.

    Attributes:
        system: the linear system of this step.
        momentum: how the previous step enters.
        previous: the previous step by parameter.
        rates: learning rate by parameter.
        trial: evaluates the loss at the present weights; None to take the step untried.
        whole: whether the trial loss holds everything that ``backward`` was called on.
        clock: counts the phases.
    """

    system: System
    momentum: Momentum | None
    previous: dict[int, Tensor]
    rates: dict[int, float]
    trial: Callable[[], Tensor] | None
    whole: bool
    clock: Clock

    @property
    def params(self) -> list[Tensor]:
        """All parameters that move."""
        return self.system.params

    @property
    def e0(self) -> Tensor:
        """The residual."""
        return self.system.lin.e0

    @property
    def unit(self) -> float:
        """Mean diagonal of the Gram, in which damping is bounded."""
        return self.system.unit

    def attempt(self, mu: float) -> Attempt:
        """See :class:`Policy`."""
        system = self.system
        system.sharpen(mu + system.ridge)
        direction = self._direction(mu)
        joint = len(system.solvers) == 1 and self.momentum is None
        alpha = 1.0 if joint else direction.scale
        step, Us, slope, norm2 = system.move(direction, alpha, self.rates)
        pulled = along(system.ridge, system.params, step)
        predicted = decrease(self.e0, Us, slope - pulled, mu * norm2, system.lin.exact, self.whole)
        predicted -= pulled + 0.5 * system.ridge * norm2
        self.clock.mark("solve")
        note, after = "", None
        if self.trial is not None:
            try:
                after = float(self.trial())
            except SolverError as error:  # so far off that an ODE in the model has no solution: too far
                note, after = str(error), math.inf
        self.clock.mark("trial")
        spaces = tuple(f"{solver.name} {solver.outcome}" for solver in system.solvers)
        return Attempt(step, mu, alpha, slope, predicted, after, spaces, int(self.trial is not None), note)

    def _direction(self, mu: float) -> Direction:
        system = self.system
        whole = mu + system.ridge
        if self.momentum is None or not self.previous:
            return solve(system.solvers, system.gradients, whole)
        previous = system.packed(self.previous)
        if self.momentum.kind == "spring":
            shift = [[self.momentum.decay * mu / whole * part for part in parts] for parts in previous]
            return solve(system.solvers, system.gradients, whole, shift)
        return mix(solve(system.solvers, system.gradients, whole), system.solvers, system.gradients, previous)


def decrease(e0: Tensor, Us: Tensor, slope: float, mass: float, exact: bool, whole: bool) -> float:
    """Decrease of the terms promised by the model, without the mu term where the metric is exact (theory 3).

    Args:
        e0: residual.
        Us: U s.
        slope: g . s.
        mass: mu |s|^2.
        exact: whether the metric is exact.
        whole: whether the loss that is tried holds everything that ``backward`` was called on.
    """
    curvature = 0.5 * float(Us @ Us)
    if not exact:
        return -(slope + curvature + 0.5 * mass)
    # What else is in the gradient than the terms is not in a replayed loss either.
    return -((slope if whole else float(e0 @ Us)) + curvature)
