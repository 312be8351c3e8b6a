r"""Geometry of a model at its weights: horizontal lifts, length, energy, action, straight lines.

The *horizontal* distribution is the range of :math:`D^\top`: directions of the parameters that are orthogonal to the
fibre, along which no output moves. A curve of outputs has one horizontal lift from given weights, and the adapted flow
is the lift of the straight line from x(0) to y on the clock :math:`t = 1 - e^{-2cs}` (C; docs/theory 14).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.flow.adapted import AdaptedFlow
from pullback.flow.aims import Squared, stacked
from pullback.flow.errors import FlowError
from pullback.flow.record import Path
from pullback.flow.regimes import choose
from pullback.flow.system import OutputSystem

_GAUSS = (0.5 - math.sqrt(15) / 10, 0.5, 0.5 + math.sqrt(15) / 10), (5 / 18, 8 / 18, 5 / 18)


@dataclass
class Horizontal:
    """The split of parameter space at a point.

    Attributes:
        D: the Jacobian, (QN, K).
        basis: orthonormal basis of the range of D^T, (K, rank).
        inverse: D^+, (K, QN).
    """

    D: Tensor
    basis: Tensor
    inverse: Tensor

    @property
    def rank(self) -> int:
        """Dimension of the distribution."""
        return self.basis.shape[1]

    def horizontal(self, theta: Tensor) -> Tensor:
        """The horizontal part of a direction (K,)."""
        return self.basis @ (self.basis.T @ theta)

    def vertical(self, theta: Tensor) -> Tensor:
        """The part along the fibre, which no output sees."""
        return theta - self.horizontal(theta)

    def lift(self, velocity: Tensor) -> Tensor:
        """The horizontal direction D^+ v that moves outputs with velocity v (QN,), or its projection on range D."""
        return self.inverse @ velocity


def horizontal_at(model: nn.Module, inputs: Tensor | tuple[Any, ...], *, rank_tol: float = 1e-9) -> Horizontal:
    """The horizontal distribution at the model's weights, dense: for small models.

    Args:
        model: the model; packing is that of :attr:`OutputSystem.params`, the order of its calls.
        inputs: what it is called with.
        rank_tol: singular values at most this times the largest count as none.
    """
    system = OutputSystem(model, inputs, Squared(torch.ones(1)).metric())
    try:
        D = system.linearise().dense()
    finally:
        system.close()
    U, values, Vh = torch.linalg.svd(D, full_matrices=False)
    r = int((values > rank_tol * values[0]).sum())
    basis = Vh[:r].T
    return Horizontal(D, basis, (basis / values[:r]) @ U[:, :r].T)


def lift_path(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    path: Callable[[Tensor], Tensor],
    *,
    until: float = 1.0,
    gain: float = 20.0,
    tol: float = 1e-8,
    method: str = "dopri5",
) -> Path:
    """The horizontal lift of a path in output space, by torchdiffeq; moves the model's weights along it.

    Follows ``x' = path' - gain (x - path)``: what integration misses decays instead of adding up.

    Args:
        model: the model, its outputs at the start of the path.
        inputs: what it is called with.
        path: time (a float64 scalar tensor, from 0) to outputs in the model's shape, differentiable.
        until: the time the path ends.
        gain: how fast errors decay, per unit of time.
        tol: tolerance of a step.
        method: one of torchdiffeq's adaptive methods.

    Returns:
        The parameters along the way, for :func:`length`, :func:`energy` and dense output.

    Raises:
        FlowError: if D has not full row rank, or outputs are not where the path starts.
    """
    from pullback.flow.field import Bounds, Field, Point, lift_of
    from pullback.flow.integrate import integrate

    aim = _Follow(path, c=gain / 2)
    system = OutputSystem(model, inputs, aim.metric())
    try:
        z = system.outputs()
        aim.check(z)
        start = aim.target(0.0)
        off = float((stacked(z) - start).norm()) / max(1.0, float(start.norm()))
        if off > 1e-6:
            raise FlowError(f"The path starts {off:.1e} (relatively) from the model's outputs; begin where they are.")
        choice = choose(system.linearise())
        if not choice.promised:
            raise FlowError(
                f"D is {choice.rows} x {choice.columns} of rank {choice.rank}: paths have horizontal lifts where D has "
                "full row rank. Take a wider model or less data."
            )
        field = Field(system, aim, lift_of(choice), 1.0, Bounds(100_000, math.inf))
        kept = Path()

        def accept(point: Point) -> None:
            kept.times.append(point.s)
            kept.thetas.append(point.theta)
            kept.slopes.append(point.slope)

        first = field.at(0.0, system.get())
        accept(first)
        last, _ = integrate(field, first, until, {}, accept, method=method, tol=tol)
        if kept.times[-1] < last.s:
            accept(last)
        system.put(last.theta)
    finally:
        system.close()
    return kept


class _Follow(Squared):
    """A path that outputs are on already: errors are compared with its length per unit of time, not with the rest."""

    def size(self, s: float, x: Tensor) -> float:
        own = self.motion(s)
        return max(float(x.norm()) * 1e-3, 0.0 if own is None else float(own.norm()) * self.unit)


def length(path: Path) -> float:
    r""":math:`\int |\theta'| ds` along a path, by Gauss's rule on its dense output."""
    return _quadrature(path, lambda slope: float(slope.norm()))


def energy(path: Path) -> float:
    r""":math:`\tfrac12 \int |\theta'|^2 ds` along a path; at least length squared over twice the time."""
    return _quadrature(path, lambda slope: 0.5 * float(slope @ slope))


def _quadrature(path: Path, value: Callable[[Tensor], float]) -> float:
    total = 0.0
    for k in range(1, len(path.times)):
        h = path.times[k] - path.times[k - 1]
        total += h * sum(w * value(path.slope_at(path.times[k - 1] + u * h)) for u, w in zip(*_GAUSS, strict=True))
    return total


def action(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    targets: Tensor,
    path: Path,
    *,
    c: float | None = None,
) -> float:
    r"""Freidlin-Wentzell action of a path beside the adapted flow, in output space.

    .. math:: S = \tfrac12 \int |x' + P \nabla_x C|^2 ds \ge 0, \quad x' = D \theta'

    zero exactly on the flow. It is the action of theory 9 for the degenerate metric :math:`D^\top D`, in which vertical
    motion is free.

    Args:
        model: the model; its weights come back as they were.
        inputs: what it is called with.
        targets: targets of the squared cost.
        path: the path, in the model's packing.
        c: the constant of the cost.
    """
    flow = AdaptedFlow(model, inputs, targets, c=c)
    system, aim = flow.system, flow.aim
    before, total = system.get(), 0.0
    try:
        for k in range(1, len(path.times)):
            a, h = path.times[k - 1], path.times[k] - path.times[k - 1]
            for u, w in zip(*_GAUSS, strict=True):
                s = a + u * h
                system.put(path.at(s))
                D = system.linearise()
                v = aim.velocity(s, aim.coordinates(D.z))
                off = D.matvec(path.slope_at(s)) - flow.choice.invert(D, None).project(v)
                total += 0.5 * h * w * float(off @ off)
    finally:
        system.put(before)
        flow.close()
    return total


def straight_time(s: float, c: float) -> float:
    """Where on the straight line from x(0) to y the flow is at time s: ``t = 1 - e^(-2cs)``."""
    return -math.expm1(-2 * c * s)


def flow_time(t: float, c: float) -> float:
    """The time s at which the flow is at t of its straight line, 0 <= t < 1."""
    return -math.log1p(-t) / (2 * c)
