r"""Lanczos with full reorthogonalisation: both ends of the spectrum of a symmetric operator by products.

What is known of the result is of three kinds. A Ritz value is never above the largest eigenvalue (certain). *Some*
eigenvalue lies within the residual of it (certain, but it need not be the largest). From a start drawn uniformly on the
sphere, the largest eigenvalue exceeds the largest Ritz value after k steps by at most

.. math:: \varepsilon (\lambda_{max} - \lambda_{min}), \quad
   \varepsilon = \left(\ln(1.648 \sqrt n / \delta) / (2k - 1)\right)^2

with probability :math:`1 - \delta` (Kuczynski and Wozniakowski 1992, for positive definite matrices; the Krylov space
does not change under a shift). The last is crude and is the only one that says something about the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError


@dataclass
class Ritz:
    """What Lanczos found at the upper end.

    Attributes:
        value: largest Ritz value, a lower bound of the largest eigenvalue.
        smallest: smallest Ritz value, an upper bound of the smallest eigenvalue.
        residual: ``|A v - value v|``: some eigenvalue lies that near.
        error: estimate of what is missing, see :func:`missing`.
        steps: products with the operator.
        converged: whether ``error`` met the tolerance.
        complete: whether the Krylov space was exhausted, so that nothing is missing but round-off.
        size: n.
        vector: the Ritz vector, (n,).
    """

    value: float
    smallest: float
    residual: float
    error: float
    steps: int
    converged: bool
    complete: bool
    size: int
    vector: Tensor

    def above(self, delta: float) -> float:
        """A bound of the largest eigenvalue that holds with probability 1 - delta over the start.

        Args:
            delta: the chance that it does not hold.
        """
        if self.complete:
            return self.value + self.residual
        share = (math.log(1.648 * math.sqrt(self.size) / (delta / 2)) / (2 * self.steps - 1)) ** 2
        if share >= 0.5:
            return math.inf
        # Both ends of the spread are Ritz values, short of it by a share each: half of delta for either.
        return self.value + share * (self.value - self.smallest) / (1 - 2 * share)


def missing(values: Tensor, residual: float) -> float:
    """Estimate of how far the first Ritz value is from the end of the spectrum.

    The residual, or its square over half the gap to one of the next Ritz values plus the width of those left out of the
    gap (Temple's inequality with Ritz values for the unknown neighbours, which are nearer than these; hence half, and
    an estimate).

    Args:
        values: Ritz values, the wanted end first.
        residual: of the first.
    """
    away = (values - values[0]).abs()
    width, gap = away[:-1], away[1:]
    squared = width + 2 * residual**2 / gap.clamp_min(1e-300)
    return float(min([residual, *squared.tolist()]))


def lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    *,
    tol: float,
    steps: int,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> Ritz:
    """The largest eigenvalue of a symmetric operator.

    Args:
        product: the operator, (n,) to (n,).
        size: n.
        tol: how much may be missing, relative to the larger of both ends in modulus.
        steps: most products.
        dtype: of the vectors.
        generator: draws the start.

    Raises:
        ContractionError: if a product is not finite.
    """
    if steps < 1:
        raise ContractionError(f"Lanczos was given {steps} products; give at least one.")
    steps = min(steps, size)
    v = torch.randn(size, dtype=dtype, generator=generator)
    v = v / v.norm()
    V, W = v.new_empty(steps, size), v.new_empty(steps, size)
    T = v.new_zeros(steps, steps)
    for k in range(steps):
        V[k] = v
        w = product(v)
        if not bool(torch.isfinite(w).all()):
            raise ContractionError(
                "A product with the Jacobian is not finite; look for overflow in the field or state."
            )
        W[k] = w
        column = V[: k + 1] @ w
        T[k, : k + 1] = T[: k + 1, k] = column
        # Twice is enough.
        rest = w - column @ V[: k + 1]
        rest = rest - (V[: k + 1] @ rest) @ V[: k + 1]
        beta = float(rest.norm())
        values, vectors = torch.linalg.eigh(T[: k + 1, : k + 1])
        scale = max(float(values.abs().max()), torch.finfo(dtype).tiny)
        residual = beta * abs(float(vectors[-1, -1]))
        error = missing(values.flip(0), residual)
        complete = k + 1 == size or beta <= 1e2 * torch.finfo(dtype).eps * scale
        # One Ritz value has no neighbour to be told from.
        done = complete or (k > 1 and error <= tol * scale)
        if done or k + 1 == steps:
            break
        v = rest / beta
    top = vectors[:, -1] @ V[: k + 1]
    residual = float((vectors[:, -1] @ W[: k + 1] - values[-1] * top).norm())
    return Ritz(float(values[-1]), float(values[0]), residual, error, k + 1, done, complete, size, top)
