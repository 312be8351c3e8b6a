"""The Fisher metric of a softmax, in its full-rank square root of c - 1 columns."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric, spread


class Categorical(OutputMetric):
    r"""Softmax Fisher :math:`G = \mathrm{diag}(p) - p p^\top` of logits with classes along axis 1.

    The usual root :math:`\mathrm{diag}(\sqrt p) - p \sqrt p^\top` has c columns and rank c - 1. Here
    :math:`S = \mathrm{diag}(\sqrt p)\, Q` with Q an orthonormal basis of the complement of
    :math:`\sqrt p`, from one Householder reflection: c - 1 columns, so R falls by N (theory 1).

    Logits have shape ``(N, C)`` or ``(N, C, d1, ...)``, as ``nn.CrossEntropyLoss`` takes them.
    """

    #: Probabilities below this are raised to it in e_0 only, relative to the dtype's eps. The part of the
    #: costate this leaves out is found again in the remainder of the gradient, so nothing is lost; without
    #: it one confidently wrong sample would swamp the R-space residual (it grows as 1 / sqrt(p_y)).
    floor: float = 1e3

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """``z`` without its class axis."""
        if z.ndim < 2:
            raise MetricError(
                f"Categorical needs logits of shape (N, C, ...), got {tuple(z.shape)}; "
                "add the class axis or use Bernoulli for a single logit."
            )
        return (z.shape[0], *z.shape[2:])

    def columns(self, z: Tensor, samples: int) -> int:
        """C - 1 per cell. See the base class."""
        return z.numel() // samples // z.shape[1] * (z.shape[1] - 1)

    def _basis(self, root: Tensor) -> Tensor:
        """Orthonormal complement of unit vectors ``root`` (B, C): shape (B, C, C - 1)."""
        # H = I - v v^T / (1 + root_0) with v = root + e_0 maps e_0 to -root; its other columns span the rest.
        v = root.clone()
        v[:, 0] += 1.0
        Q = -v[:, :, None] * v[:, None, 1:] / v[:, :1, None]
        idx = torch.arange(root.shape[1] - 1, device=root.device)
        Q[:, idx + 1, idx] += 1.0
        return Q

    def _rows(self, z: Tensor) -> Tensor:
        """Logits with classes last, one row per cell: (cells, C)."""
        return z.movedim(1, -1).reshape(-1, z.shape[1])

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """C - 1 columns per cell. See the base class."""
        shape = self.cells(z)
        root = torch.softmax(self._rows(z), -1).sqrt_()
        scale = weight.expand(shape).reshape(-1, 1).sqrt()
        S = (root * scale)[:, :, None] * self._basis(root)
        S = S.permute(2, 0, 1).reshape(z.shape[1] - 1, *shape, z.shape[1]).movedim(-1, 2)
        return spread(S, samples, axis=1)

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        r""":math:`e_0 = Q^\top \mathrm{diag}(p)^{-1/2} \lambda / \sqrt w`. See the base class."""
        shape = self.cells(z)
        p = torch.softmax(self._rows(z), -1)
        root = p.sqrt()
        scale = weight.expand(shape).reshape(-1, 1).sqrt()
        inverse = p.clamp_min(self.floor * torch.finfo(p.dtype).eps).rsqrt_()
        inverse = torch.where(scale > 0, inverse / scale, torch.zeros_like(inverse))
        e0 = torch.einsum("nca,nc->an", self._basis(root), self._rows(costate) * inverse)
        # Order of the positions as `spread` has it: column, flattened position, out positions; sample last.
        return e0.reshape(z.shape[1] - 1, samples, -1).permute(0, 2, 1).reshape(-1, samples)

    def draw(self, z: Tensor, weight: Tensor, generator: torch.Generator, target: Tensor | None = None) -> Tensor:
        """Label drawn from the model's own prediction: onehot(y~) - p, times the root weight."""
        shape = self.cells(z)
        rows = self._rows(z)
        p = (rows - rows.amax(-1, keepdim=True)).exp_()  # times a number per cell; softmax is slow on short rows
        # Where a uniform number falls among the sums of p; in (0, 1], so that no class without probability is met.
        # One number per cell: ten times quicker than exponential times or multinomial where classes are many.
        upto = p.cumsum(-1)
        fall = (1 - torch.rand(p.shape[0], 1, dtype=p.dtype, device=p.device, generator=generator)) * upto[:, -1:]
        label = torch.searchsorted(upto, fall).clamp_(max=p.shape[1] - 1)  # nan falls beyond the last
        root = weight.expand(shape).reshape(-1, 1).sqrt()
        column = (p * (-root / upto[:, -1:])).scatter_add_(1, label, root)
        return column.reshape(*shape, z.shape[1]).movedim(-1, 1)
