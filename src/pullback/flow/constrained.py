r"""Behind a loss of rank: the constrained (differential-algebraic) continuation (C; docs/theory 14).

With r modes left, :math:`D_r = U_r \Sigma_r V_r^\top`, parameters move within the set on which the lost singular values
stay as they are. Their gradients :math:`n_k = \nabla_\theta (u_k^\top D(\theta) w_k)`, u and w held, come from one
double backward pass each; :math:`\Pi` projects on their complement, and

.. math:: \theta' = (D_r \Pi)^+ v, \qquad x' = P v + O(\sigma_k)

with P the projector on the range of :math:`D_r \Pi`, which changes with time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.flow.errors import FlowError
from pullback.flow.field import Lift
from pullback.flow.inverse import Inverse, Truncated
from pullback.flow.regimes import DENSE
from pullback.flow.system import Jacobian, OutputSystem

#: Directions of the retained modes that the constraint takes away to this share are left out.
_CUT = 1e-6


def constrained_lift(system: OutputSystem, D: Jacobian, lost: int) -> Lift:
    """The lift with the ``lost`` smallest modes frozen.

    Args:
        system: the model on its inputs.
        D: the Jacobian where the rank was lost.
        lost: how many modes.

    Raises:
        FlowError: if D is too large to be formed.
    """
    del system
    if D.numbers > DENSE:
        raise FlowError(
            f"The constrained continuation needs singular vectors of D, {D.rows} x {D.columns} numbers; it is for D of "
            f"at most {DENSE} numbers."
        )

    def lift(system: OutputSystem, D: Jacobian, v: Tensor, condition: float | None) -> tuple[Tensor, Inverse]:
        inverse = Truncated(D, 0.0, rank=min(D.rows, D.columns) - lost)
        r = inverse.rank
        normals = [mode_gradient(system, D, inverse.U[:, k], inverse.V[:, k]) for k in range(r, r + lost)]
        B = complement_projector(torch.stack(normals, 1))
        tangent = inverse.V[:, :r] - B @ (B.T @ inverse.V[:, :r])  # (D_r Pi)^T = Pi V_r Sigma_r
        scaled = tangent * inverse.values[:r]
        return pinv_apply(scaled.T, inverse.U[:, :r].T @ v), inverse

    return lift


def mode_gradient(system: OutputSystem, D: Jacobian, u: Tensor, w: Tensor) -> Tensor:
    r"""Gradient of :math:`u^\top D(\theta) w` for fixed u (QN,) and w (K,): a Hessian-vector product, (K,)."""
    with torch.enable_grad(), system.tape.recorder.paused():
        z = system.model(*system.inputs)
        cotangent = u.view(-1, len(z)).T.reshape(z.shape) if u.numel() == z.numel() else None
        if cotangent is None:
            raise FlowError("The constrained continuation is for costs of all outputs, not modulo a fibre.")
        first = torch.autograd.grad(z, system.params, cotangent, create_graph=True, allow_unused=True)
        total = z.new_zeros(())
        for g, part in zip(first, w.split([p.numel() for p in system.params]), strict=True):
            if g is not None and g.requires_grad:
                total = total + (g.reshape(-1) * part).sum()
        if not total.requires_grad:
            return torch.zeros_like(w)
        grads = torch.autograd.grad(total, system.params, allow_unused=True)
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(system.params, grads, strict=True)]
    return torch.cat([g.reshape(-1) for g in pieces])


def complement_projector(normals: Tensor) -> Tensor:
    """Orthonormal basis B of the span of the columns (K, l), so that ``I - B B^T`` is the tangent projector."""
    U: Tensor
    U, values, _ = torch.linalg.svd(normals, full_matrices=False)
    return U[:, values > _CUT * values[:1].clamp_min(torch.finfo(values.dtype).tiny)]


def pinv_apply(A: Tensor, b: Tensor) -> Tensor:
    """A^+ b for A (r, K), singular values below a millionth of the largest left out."""
    if not A.numel():
        return A.new_zeros(A.shape[1])
    Vh: Tensor
    U, values, Vh = torch.linalg.svd(A, full_matrices=False)
    kept = values > _CUT * values[0].clamp_min(torch.finfo(values.dtype).tiny)
    inverse = torch.where(kept, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), torch.zeros_like(values))
    out: Tensor = Vh.T @ (inverse * (U.T @ b))
    return out
