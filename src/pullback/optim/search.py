"""The search for a step: attempt, keep or undo, with more damping each time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pullback.optim.damping import DampingControl, Taken
from pullback.optim.record import StepRecord

if TYPE_CHECKING:
    from pullback.optim.attempt import Policy


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
        policy: makes attempts.
        control: the damping.
        loss: loss before the step, nan if unknown.
        tried: whether attempts evaluate the loss, so that a bad one is undone and another made.
        clock: counts the phases.
    """

    policy: Policy
    control: DampingControl
    loss: float
    tried: bool
    clock: Clock

    def run(self) -> StepRecord:
        """Try steps of growing damping until one lowers the loss; weights end moved or exactly as before."""
        trained = self.policy.params
        before = [p.detach().clone() for p in trained]
        try:
            return self._run(trained, before)
        except BaseException:
            restore(trained, before)
            raise

    def _run(self, trained: Sequence[Tensor], before: Sequence[Tensor]) -> StepRecord:
        control = self.control
        eps = torch.finfo(self.policy.e0.dtype).eps
        assert control.mu is not None
        mu = start = control.mu
        trials = control.options.trials if self.tried else 1
        count = runs = 0
        failed = ""
        for _ in range(trials):
            count += 1
            attempt = self.policy.attempt(mu)
            runs += attempt.runs
            predicted = attempt.predicted
            actual = None if attempt.after is None or not self.tried else self.loss - attempt.after
            finite = math.isfinite(predicted if actual is None else actual)
            # Below the resolution of the loss the ratio is noise: such a step is kept, mu left alone.
            blind = actual is None or max(abs(predicted), abs(actual)) <= 8 * eps * abs(self.loss)
            accepted = finite and (actual is None or blind or actual >= 0)
            if accepted:
                ratio = not blind and actual is not None and predicted > 0 and attempt.grow is None
                gain = actual / predicted if ratio and actual is not None else None
                guarded = self.tried or control.options.control == "fixed"
                kept = {} if guarded else dict(zip(map(id, trained), before, strict=True))
                after = attempt.after if self.tried else None
                control.taken = Taken(after, gain, attempt.slope, start, attempt.step, self.loss, kept, attempt.grow)
                break
            restore(trained, before)
            failed = attempt.note or failed
            mu = control.fail()
        return StepRecord(
            loss=self.loss,
            predicted=predicted,
            actual=actual,
            accepted=accepted,
            mu=attempt.mu,
            scale=attempt.scale,
            rank=self.policy.e0.shape[0],
            trials=count,
            spaces=attempt.spaces,
            seconds=self.clock.seconds,
            runs=runs,
            note=attempt.note or failed,
        )


def restore(params: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put weights back, bit for bit."""
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
