"""A solve backwards in time as its readers see it: the state and columns at the nodes of a quadrature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pullback.ode.products import rms

#: Columns that differ by so many units of round-off came two ways through the same graph.
ROUND_OFF = 1e3


@dataclass
class Node:
    """A point of the quadrature.

    Attributes:
        t: its time.
        weight: dt.
        x: the state, (N, ...).
        S: the columns, (r, N, ...), each in its unit.
        units: the units, (r,).
    """

    t: float
    weight: float
    x: Tensor
    S: Tensor
    units: Tensor


class Visitor(Protocol):
    """Gathers something over the nodes."""

    def visit(self, node: Node) -> Tensor:
        """Returns (F, -F_x^T S) at a node, shape (1 + r, N, ...)."""


@dataclass
class Path:
    """A solve backwards in time.

    Attributes:
        units: root mean square of every column at t1, by which it is divided inside, (r,).
        times: of the nodes, from t1 to t0.
        weights: of the nodes.
        states: x and the columns there, (nodes, 1 + r, N, ...).
        begin: at t0, (1 + r, N, ...).
        end: at t1.
        mix: weights (r, N) by which the columns of ``states`` are summed to the one that is meant; None if all are.
    """

    units: Tensor
    times: Sequence[float]
    weights: Sequence[float]
    states: Tensor
    begin: Tensor
    end: Tensor
    mix: Tensor | None = None

    def __iter__(self) -> Iterator[Node]:
        for t, w, y in zip(self.times, self.weights, self.states, strict=True):
            S = y[1:] if self.mix is None else summed(y[1:], self.mix)[None]
            yield Node(t, w, y[0], S, self.units)

    def first(self, r: int) -> Path:
        """The same solve with the first of its columns."""
        keep = slice(1 + r)
        return replace(
            self, units=self.units[:r], states=self.states[:, keep], begin=self.begin[keep], end=self.end[keep]
        )

    def summed(self, weights: Tensor) -> Path:
        """The same solve with one column, a weighted sum for every sample; made node by node.

        Args:
            weights: shape (r, N).
        """
        weights = weights * self.units[:, None]
        unit = units_of(summed(self.end[1:], weights)[None])
        mix = weights / unit
        begin, end = (torch.stack([y[0], summed(y[1:], mix)]) for y in (self.begin, self.end))
        return replace(self, units=unit, begin=begin, end=end, mix=mix)

    def pulled(self) -> Tensor:
        """The columns at t0, (r, N, ...)."""
        return self.begin[1:] * along(self.units, self.begin)

    def defect(self, total: Tensor) -> float:
        """How far the quadrature misses the integrals that are known, relative to the size of state and columns.

        Args:
            total: sum over the nodes of weight times (F, -F_x^T S), shape of ``end``.
        """
        miss = self.end - self.begin - total
        return max(
            rms(miss[0]) / max(1.0, rms(self.end[0])),
            rms(miss[1:]) / max(1.0, rms(self.begin[1:])),  # at t1 they have size 1
        )


def units_of(S: Tensor) -> Tensor:
    """Root mean square of every column, (r,) from (r, N, ...); 1 for columns of zeros."""
    size = S.flatten(1).square().mean(1).sqrt()
    return torch.where(size == 0, torch.ones_like(size), size)


def along(units: Tensor, S: Tensor) -> Tensor:
    """Numbers of columns (r,) in a shape that multiplies (r, N, ...)."""
    return units.view(-1, *[1] * (S.ndim - 1))


def summed(S: Tensor, weights: Tensor) -> Tensor:
    """A weighted sum of columns (r, N, ...) for every sample, with weights (r, N)."""
    return (S * weights.view(*weights.shape, *[1] * (S.ndim - 2))).sum(0)


def same(S: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether columns are the same but for round-off.

    Args:
        S: shape (r, N, ...).
        other: likewise.
        tolerance: what may be missed, in parts of a column's largest entry, where round-off is not less.
    """
    if S.shape != other.shape or S.dtype != other.dtype:
        return False
    tolerance = min(tolerance, ROUND_OFF * torch.finfo(S.dtype).eps)
    miss = (S - other).abs().flatten(1).amax(1)
    return bool((miss <= tolerance * S.abs().flatten(1).amax(1)).all())
