"""Open loop: every group solves for itself, all answer to the same residual (theory 3, e_l = 0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.curvature import Gradient, Solver, scalars


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


def solve(
    solvers: Sequence[Solver],
    gradient: Sequence[Gradient],
    mu: float,
    shift: Sequence[Sequence[Tensor]] | None = None,
) -> Direction:
    r"""Directions of all groups at one damping.

    With a shift p every group minimises :math:`g \cdot d + \tfrac12 |U d|^2 + \tfrac{\mu}{2} |d - p|^2`, the
    recursion of SPRING (anchors: phi = J^T a + m phi_prev with p = m phi_prev): it solves for d - p with the
    residual :math:`e_0 + U p`.

    Args:
        solvers: one per group of a partition.
        gradient: the gradient of every group, split along its blocks.
        mu: damping, positive.
        shift: p, packed per block and group.
    """
    parts: list[list[Tensor]] = []
    Ud: Tensor | None = None
    products: list[Tensor] = []
    for k, (solver, own) in enumerate(zip(solvers, gradient, strict=True)):
        solver.factorise(mu)
        if shift is None:
            d, moved = solver.direction(own.e0, own.g, own.rest, mu)
        else:
            p = shift[k]
            Up = solver.matvec(p).to(own.e0.dtype)
            pulled = [part.to(own.e0.dtype) for part in solver.rmatvec(Up)]
            g = [a + b for a, b in zip(own.g, pulled, strict=True)]
            d, moved = solver.direction(own.e0 + Up, g, own.rest, mu)
            d, moved = [a + b for a, b in zip(d, p, strict=True)], moved + Up
        parts.append(d)
        Ud = moved if Ud is None else Ud + moved
        for a, b in zip(own.g, d, strict=True):
            products += [a @ b, b @ b]
    assert Ud is not None
    numbers = scalars(products)
    return Direction(parts, Ud, sum(numbers[::2]), sum(numbers[1::2]), mu)


def mix(
    direction: Direction,
    solvers: Sequence[Solver],
    gradient: Sequence[Gradient],
    previous: Sequence[Sequence[Tensor]],
) -> Direction:
    r"""The minimiser of the global model in the plane of d and the previous step p (theory 3).

    .. math:: \begin{pmatrix} d^\top M d & d^\top M p \\ d^\top M p & p^\top M p \end{pmatrix}
        \begin{pmatrix} \alpha \\ \beta \end{pmatrix} = - \begin{pmatrix} g \cdot d \\ g \cdot p \end{pmatrix},
        \qquad M = \mu I + U^\top U \text{ over all modules}

    Args:
        direction: the direction d.
        solvers: the groups' solvers.
        gradient: the gradient of every group.
        previous: the previous step p, packed per block and group.
    """
    Up = torch.zeros_like(direction.Ud)
    sums = []
    for solver, own, p, d in zip(solvers, gradient, previous, direction.d, strict=True):
        Up += solver.matvec(p).to(Up.dtype)
        sums += [torch.stack((g @ b, b @ b, a @ b)) for g, a, b in zip(own.g, d, p, strict=True)]
    gp, pp, dp = torch.stack(sums).double().sum(0).tolist()
    mu, Ud = direction.mu, direction.Ud
    A = torch.tensor(
        [
            [float(Ud @ Ud) + mu * direction.norm2, float(Ud @ Up) + mu * dp],
            [float(Ud @ Up) + mu * dp, float(Up @ Up) + mu * pp],
        ],
        dtype=torch.float64,
    )
    rhs = -torch.tensor([direction.slope, gp], dtype=torch.float64)
    # The two may be parallel (a quadratic, a repeated batch): the smallest pair that does it.
    alpha, beta = (torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ rhs).tolist()
    return Direction(
        [[alpha * a + beta * b for a, b in zip(d, p, strict=True)] for d, p in zip(direction.d, previous, strict=True)],
        alpha * Ud + beta * Up,
        alpha * direction.slope + beta * gp,
        alpha**2 * direction.norm2 + 2 * alpha * beta * dp + beta**2 * pp,
        mu,
    )
