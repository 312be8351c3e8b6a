"""A Cholesky factorisation that degrades step by step and says how far it had to go.

The ladder: Cholesky; Cholesky with growing jitter; the same in float64; eigenvalues in float64, the negative
ones (round-off of a Gram) raised to zero; an error. Each rung costs one look at a flag on the host.

Batches are powers of two, and so are the rows of a Gram then: its columns lie in the same few cache lines, and LAPACK
takes two to three times as long as one size further (float32, MKL on an AMD EPYC, one thread: 128 in 97 us and 136 in
36, 512 in 2.4 ms and 520 in 0.95, 1024 in 16 ms and 1032 in 6 to 9). Such a matrix is factorised inside one that is a
little larger: the border is the identity's, so that the factor in the corner is what it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pullback.curvature.scalars import cast
from pullback.curvature.workspace import set_border
from pullback.errors import StepError

Outcome = Literal["cholesky", "jitter", "float64", "eigh"]


@dataclass
class Factorised:
    """A factorised positive definite matrix A + shift I.

    Attributes:
        outcome: which rung of the ladder it took.
        L: lower Cholesky factor, or None after ``"eigh"``.
        whole: the same with its border, column-major without gaps.
        eigen: eigenvalues (shifted) and eigenvectors after ``"eigh"``.
        dtype: dtype of the vectors it solves for.
    """

    outcome: Outcome
    dtype: torch.dtype
    L: Tensor | None = None
    whole: Tensor | None = None
    eigen: tuple[Tensor, Tensor] | None = None

    def solve(self, b: Tensor) -> Tensor:
        """(A + shift I)^{-1} b for a vector b of shape (m,), in the dtype of b."""
        if self.whole is not None:
            # Two triangular solves in place. What has gaps, and all that cholesky_solve is given, is copied first.
            n, L = b.shape[0], self.whole
            x = L.new_zeros(L.shape[0], 1)
            x[:n, 0] = b
            torch.linalg.solve_triangular(L, x, upper=False, out=x)
            torch.linalg.solve_triangular(L.mT, x, upper=True, out=x)
            return cast(x[:n, 0], b.dtype)
        assert self.eigen is not None
        values, vectors = self.eigen
        return (vectors @ ((vectors.T @ b.to(vectors.dtype)) / values)).to(b.dtype)

    def inverse(self) -> Tensor:
        """(A + shift I)^{-1}, for those who want to look at it."""
        if self.L is not None:
            return torch.cholesky_inverse(self.L)
        assert self.eigen is not None
        values, vectors = self.eigen
        return (vectors / values) @ vectors.T


def border_of(n: int, device: torch.device) -> int:
    """Rows and columns to add to a matrix of size n whose columns collide in the cache."""
    return 8 if n % 128 == 0 and device.type == "cpu" else 0


def factorise(A: Tensor, shift: float, memory: Tensor | None = None) -> Factorised:
    """Factorise A + shift I, shape (m, m), A symmetric positive semidefinite up to round-off.

    Args:
        A: the matrix, of which only what is on and above the diagonal is read; that is left as it is.
        shift: the damping, positive.
        memory: a matrix the factor may be written to, of the dtype of A: (m, m), or larger with the border of the
            identity (see :func:`border_of`).

    Raises:
        StepError: if A holds values that are not finite.
    """
    L = _attempt(A, shift, memory)
    if L is not None:
        return _found("cholesky", A, L)
    scale = float(A.diagonal().mean())
    if not torch.isfinite(A.triu()).all():
        raise StepError(
            f"The curvature matrix ({A.shape[0]} x {A.shape[1]}) holds values that are not finite; look for "
            "overflow in the model's activations."
        )
    eps = torch.finfo(A.dtype).eps
    for power in (1, 2):
        L = _attempt(A, shift + 10.0**power * eps * scale)
        if L is not None:
            return _found("jitter", A, L)
    A64 = A.double()
    if A.dtype != torch.float64:
        L = _attempt(A64, shift)
        if L is not None:
            return _found("float64", A, L)
    values, vectors = torch.linalg.eigh(A64, UPLO="U")
    return Factorised("eigh", A.dtype, eigen=(values.clamp_min(0) + shift, vectors))


def _found(outcome: Outcome, A: Tensor, whole: Tensor) -> Factorised:
    m = A.shape[0]
    return Factorised(outcome, A.dtype, whole[:m, :m], whole)


def _attempt(A: Tensor, shift: float, memory: Tensor | None = None) -> Tensor | None:
    m = A.shape[0]
    whole = A.clone() if memory is None else memory
    shifted = whole if memory is None else memory[:m, :m].copy_(A)
    shifted.diagonal().add_(shift)
    # Transposed it is column-major, as LAPACK wants it: no copy on the way in or out, and above becomes below. One
    # object for input and output, for otherwise what is above is copied onto itself along columns (a tenth of it all).
    L = whole.mT
    info = torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    if info.item() == 0 and math.isfinite(shifted.diagonal().sum().item()):
        return L
    if memory is not None:
        # What is not finite may have spread into the border.
        set_border(memory, m)
    return None
