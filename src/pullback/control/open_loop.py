"""Open loop: every group of modules solves for itself, all answer to the same residual (theory 3, e_l = 0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.curvature import Gradient, Group


@dataclass
class Direction:
    """A direction in parameter space and what the global quadratic model says of it.

    Attributes:
        d: packed directions, one list per group.
        Ud: sum over all blocks of U d, shape (R,).
        slope: g . d.
        norm2: |d|^2.
        mu: damping it was solved with.
    """

    d: list[list[Tensor]]
    Ud: Tensor
    slope: float
    norm2: float
    mu: float

    @property
    def scale(self) -> float:
        r"""Minimiser of the global model along d: :math:`-g \cdot d / (|U d|^2 + \mu |d|^2)` (theory 3)."""
        curvature = float(self.Ud @ self.Ud) + self.mu * self.norm2
        return -self.slope / curvature if curvature > 0 else 1.0


def solve(groups: Sequence[Group], gradient: Sequence[Gradient], mu: float) -> Direction:
    """Directions of all groups at one damping.

    Args:
        groups: the groups of a partition.
        gradient: the gradient of every group, split along its blocks.
        mu: damping, positive.
    """
    parts: list[list[Tensor]] = []
    Ud: Tensor | None = None
    scalars: list[Tensor] = []
    for group, own in zip(groups, gradient, strict=True):
        group.factorise(mu)
        d, moved = group.direction(own.e0, own.g, own.rest, mu)
        parts.append(d)
        Ud = moved if Ud is None else Ud + moved
        for a, b in zip(own.g, d, strict=True):
            scalars += [a @ b, b @ b]
    assert Ud is not None
    sums = torch.stack(scalars).double().view(-1, 2).sum(0).tolist()
    return Direction(parts, Ud, sums[0], sums[1], mu)
