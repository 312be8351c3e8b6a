"""A Cholesky factorisation that degrades step by step and says how far it had to go.

The ladder: Cholesky; Cholesky with growing jitter; the same in float64; eigenvalues in float64, the negative
ones (round-off of a Gram) raised to zero; an error. Each rung costs one look at a flag on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pullback.errors import StepError

Outcome = Literal["cholesky", "jitter", "float64", "eigh"]


@dataclass
class Factorised:
    """A factorised positive definite matrix A + shift I.

    Attributes:
        outcome: which rung of the ladder it took.
        L: lower Cholesky factor, or None after ``"eigh"``.
        eigen: eigenvalues (shifted) and eigenvectors after ``"eigh"``.
        dtype: dtype of the vectors it solves for.
    """

    outcome: Outcome
    dtype: torch.dtype
    L: Tensor | None = None
    eigen: tuple[Tensor, Tensor] | None = None

    def solve(self, b: Tensor) -> Tensor:
        """(A + shift I)^{-1} b for a vector b of shape (m,), in the dtype of b."""
        if self.L is not None:
            return torch.cholesky_solve(b.to(self.L.dtype)[:, None], self.L)[:, 0].to(b.dtype)
        assert self.eigen is not None
        values, vectors = self.eigen
        return (vectors @ ((vectors.T @ b.to(vectors.dtype)) / values)).to(b.dtype)


def factorise(A: Tensor, shift: float, memory: Tensor | None = None) -> Factorised:
    """Factorise A + shift I, shape (m, m), A symmetric positive semidefinite up to round-off.

    Args:
        A: the matrix; it is left as it is.
        shift: the damping, positive.
        memory: an (m, m) matrix the factor may be written to, of the dtype of A.

    Raises:
        StepError: if A holds values that are not finite.
    """
    L = _attempt(A, shift, memory)
    if L is not None:
        return Factorised("cholesky", A.dtype, L)
    scale = float(A.diagonal().mean())
    if not torch.isfinite(A).all():
        raise StepError(
            f"The curvature matrix ({A.shape[0]} x {A.shape[1]}) holds values that are not finite; look for "
            "overflow in the model's activations."
        )
    eps = torch.finfo(A.dtype).eps
    for power in (1, 2):
        L = _attempt(A, shift + 10.0**power * eps * scale)
        if L is not None:
            return Factorised("jitter", A.dtype, L)
    A64 = A.double()
    if A.dtype != torch.float64:
        L = _attempt(A64, shift)
        if L is not None:
            return Factorised("float64", A.dtype, L)
    values, vectors = torch.linalg.eigh(A64)
    return Factorised("eigh", A.dtype, eigen=(values.clamp_min(0) + shift, vectors))


def _attempt(A: Tensor, shift: float, memory: Tensor | None = None) -> Tensor | None:
    diagonal = A.diagonal()
    before = diagonal.clone()
    diagonal.add_(shift)
    try:
        if memory is None:
            L, info = torch.linalg.cholesky_ex(A)
        else:
            # Both transposed are column-major, as LAPACK wants them: no copy on the way in or out.
            L, info = memory.mT, torch.empty((), dtype=torch.int32, device=A.device)
            torch.linalg.cholesky_ex(A.mT, out=(L, info))
    finally:
        diagonal.copy_(before)
    return L if info.item() == 0 and math.isfinite(L.diagonal().sum().item()) else None
