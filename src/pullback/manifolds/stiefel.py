r"""Stiefel's manifold: matrices with orthonormal columns, or rows where there are fewer of those."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pullback.errors import ManifoldError
from pullback.manifolds.base import Manifold, Tangent


class StiefelTangent(Tangent):
    r"""Directions :math:`W A + W_\perp B`, A skew (p, p), B any (n - p, p); orthonormal coordinates of (A, B).

    The inner product is the ambient one, :math:`|d|^2 = |A|^2 + |B|^2`: the coordinates are :math:`\sqrt 2 A_{ij}` for
    i > j, and B.

    Args:
        shape: shape of the point, (n, p), or (p, n) with p < n.
        Q: :math:`[W, W_\perp]`, (n, n), of the tall form.
    """

    def __init__(self, shape: torch.Size, Q: Tensor) -> None:
        self.n, self.p = max(shape), min(shape)
        skew = self.p * (self.p - 1) // 2
        super().__init__(shape, skew + (self.n - self.p) * self.p)
        self.Q = Q
        self.skew = skew
        self.i, self.j = torch.tril_indices(self.p, self.p, -1, device=Q.device)
        self.wide = shape[0] < shape[1]

    def to_tangent(self, g: Tensor) -> Tensor:
        """See the base class."""
        X = self.Q.T @ (g.mT if self.wide else g)
        a = (X[..., self.i, self.j] - X[..., self.j, self.i]) * 0.5**0.5
        return torch.cat([a, X[..., self.p :, :].flatten(-2)], -1)

    def from_tangent(self, c: Tensor) -> Tensor:
        """See the base class."""
        X = c.new_zeros(*c.shape[:-1], self.n, self.p)
        a = c[..., : self.skew] * 0.5**0.5
        X[..., self.i, self.j] = a
        X[..., self.j, self.i] = -a
        X[..., self.p :, :] = c[..., self.skew :].unflatten(-1, (self.n - self.p, self.p))
        d = self.Q @ X
        return d.mT if self.wide else d

    def to(self, dtype: torch.dtype) -> Self:
        """See the base class."""
        return type(self)(self.shape, self.Q.to(dtype))


@dataclass(frozen=True)
class Stiefel(Manifold):
    r"""Matrices (n, p) with :math:`W^\top W = I` for :math:`n \ge p`, with :math:`W W^\top = I` for n < p.

    In the ambient inner product. The retraction is the polar factor of W + d, the nearest such matrix.
    """

    def dimension(self, shape: torch.Size) -> int:
        """Dimension n p - p (p + 1) / 2 with p the shorter side. See the base class."""
        if len(shape) != 2 or not min(shape):
            raise ManifoldError(f"{self} holds matrices, got the shape {tuple(shape)}.")
        n, p = max(shape), min(shape)
        found = n * p - p * (p + 1) // 2
        if found == 0:
            raise ManifoldError(f"{self} of shape {tuple(shape)} has no direction to move in; freeze the parameter.")
        return found

    def nearest(self, w: Tensor) -> Tensor:
        """See the base class."""
        U, s, Vh = torch.linalg.svd(w, full_matrices=False)
        if not s[-1] > torch.finfo(w.dtype).eps * s[0]:
            raise ManifoldError(f"A matrix of lower rank has no nearest point on {self}; give it independent columns.")
        point: Tensor = U @ Vh
        return point

    def distance(self, w: Tensor) -> float:
        """See the base class."""
        return float((torch.linalg.svdvals(w) - 1).norm())

    def project(self, w: Tensor, d: Tensor) -> Tensor:
        """See the base class."""
        W, D = (w.mT, d.mT) if w.shape[0] < w.shape[1] else (w, d)
        X = W.T @ D
        out = D - W @ ((X + X.T) / 2)
        return out.mT if w.shape[0] < w.shape[1] else out

    def _scale(self, w: Tensor) -> float:
        return math.sqrt(min(w.shape))

    def _tangent(self, w: Tensor) -> Tangent:
        W = w.mT if w.shape[0] < w.shape[1] else w
        full = torch.linalg.qr(W, mode="complete")[0]
        return StiefelTangent(w.shape, torch.cat([W, full[:, W.shape[1] :]], 1))

    def _retract(self, w: Tensor, d: Tensor) -> Tensor:
        # W + d has singular values of at least 1: d^T W is skew.
        U, _, Vh = torch.linalg.svd(w + d, full_matrices=False)
        point: Tensor = U @ Vh
        return point


@dataclass(frozen=True)
class Orthogonal(Stiefel):
    """Square matrices with orthonormal columns; a step keeps the sign of the determinant."""

    def dimension(self, shape: torch.Size) -> int:
        """Dimension n (n - 1) / 2. See the base class."""
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ManifoldError(
                f"{self} holds square matrices, got the shape {tuple(shape)}; take Stiefel() for others."
            )
        return super().dimension(shape)
