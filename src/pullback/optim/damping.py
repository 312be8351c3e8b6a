r"""Control of the damping: Nielsen's gain ratio on one batch, the slope test across batches.

On one batch the ratio of actual to predicted decrease tells how far the quadratic model holds, and Nielsen's
rule follows it (theory 3). Across batches that ratio is misleading: a step that solves its own batch to the
bottom has a ratio of 1 and is worthless on the next. There the next batch's gradient, which the loop computes
anyway, is asked about the step just taken (derived in docs/theory):

.. math:: r = \frac{g_{t+1} \cdot s_t}{|g_t \cdot s_t|}

r < 0: the loss still falls along the step on fresh data, it could have been longer; r > 0: it was too long.
Mu is multiplied by :math:`\exp(\tfrac12 (\bar r - 0.2))`, with r averaged over about two steps. The 0.2 is a
tolerance: stopping at the bottom of every single step is greedy and ends in tiny steps.

Where a batch has several rows for every parameter, its bottom is nearly everyone's: the ratio holds across batches then
and is followed (61 parameters and batches of 1000: benchmarks/sinc.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pullback.optim.options import Damping

#: Overshoot along a step that is tolerated, how strongly mu answers, and the memory of the average.
TOLERANCE, ANSWER, MEMORY = 0.2, 0.5, 0.5

#: Rows for every parameter from which a batch speaks for the others.
AMPLE = 4


@dataclass
class Taken:
    """A step that was kept, until the next batch judges it.

    Attributes:
        loss: trial loss after it on its own batch, None without a trial.
        gain: actual over predicted decrease, None if below the resolution of the loss.
        slope: g . s on its own batch.
        mu: damping at the start of the step, before trials that failed.
        step: s by parameter.
        start: loss before it.
        before: weights before it by parameter, kept where no trial guards the step.
        grow: factor on mu if the next batch is the same, where the gain ratio does not tell; None where it does.
    """

    loss: float | None
    gain: float | None
    slope: float
    mu: float
    step: dict[int, Tensor] = field(default_factory=dict)
    start: float = math.nan
    before: dict[int, Tensor] = field(default_factory=dict)
    grow: float | None = None

    def rise(self, grads: Mapping[int, Tensor]) -> float:
        """r: slope along the step on another batch over the slope it had on its own."""
        dots = [torch.dot(grads[key].reshape(-1), s.reshape(-1)) for key, s in self.step.items() if key in grads]
        return float(torch.stack(dots).sum()) / abs(self.slope) if self.slope and dots else 0.0


@dataclass
class DampingControl:
    """State of the damping.

    Attributes:
        options: the user's choice.
        mu: present damping, absolute; None before the first step.
        nu: growth factor of the next failure; it doubles with each in a row.
        mean: running average of r and its weight.
        level: running average of the loss before steps, and of its distance from that average.
        taken: the step that waits for its judgement.
        fresh: whether the last two batches differed.
    """

    options: Damping
    mu: float | None = None
    nu: float = 2.0
    mean: tuple[float, float] = (0.0, 0.0)
    level: tuple[float, float] | None = None
    taken: Taken | None = None
    fresh: bool = False

    @property
    def arc(self) -> bool:
        """Whether a sweep that raises the loss is followed by others from the same factors.

        Where batches change, a shorter step from factors that suited the last batch too well is no remedy, more damping
        is (benchmarks/damping.py, digits).
        """
        return not self.fresh if self.options.arc is None else self.options.arc

    def copy(self) -> DampingControl:
        """The state as it is, to go back to."""
        return dataclasses.replace(self)

    def start(
        self, unit: float, loss: float, grads: Mapping[int, Tensor], dtype: torch.dtype, ample: bool = False
    ) -> float:
        """Judge the last step by this batch; returns the damping to try first.

        Args:
            unit: mean diagonal of the Gram, in which damping is bounded.
            loss: loss of this batch before the step, nan if unknown.
            grads: gradient of this batch by parameter.
            dtype: dtype of the model.
            ample: whether a batch has several rows for every parameter, see :data:`AMPLE`.
        """
        unit = unit if unit > 0 else 1.0
        if not math.isnan(loss):
            mean, spread = (loss, 0.25 * abs(loss)) if self.level is None else self.level
            self.level = (0.8 * mean + 0.2 * loss, 0.8 * spread + 0.2 * abs(loss - mean))
        if self.mu is None or self.options.control == "fixed":
            self.mu = self.options.initial * unit
        elif self.taken is not None:
            self._judge(self.taken, loss, grads, dtype, ample)
        self.taken = None
        smallest = self.options.smallest
        if smallest is None:
            smallest = 1e-13 if dtype == torch.float64 else 1e-7
        self.mu = min(max(self.mu, smallest * unit), self.options.largest * unit)
        return self.mu

    def _judge(self, taken: Taken, loss: float, grads: Mapping[int, Tensor], dtype: torch.dtype, ample: bool) -> None:
        assert self.mu is not None
        resolution = 64 * torch.finfo(dtype).eps
        same = taken.loss is not None and abs(loss - taken.loss) <= resolution * abs(loss)
        self.fresh = not same and not (ample and taken.loss is not None)
        if not self.fresh:
            # The loss stands where the trial left it: the same batch (in whatever order). Or batches are as good.
            if taken.grow is not None:
                self.mu *= taken.grow
            elif taken.gain is not None:
                self.mu *= max(1 / 3, 1 - (2 * taken.gain - 1) ** 3)
                self.nu = 2.0
            return
        self.mu = min(self.mu * (taken.grow or 1.0), 2 * taken.mu)
        self.nu = 2.0
        rise = taken.rise(grads)
        if taken.slope == 0 or not math.isfinite(rise):
            return
        value, weight = self.mean
        value = MEMORY * value + (1 - MEMORY) * rise
        weight = MEMORY * weight + (1 - MEMORY)
        self.mean = (value, weight)
        # Upwards it may answer more strongly: a step ten times too long is not mended by small change.
        r = min(4.0, max(-1.0, value / weight - TOLERANCE))
        self.mu *= math.exp(ANSWER * r)

    def overshot(self, loss: float) -> bool:
        """Whether the next batch shows that an untried step must be taken back.

        Its loss stands above the start of that step and above what batches differ by. (The slope does not
        tell: a softmax thrown into saturation is flat.)
        """
        if self.taken is None or not self.taken.before or self.level is None or math.isnan(self.taken.start):
            return False
        return not loss <= max(self.taken.start, self.level[0] + 3 * self.level[1])

    def fail(self) -> float:
        """A step was undone; the damping to try next."""
        assert self.mu is not None
        self.mu *= self.nu
        self.nu *= 2.0
        return self.mu

    def state(self, order: list[int]) -> dict[str, Any]:
        """Plain state for a checkpoint.

        Args:
            order: ids of all parameters, in their order.
        """
        taken: dict[str, Any] | None = None
        if self.taken is not None:
            t = self.taken
            taken = {
                "loss": t.loss,
                "gain": t.gain,
                "slope": t.slope,
                "mu": t.mu,
                "start": t.start,
                "grow": t.grow,
            }
            taken |= {name: [getattr(t, name).get(key) for key in order] for name in ("step", "before")}
        return {
            "mu": self.mu,
            "nu": self.nu,
            "mean": self.mean,
            "level": self.level,
            "taken": taken,
            "fresh": self.fresh,
        }

    def load(self, state: dict[str, Any], order: list[int]) -> None:
        """Continue from :meth:`state`."""
        self.mu, self.nu, self.mean, self.level = state["mu"], state["nu"], tuple(state["mean"]), state["level"]
        self.taken, self.fresh = None, state.get("fresh", False)
        if state["taken"] is not None:
            saved = dict(state["taken"])
            for name in ("step", "before"):
                pairs = zip(order, saved[name], strict=True)
                saved[name] = {key: t.clone() for key, t in pairs if t is not None}
            self.taken = Taken(**saved)
