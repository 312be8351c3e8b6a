"""From whole directions to steps: their lengths, and what has to be remembered for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.curvature import Averaged
from pullback.errors import StepError
from pullback.optim.trust import Agreement, Trust


@dataclass(frozen=True)
class Steps:
    """Directions of all weights, shortened.

    Attributes:
        parts: one for each weight.
        scale: a factor that all still need.
        slope: what the loss falls by to first order, without that factor.
    """

    parts: Sequence[Tensor]
    scale: float
    slope: float


class Stride:
    """How long steps are, from one to the next.

    Args:
        trust: the options; None takes every direction whole.
    """

    def __init__(self, trust: Trust | None) -> None:
        self.agreement = None if trust is None else Agreement(trust)
        self._previous: dict[Averaged, Tensor] = {}
        self._norms: dict[Averaged, float] = {}

    def clear(self) -> None:
        """Forget what belongs to single weights."""
        self._previous.clear()
        self._norms.clear()

    def begin(self, loss: float) -> None:
        """Take notice of the first loss."""
        if self.agreement is not None and self.agreement.first is None and loss > 0:
            self.agreement.first = loss

    def of(self, blocks: Sequence[Averaged], grads: Sequence[Tensor], steps: Sequence[Tensor]) -> Steps:
        """Shortens directions. Reads one set of numbers from the device; nothing is changed if they are not finite.

        Args:
            blocks: the metrics.
            grads: gradients, in their layouts.
            steps: directions, in their layouts.

        Raises:
            StepError: if a gradient is not finite.
        """
        if not blocks:
            return Steps((), 1.0, 0.0)
        numbers = dots(grads, steps)
        if self.agreement is not None:
            known = [k for k, block in enumerate(blocks) if block in self._previous]
            fresh = [block for block in blocks if block not in self._norms]
            numbers += torch._foreach_norm(list(steps))
            numbers += dots([grads[k] for k in known], [self._previous[blocks[k]] for k in known])
            if fresh:
                numbers += torch._foreach_norm([p.detach() for block in fresh for p in block.params])
        read = torch.stack(numbers).tolist()
        n = len(blocks)
        slopes = read[:n]
        slope = math.fsum(slopes)
        if self.agreement is None:
            check(slope)
            return Steps(steps, 1.0, slope)
        lengths, crosses, norms = read[n : 2 * n], read[2 * n : 2 * n + len(known)], read[2 * n + len(known) :]
        cross = math.fsum(crosses)
        check(slope, cross)
        self._measured(fresh, norms)
        nu = self.agreement.scale(slope, cross if crosses else None)
        self._previous = dict(zip(blocks, steps, strict=True))
        kept = self.agreement.trust.kept(
            [nu * length for length in lengths],
            [self._norms[block] for block in blocks],
            sum(block.matrix for block in blocks),
        )
        parts = [D if f == 1 else f * D for f, D in zip(kept, steps, strict=True)]
        return Steps(parts, nu, math.fsum(f * s for f, s in zip(kept, slopes, strict=True)))

    def look(self) -> None:
        """Measure the weights again at the next step; they change slowly."""
        self._norms.clear()

    def _measured(self, blocks: Sequence[Averaged], norms: Sequence[float]) -> None:
        """Norms of weights, at least those that torch's own initialisation gives: a layer may begin at zero."""
        read = iter(norms)
        for block in blocks:
            square = math.fsum(next(read) ** 2 for _ in block.params)
            self._norms[block] = math.sqrt(max(square, sum(p.shape[0] if p.ndim else 1 for p in block.params) / 3))

    def keep(self) -> tuple[Any, ...]:
        """What :meth:`put_back` takes; nothing is copied."""
        return (
            None if self.agreement is None else self.agreement.state(),
            dict(self._previous),
            dict(self._norms),
        )

    def put_back(self, kept: tuple[Any, ...]) -> None:
        """Undo all steps since :meth:`keep`."""
        agreement, self._previous, self._norms = kept
        if self.agreement is not None:
            self.agreement.load(agreement)

    def state(self, block: Averaged) -> dict[str, Any]:
        """What to resume one weight from."""
        return {"previous": self._previous.get(block), "norm": self._norms.get(block)}

    def load(self, block: Averaged, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        if state["previous"] is not None:
            self._previous[block] = state["previous"].clone()
        if state["norm"] is not None:
            self._norms[block] = state["norm"]


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Inner products, pair by pair."""
    return [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]


def check(*numbers: float) -> None:
    """Raises StepError unless all numbers are finite."""
    if not all(math.isfinite(number) for number in numbers):
        raise StepError("A gradient is not finite: no step was taken. Look for bad data or too large weights.")
