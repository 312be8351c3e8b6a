r"""How long a step may be on a noisy gradient: a trust region that listens to whether gradients agree.

The squared length of a step in the metric, :math:`\nu^2\, g \cdot d` with :math:`d = M^{-1} g`, is bounded by

.. math:: \kappa = L_0\,\bigl(\kappa_0 + \kappa_1\, q_+^2\bigr), \qquad
   q = \frac{\langle g_t, d_{t-1}\rangle}{\sqrt{(g_t \cdot d_t)(g_{t-1} \cdot d_{t-1})}}

with :math:`L_0` the first loss and q averaged over steps, each with the same weight. Gradients of two batches are
independent given the weights, so q estimates the part of a gradient that is signal:
:math:`E[g_t \cdot d_{t-1}] = s \cdot M^{-1} s` beside :math:`E[g \cdot d] = s \cdot M^{-1} s + \text{noise}`. The
quadratic model has its least expected value at :math:`\nu = q` (derived here:
:math:`-\nu\, s \cdot d + \tfrac12 \nu^2 E[g \cdot d]`), which is the second bound.

A metric says what a step does to the outputs to first order. L matrices one behind the other that each change by a
relative :math:`\tau` change their product by :math:`(1 + \tau)^L - 1`, of which a linear model misses a share
:math:`(L - 1)\,\tau / 2` to lowest order; a share of at most :math:`\epsilon` allows
:math:`\tau = 2 \epsilon / (L - 1)` (:meth:`Trust.kept`; derived here). It matters where a network starts with next to
no signal, as deep ReLU networks do: gradients and metric are tiny, steps long, and both grow by orders of magnitude
within a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The longest step, in parts of the first loss.

    Attributes:
        noisy: squared length in the metric of a step on gradients that are all noise.
        agreed: what full agreement of gradients adds.
        memory: steps over which agreement is averaged.
        least: factor on the direction that is always allowed.
        missed: epsilon, the share of a step's effect that a linear model may miss.
    """

    noisy: float = 1.3e-4
    agreed: float = 1.3e-2
    memory: int = 100
    least: float = 3e-3
    missed: float = 0.25

    def __post_init__(self) -> None:
        for name in ("noisy", "agreed", "least", "missed"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Trust({name}=...) must be positive and finite, got {value}.")
        if self.memory < 1:
            raise ValueError(f"Trust(memory=...) must be at least 1, got {self.memory}.")

    def share(self, depth: int) -> float:
        """Relative change that each of ``depth`` matrices may make."""
        return 2 * self.missed / max(1, depth - 1)

    def kept(self, lengths: Sequence[float], norms: Sequence[float], depth: int) -> list[float]:
        """Factors on the steps of all weights that keep their relative changes small.

        Args:
            lengths: norms of the steps.
            norms: norms of the weights.
            depth: L, how many weights are matrices.
        """
        most = self.share(depth)
        return [
            min(1.0, most * norm / length) if length > 0 else 1.0 for length, norm in zip(lengths, norms, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """When the metric is looked at: often in the beginning, where it changes fast, then at a fixed distance.

    Attributes:
        every: most steps from one look to the next.
        growth: the distance is at most 1 + growth times the steps taken so far.
        basis: looks from one eigenbasis to the next, for ``form="ekfac"``.
    """

    every: int = 10
    growth: float = 0.5
    basis: int = 5

    def __post_init__(self) -> None:
        if self.every < 1 or self.basis < 1:
            raise ValueError(f"Refresh(every=..., basis=...) must be at least 1, got {self.every} and {self.basis}.")
        if not self.growth >= 0:
            raise ValueError(f"Refresh(growth=...) must be at least 0, got {self.growth}.")

    def after(self, step: int) -> int:
        """Number of the next step that looks, after one at ``step`` (counted from 0)."""
        return step + min(self.every, 1 + int(self.growth * step))


@dataclass
class Agreement:
    """The running state of a :class:`Trust`.

    Attributes:
        trust: the options.
        first: the first loss.
        q: agreement, at least -1; 1 before there are two gradients.
        seen: pairs of gradients so far.
        last: g . d of the last step, 0 before it.
    """

    trust: Trust
    first: float | None = None
    q: float = 1.0
    seen: int = 0
    last: float = 0.0

    def scale(self, slope: float, cross: float | None) -> float:
        """Factor on the direction.

        Args:
            slope: g . d of this step, at least 0.
            cross: g of this step times d of the last, None if there was none.
        """
        if cross is not None and slope > 0 and self.last > 0:
            keep = min(1 - 1 / self.trust.memory, self.seen / (self.seen + 1))
            self.q = keep * self.q + (1 - keep) * cross / math.sqrt(slope * self.last)
            self.seen += 1
        self.last = slope
        if slope <= 0:
            return 1.0
        q = max(0.0, self.q)
        bound = (1.0 if self.first is None else self.first) * (self.trust.noisy + self.trust.agreed * q * q)
        return min(1.0, max(q, self.trust.least), math.sqrt(bound / slope))

    def state(self) -> dict[str, Any]:
        """Numbers to resume from."""
        return {key: getattr(self, key) for key in ("first", "q", "seen", "last")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for key, value in state.items():
            setattr(self, key, value)
