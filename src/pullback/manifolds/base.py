r"""What a manifold is to an optimizer: a basis of the tangent space at a point, and a way back onto it.

With E the basis, orthonormal in the manifold's own inner product, a metric M of the ambient space and a gradient g give

.. math:: d = -E (E^\top M E)^{-1} E^\top g, \qquad w \leftarrow R_w(d)

(theory 9, last line). d is the steepest descent among tangent directions. The orthogonal projection of the ambient step
:math:`-M^{-1} g` is not, and can point uphill.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from pullback.errors import ManifoldError


class Tangent(ABC):
    """The tangent space at a point, in orthonormal coordinates.

    Args:
        shape: shape of the point.
        dimension: number of coordinates.
    """

    def __init__(self, shape: torch.Size, dimension: int) -> None:
        self.shape = shape
        self.dimension = dimension

    @abstractmethod
    def to_tangent(self, g: Tensor) -> Tensor:
        """E^T g of gradients or rows, (*any, *shape) to (*any, dimension)."""

    @abstractmethod
    def from_tangent(self, c: Tensor) -> Tensor:
        """E c, (*any, dimension) to (*any, *shape)."""

    def coordinates(self, d: Tensor) -> Tensor:
        """Coordinates of the tangent direction nearest to d, (*any, *shape) to (*any, dimension).

        Nearest in the manifold's own inner product. Where that is the ambient one it is E^T d.
        """
        return self.to_tangent(d)

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same coordinates in another precision."""


class Manifold(ABC):
    """A manifold of tensors."""

    @abstractmethod
    def dimension(self, shape: torch.Size) -> int:
        """Its dimension among tensors of a shape.

        Raises:
            ManifoldError: if it has no tensors of that shape.
        """

    @abstractmethod
    def nearest(self, w: Tensor) -> Tensor:
        """A point of the manifold next to w, same shape.

        Raises:
            ManifoldError: if there is no telling which.
        """

    @abstractmethod
    def distance(self, w: Tensor) -> float:
        """Euclidean distance of w from the manifold."""

    @abstractmethod
    def project(self, w: Tensor, d: Tensor) -> Tensor:
        """The tangent direction at w nearest to d, all of one shape; what is tangent of a gradient."""

    @abstractmethod
    def _tangent(self, w: Tensor) -> Tangent:
        """Coordinates at a point that has been checked."""

    @abstractmethod
    def _retract(self, w: Tensor, d: Tensor) -> Tensor:
        """The point reached from w along d, both finite."""

    def _scale(self, w: Tensor) -> float:
        """Length against which a distance is small."""
        return float(w.norm())

    def check(self, w: Tensor, what: str = "The point") -> None:
        """Refuse what is not a point of the manifold.

        A distance below the square root of the precision, relative to the point, is round-off.

        Args:
            w: the tensor.
            what: what it is, for the message.

        Raises:
            ManifoldError: with the distance and the remedy.
        """
        if not w.is_floating_point():
            raise ManifoldError(f"{what} has dtype {w.dtype}; {self} needs real floating numbers.")
        self.dimension(w.shape)
        if not bool(torch.isfinite(w).all()):
            raise ManifoldError(f"{what} is not finite, so it lies on no manifold; look for overflow before this step.")
        distance = self.distance(w)
        if distance > torch.finfo(w.dtype).eps ** 0.5 * self._scale(w):
            raise ManifoldError(
                f"{what} is not on {self}: it lies {distance:.3g} away; set it to {self}.nearest(w), or declare it "
                "with constrain(..., project=True)."
            )

    def tangent(self, w: Tensor, what: str = "The point") -> Tangent:
        """Coordinates of the tangent space at a point.

        Args:
            w: a point.
            what: what it is, for the message.

        Raises:
            ManifoldError: if it is none.
        """
        w = w.detach()
        self.check(w, what)
        return self._tangent(w)

    def retract(self, w: Tensor, d: Tensor) -> Tensor:
        """The point reached from w along the tangent direction d; agrees with w + d to second order in d.

        To second order on the sphere and on Stiefel's manifold means: but for a part normal to the manifold. A d that
        is not finite gives a result that is not.

        Args:
            w: a point.
            d: a tangent direction there, same shape.

        Returns:
            A fresh tensor.

        Raises:
            ManifoldError: if the shapes differ.
        """
        if w.shape != d.shape:
            raise ManifoldError(f"A direction of shape {tuple(d.shape)} at a point of shape {tuple(w.shape)}.")
        if not bool(torch.isfinite(d).all()):
            return w + d
        return self._retract(w, d)
