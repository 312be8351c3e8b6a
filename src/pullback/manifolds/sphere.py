r"""The sphere: tensors of one length, all numbers of the tensor taken together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pullback.errors import ManifoldError
from pullback.manifolds.base import Manifold, Tangent


class SphereTangent(Tangent):
    r"""Directions orthogonal to a unit vector u: the last n - 1 columns of a Householder reflection.

    :math:`H = I - v v^\top / (1 + |u_1|)` with :math:`v = u + \operatorname{sign}(u_1) e_1` sends u to a multiple of
    :math:`e_1`, so its other columns are an orthonormal basis of what is orthogonal to u. A product costs O(n).

    Args:
        shape: shape of the point.
        u: its direction, flat, shape (n,).
    """

    def __init__(self, shape: torch.Size, u: Tensor) -> None:
        super().__init__(shape, u.shape[0] - 1)
        self.u = u
        self.v = u.clone()
        self.v[0] += 1.0 if u[0] >= 0 else -1.0
        self.half = 1 + u[0].abs()

    def to_tangent(self, g: Tensor) -> Tensor:
        """See the base class."""
        lead = g.shape[: g.ndim - len(self.shape)]
        return self._reflect(g.reshape(*lead, -1))[..., 1:]

    def from_tangent(self, c: Tensor) -> Tensor:
        """See the base class."""
        full = torch.cat([torch.zeros_like(c[..., :1]), c], -1)
        return self._reflect(full).reshape(*c.shape[:-1], *self.shape)

    def _reflect(self, x: Tensor) -> Tensor:
        return x - ((x @ self.v) / self.half)[..., None] * self.v

    def to(self, dtype: torch.dtype) -> Self:
        """See the base class."""
        return type(self)(self.shape, self.u.to(dtype))


@dataclass(frozen=True)
class Sphere(Manifold):
    r"""Tensors of length r, :math:`\sum w^2 = r^2`, in the ambient inner product.

    The retraction is :math:`r (w + d) / |w + d|`.

    Attributes:
        radius: r.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"Sphere(radius=...) must be positive and finite, got {self.radius}.")

    def dimension(self, shape: torch.Size) -> int:
        """Dimension n - 1 for n numbers. See the base class."""
        if shape.numel() < 2:
            raise ManifoldError(
                f"A sphere needs two numbers or more, got the shape {tuple(shape)}; fix the sign instead."
            )
        return shape.numel() - 1

    def nearest(self, w: Tensor) -> Tensor:
        """See the base class."""
        norm = w.norm()
        if not (norm > 0 and bool(torch.isfinite(norm))):
            raise ManifoldError(
                f"A tensor of length {float(norm)} has no direction; there is no nearest point on {self}."
            )
        point: Tensor = w * (self.radius / norm)
        return point

    def distance(self, w: Tensor) -> float:
        """See the base class."""
        return abs(float(w.norm()) - self.radius)

    def project(self, w: Tensor, d: Tensor) -> Tensor:
        """See the base class."""
        return d - w * ((w * d).sum() / w.square().sum())

    def _scale(self, w: Tensor) -> float:
        return self.radius

    def _tangent(self, w: Tensor) -> Tangent:
        flat = w.reshape(-1)
        return SphereTangent(w.shape, flat / flat.norm())

    def _retract(self, w: Tensor, d: Tensor) -> Tensor:
        return self.nearest(w + d)
