"""The search for a step: solve, scale, try, keep or undo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.control import Direction, solve
from pullback.curvature import Gradient, Group, Linearisation
from pullback.optim.damping import DampingControl, Taken
from pullback.optim.record import StepRecord


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
        lin: the linearisation.
        groups: the groups that solve together.
        split: gradient of every group.
        control: the damping.
        rates: learning rate by parameter.
        loss: loss before the step, nan if unknown.
        unit: mean diagonal of the Gram.
        trial: evaluates the loss at the present weights; None to take the step untried.
        whole: whether the trial loss holds everything that ``backward`` was called on.
        clock: counts the phases.
    """

    lin: Linearisation
    groups: Sequence[Group]
    split: Sequence[Gradient]
    control: DampingControl
    rates: dict[int, float]
    loss: float
    unit: float
    trial: Callable[[], Tensor] | None
    whole: bool
    clock: Clock

    def run(self) -> StepRecord:
        """Try steps of growing damping until one lowers the loss; weights end moved or exactly as before."""
        trained = [p for group in self.groups for block in group.blocks for p in block.params]
        before = [p.detach().clone() for p in trained]
        try:
            return self._run(trained, before)
        except BaseException:
            restore(trained, before)
            raise

    def _run(self, trained: Sequence[Tensor], before: Sequence[Tensor]) -> StepRecord:
        control, eps = self.control, torch.finfo(self.lin.e0.dtype).eps
        assert control.mu is not None
        mu = start = control.mu
        count = 0
        trials = control.options.trials if self.trial is not None else 1
        for _ in range(trials):
            count += 1
            self._sharpen(mu)
            direction = solve(self.groups, self.split, mu)
            alpha = direction.scale if len(self.groups) > 1 else 1.0
            step, Us, slope, norm2 = self._move(direction, alpha)
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
                control.taken = Taken(after, gain, slope, start, step)
                break
            restore(trained, before)
            mu = control.fail()
        spaces = tuple(f"{group.space} {group.outcome}" for group in self.groups)
        return StepRecord(
            loss=self.loss,
            predicted=predicted,
            actual=actual,
            accepted=accepted,
            mu=direction.mu,
            scale=alpha,
            rank=self.lin.R,
            trials=count,
            spaces=spaces,
            seconds=self.clock.seconds,
        )

    def _sharpen(self, mu: float) -> None:
        """Solve in float64 once the damping is so small that a float32 Gram has lost it (theory 3)."""
        if mu < 1e-3 * self.unit:
            for group in self.groups:
                if group.matrix.dtype == torch.float32:
                    group.to_double()

    def _move(self, direction: Direction, alpha: float) -> tuple[dict[int, Tensor], Tensor, float, float]:
        """Move the weights by s = lr alpha d.

        Returns:
            s by parameter, U s, g . s and |s|^2.
        """
        lrs = {self.rates[id(p)] for g in self.groups for block in g.blocks for p in block.params}
        step: dict[int, Tensor] = {}
        for group, parts in zip(self.groups, direction.d, strict=True):
            for block, d in zip(group.blocks, parts, strict=True):
                if len(lrs) == 1:
                    d *= alpha * next(iter(lrs))
                for p, piece in zip(block.params, block.unpack(d), strict=True):
                    if len(lrs) > 1:
                        piece *= alpha * self.rates[id(p)]
                    p.add_(piece)
                    step[id(p)] = piece
        if len(lrs) == 1:
            factor = alpha * lrs.pop()
            return step, direction.Ud * factor, direction.slope * factor, direction.norm2 * factor**2
        # Rates that differ bend the direction: ask the rows again.
        Us = torch.zeros_like(direction.Ud)
        for group, parts in zip(self.groups, direction.d, strict=True):
            Us += group.matvec([part.to(group.matrix.dtype) for part in parts]).to(Us.dtype)
        slope = norm2 = 0.0
        for own, parts in zip(self.split, direction.d, strict=True):
            slope += sum(float(a @ b) for a, b in zip(own.g, parts, strict=True))
            norm2 += sum(float(b @ b) for b in parts)
        return step, Us, slope, norm2

    def _predicted(self, Us: Tensor, slope: float, mass: float) -> float:
        """Decrease promised by the model, without the mu term where the metric is exact (theory 3)."""
        curvature = 0.5 * float(Us @ Us)
        if not self.lin.exact:
            return -(slope + curvature + 0.5 * mass)
        if self.whole:
            return -(slope + curvature)
        # Of the terms alone: what else is in the gradient is not in a replayed loss either.
        return -(float(self.lin.e0 @ Us) + curvature)


def restore(params: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put weights back, bit for bit."""
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
