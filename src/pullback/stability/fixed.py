"""A metric of the parameters that stays as it is: identity, mass, or a given matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pullback.stability.errors import StabilityError


class FixedMetric:
    """A constant metric M of packed vectors.

    Args:
        value: a positive number, a positive diagonal (K,), or a symmetric positive definite matrix (K, K).

    Attributes:
        mu: the smallest eigenvalue of M, its mass.
        largest: the largest one.

    Raises:
        StabilityError: if M is not positive definite (the eigenvalue is named), not symmetric or not finite.
    """

    def __init__(self, value: float | Tensor = 1.0) -> None:
        M = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).detach()
        if not bool(torch.isfinite(M).all()):
            raise StabilityError("The metric holds numbers that are not finite; give a positive definite one.")
        if M.ndim > 2 or (M.ndim == 2 and M.shape[0] != M.shape[1]):
            raise StabilityError(f"A metric is a number, a diagonal or a square matrix, got shape {tuple(M.shape)}.")
        if M.ndim == 2 and not torch.allclose(M, M.T, rtol=1e-10, atol=1e-12 * float(M.abs().max())):
            raise StabilityError("The metric is not symmetric; give (M + M.T) / 2 if that is what is meant.")
        values = torch.linalg.eigvalsh(M) if M.ndim == 2 else M.reshape(-1)
        self.mu, self.largest = float(values.min()), float(values.max())
        floor = M.shape[-1] * torch.finfo(M.dtype).eps * self.largest if M.ndim == 2 else 0.0
        if not self.mu > floor:
            raise StabilityError(
                f"The metric is not positive definite: its smallest eigenvalue is {self.mu:.3g}; add a mass to it."
            )
        self.M = M
        self._factor = torch.linalg.cholesky(M) if M.ndim == 2 else None

    @property
    def xi(self) -> float:
        """Smallest over largest eigenvalue: one over the condition number."""
        return self.mu / self.largest

    def at(self, theta: Tensor) -> FixedMetric:
        """Itself: it is the same at all weights."""
        return self

    def apply(self, v: Tensor) -> Tensor:
        """M v, (K,) to (K,)."""
        return self.M.to(v) @ v if self.M.ndim == 2 else self.M.to(v) * v

    def solve(self, v: Tensor) -> Tensor:
        """M^{-1} v, (K,) to (K,)."""
        if self._factor is None:
            return v / self.M.to(v)
        return torch.cholesky_solve(v[:, None], self._factor.to(v))[:, 0]

    def norm(self, v: Tensor) -> float:
        """|v|_M."""
        return math.sqrt(float(v @ self.apply(v)))
