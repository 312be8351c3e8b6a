r"""Symmetric positive definite matrices with their affine-invariant inner product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pullback.errors import ManifoldError
from pullback.manifolds.base import Manifold, Tangent


class PositiveTangent(Tangent):
    r"""Symmetric directions :math:`d = L S L^\top` at :math:`w = L L^\top`, in orthonormal coordinates of S.

    :math:`\langle d, d \rangle_w = \operatorname{tr}(w^{-1} d\, w^{-1} d) = |S|^2`: the coordinates are :math:`S_{ii}`
    and :math:`\sqrt 2 S_{ij}` for i > j.

    Args:
        shape: (k, k).
        L: Cholesky factor of the point.
    """

    def __init__(self, shape: torch.Size, L: Tensor) -> None:
        k = shape[0]
        super().__init__(shape, k * (k + 1) // 2)
        self.L = L
        self.i, self.j = torch.tril_indices(k, k, -1, device=L.device)

    def to_tangent(self, g: Tensor) -> Tensor:
        """See the base class."""
        return self._vector(self.L.T @ g @ self.L)

    def from_tangent(self, c: Tensor) -> Tensor:
        """See the base class."""
        k = self.shape[0]
        S = torch.diag_embed(c[..., :k])
        off = c[..., k:] * 0.5**0.5
        S[..., self.i, self.j] = off
        S[..., self.j, self.i] = off
        d = self.L @ S @ self.L.T
        return (d + d.mT) / 2  # symmetric to the last bit

    def coordinates(self, d: Tensor) -> Tensor:
        """See the base class; what of d is not symmetric is left out."""
        half = torch.linalg.solve_triangular(self.L, d, upper=False)
        return self._vector(torch.linalg.solve_triangular(self.L, half.mT, upper=False).mT)

    def _vector(self, X: Tensor) -> Tensor:
        off = (X[..., self.i, self.j] + X[..., self.j, self.i]) * 0.5**0.5
        return torch.cat([X.diagonal(dim1=-2, dim2=-1), off], -1)

    def to(self, dtype: torch.dtype) -> Self:
        """See the base class."""
        return type(self)(self.shape, self.L.to(dtype))


@dataclass(frozen=True)
class PositiveDefinite(Manifold):
    r"""Symmetric positive definite matrices (k, k).

    The inner product is affine-invariant, :math:`\langle a, b \rangle_w = \operatorname{tr}(w^{-1} a w^{-1} b)`.
    Steps are damped in this inner product, in which the boundary is infinitely far: what is small beside w is a small
    step. The retraction :math:`w + d + \tfrac12 d w^{-1} d = L (I + S + \tfrac12 S^2) L^\top` agrees with the geodesic
    to second order and is positive definite for every d, since :math:`I + S + \tfrac12 S^2 = \tfrac12 ((I + S)^2 + I)`.
    """

    def dimension(self, shape: torch.Size) -> int:
        """Dimension k (k + 1) / 2. See the base class."""
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise ManifoldError(f"{self} holds square matrices, got the shape {tuple(shape)}.")
        return shape[0] * (shape[0] + 1) // 2

    def nearest(self, w: Tensor) -> Tensor:
        """The symmetric part, eigenvalues raised to the square root of the precision times the largest.

        The manifold is open: what lies outside has no nearest point on it. See the base class.
        """
        values, vectors = torch.linalg.eigh((w + w.mT) / 2)
        largest = values.abs().max()
        if not largest > 0:
            raise ManifoldError(f"The zero matrix has no scale; there is no point of {self} next to it.")
        found: Tensor = (vectors * values.clamp_min(torch.finfo(w.dtype).eps ** 0.5 * largest)) @ vectors.T
        return (found + found.mT) / 2

    def distance(self, w: Tensor) -> float:
        """Distance from the closure, the semidefinite matrices. See the base class."""
        skew = (w - w.mT) / 2
        values = torch.linalg.eigvalsh((w + w.mT) / 2)
        return float((skew.square().sum() + values.clamp_max(0).square().sum()).sqrt())

    def project(self, w: Tensor, d: Tensor) -> Tensor:
        """The symmetric part. See the base class."""
        del w
        return (d + d.mT) / 2

    def check(self, w: Tensor, what: str = "The point") -> None:
        """See the base class; singular matrices are refused too."""
        super().check(w, what)
        if int(torch.linalg.cholesky_ex((w + w.mT) / 2).info):
            smallest = float(torch.linalg.eigvalsh((w + w.mT) / 2)[0])
            raise ManifoldError(
                f"{what} is not positive definite: its smallest eigenvalue is {smallest:.3g}; add a multiple of the "
                f"identity or set it to {self}.nearest(w)."
            )

    def _tangent(self, w: Tensor) -> Tangent:
        return PositiveTangent(w.shape, torch.linalg.cholesky((w + w.mT) / 2))

    def _retract(self, w: Tensor, d: Tensor) -> Tensor:
        L = torch.linalg.cholesky((w + w.mT) / 2)
        half: Tensor = torch.linalg.solve_triangular(L, (d + d.mT) / 2, upper=False)
        out = w + d + 0.5 * half.mT @ half
        return (out + out.mT) / 2
