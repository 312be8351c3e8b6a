"""The search for a step: solve, scale, try, keep or undo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.control import Direction, mix, solve
from pullback.optim.damping import DampingControl, Taken
from pullback.optim.options import Momentum
from pullback.optim.record import StepRecord
from pullback.optim.system import System


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def add(self, phase: str, seconds: float) -> None:
        """Count ``seconds`` to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def mark(self, phase: str) -> None:
        """Count the time since the last mark to a phase."""
        now = time.perf_counter()
        self.add(phase, now - self._last)
        self._last = now


@dataclass
class Search:
    """Everything one step needs.

    Attributes:
        system: the linear system of this step.
        control: the damping.
        momentum: how the previous step enters.
        previous: the previous step by parameter.
        rates: learning rate by parameter.
        loss: loss before the step, nan if unknown.
        trial: evaluates the loss at the present weights; None to take the step untried.
        whole: whether the trial loss holds everything that ``backward`` was called on.
        clock: counts the phases.
    """

    system: System
    control: DampingControl
    momentum: Momentum | None
    previous: dict[int, Tensor]
    rates: dict[int, float]
    loss: float
    trial: Callable[[], Tensor] | None
    whole: bool
    clock: Clock

    def run(self) -> StepRecord:
        """Try steps of growing damping until one lowers the loss; weights end moved or exactly as before."""
        trained = self.system.params
        before = [p.detach().clone() for p in trained]
        try:
            return self._run(trained, before)
        except BaseException:
            restore(trained, before)
            raise

    def _run(self, trained: Sequence[Tensor], before: Sequence[Tensor]) -> StepRecord:
        control, system = self.control, self.system
        eps = torch.finfo(system.lin.e0.dtype).eps
        assert control.mu is not None
        mu = start = control.mu
        trials = control.options.trials if self.trial is not None else 1
        count = 0
        for _ in range(trials):
            count += 1
            system.sharpen(mu)
            direction = self._direction(mu)
            joint = len(system.solvers) == 1 and self.momentum is None
            alpha = 1.0 if joint else direction.scale
            step, Us, slope, norm2 = system.move(direction, alpha, self.rates)
            predicted = self._predicted(Us, slope, mu * norm2)
            self.clock.mark("solve")
            after = actual = None
            if self.trial is not None:
                after = float(self.trial())
                actual = self.loss - after
            self.clock.mark("trial")
            finite = math.isfinite(predicted if actual is None else actual)
            # Below the resolution of the loss the ratio is noise: such a step is kept, mu left alone.
            blind = actual is None or max(abs(predicted), abs(actual)) <= 8 * eps * abs(self.loss)
            accepted = finite and (actual is None or blind or actual >= 0)
            if accepted:
                gain = None if blind or actual is None or predicted <= 0 else actual / predicted
                guarded = self.trial is not None or control.options.control == "fixed"
                kept = {} if guarded else dict(zip(map(id, trained), before, strict=True))
                control.taken = Taken(after, gain, slope, start, step, self.loss, kept)
                break
            restore(trained, before)
            mu = control.fail()
        return StepRecord(
            loss=self.loss,
            predicted=predicted,
            actual=actual,
            accepted=accepted,
            mu=direction.mu,
            scale=alpha,
            rank=system.lin.R,
            trials=count,
            spaces=tuple(f"{solver.name} {solver.outcome}" for solver in system.solvers),
            seconds=self.clock.seconds,
        )

    def _direction(self, mu: float) -> Direction:
        system = self.system
        if self.momentum is None or not self.previous:
            return solve(system.solvers, system.gradients, mu)
        previous = system.packed(self.previous)
        if self.momentum.kind == "spring":
            shift = [[self.momentum.decay * part for part in parts] for parts in previous]
            return solve(system.solvers, system.gradients, mu, shift)
        return mix(solve(system.solvers, system.gradients, mu), system.solvers, system.gradients, previous)

    def _predicted(self, Us: Tensor, slope: float, mass: float) -> float:
        """Decrease promised by the model, without the mu term where the metric is exact (theory 3)."""
        curvature = 0.5 * float(Us @ Us)
        if not self.system.lin.exact:
            return -(slope + curvature + 0.5 * mass)
        if self.whole:
            return -(slope + curvature)
        # Of the terms alone: what else is in the gradient is not in a replayed loss either.
        return -(float(self.system.lin.e0 @ Us) + curvature)


def restore(params: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put weights back, bit for bit."""
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
