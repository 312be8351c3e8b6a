"""What kind of point a run has ended in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pullback.flow.aims import Aim
from pullback.flow.field import Point
from pullback.flow.inverse import decompose
from pullback.flow.regimes import DENSE
from pullback.flow.system import OutputSystem

Kind = Literal["global minimum", "full-rank equilibrium", "rank-deficient critical point", "no equilibrium"]

#: Parameters up to which the Hessian of the cost is formed, one product each.
_HESSIAN = 1500
#: Eigenvalues of the Hessian at most this times the largest count as none.
_FLAT = 1e-6


@dataclass
class EndPoint:
    """An end point, classified.

    Attributes:
        kind: a global minimum (cost at most eps); an equilibrium of the under-parametrised flow, D of full column
            rank; a critical point where D has lost rank; or none of these (the run was still moving).
        rank: rank of D there; None if it was not computed.
        force: ``|P v| / |v|``, the share of the wanted velocity that the range of D still allows.
        dimension: estimated dimension of the submanifold of critical points through a rank-deficient one: the
            nullity of the Hessian of the cost; None elsewhere, or for too many parameters.
    """

    kind: Kind
    rank: int | None
    force: float | None
    dimension: int | None = None


def classify(
    system: OutputSystem,
    aim: Aim,
    point: Point,
    *,
    eps: float | None,
    tolerance: float,
    force: float,
    rank: int | None = None,
) -> EndPoint:
    """Classify a point.

    Args:
        system: the model on its inputs, at the point.
        aim: where outputs should go.
        point: the point.
        eps: the cost that was asked for.
        tolerance: singular values at most this times the largest count as none.
        force: ``|P v| / |v|`` up to which a point counts as an equilibrium.
        rank: the rank, where a loss of it was located; None to go by the tolerance.
    """
    done = eps is not None and point.cost <= eps * 1.01
    if point.D is None or point.D.numbers > DENSE:
        return EndPoint("global minimum" if done else "no equilibrium", None, None)
    D = point.D
    U, values, _ = decompose(D, True)
    rank = int((values > tolerance * values[0]).sum()) if rank is None else rank
    taken = U[:, :rank].T @ point.wanted
    share = float(taken.norm() / point.wanted.norm().clamp_min(torch.finfo(taken.dtype).tiny))
    if done:
        return EndPoint("global minimum", rank, share)
    if share > force:
        return EndPoint("no equilibrium", rank, share)
    if rank == D.columns:
        return EndPoint("full-rank equilibrium", rank, share)
    dimension = None
    if D.columns <= _HESSIAN:
        eigenvalues = torch.linalg.eigvalsh(cost_hessian(system, aim, point)).abs()
        dimension = int((eigenvalues <= _FLAT * eigenvalues.max()).sum())
    return EndPoint("rank-deficient critical point", rank, share, dimension)


def cost_hessian(system: OutputSystem, aim: Aim, point: Point) -> Tensor:
    """Hessian of the cost in the parameters at fixed time, (K, K), one double backward pass for each column."""
    system.put(point.theta)
    with torch.enable_grad(), system.tape.recorder.paused():
        z = system.model(*system.inputs)
        # A stand-in of the same gradient and, since dv = -(d^2 C) dx, of the same Hessian: v is differentiated too.
        x = aim.coordinates(z)
        v = aim.velocity(point.s, x)
        first = torch.autograd.grad(x, system.params, -v, create_graph=True, allow_unused=True)
        packed = torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(first, system.params, strict=True)]
        )
        rows = []
        for k in range(len(packed)):
            grads = torch.autograd.grad(packed[k], system.params, retain_graph=True, allow_unused=True)
            pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, system.params, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in pieces]))
    H = torch.stack(rows)
    return (H + H.T) / 2
