r"""The pseudo-inverse :math:`D^+` at one point: in whichever space is small, dense, truncated, or by products.

* over-parametrised, :math:`D^+ = D^\top (D D^\top)^{-1}`: Cholesky of the Gram, or QR of :math:`D^\top`;
* under-parametrised, :math:`D^+ = (D^\top D)^{-1} D^\top`: the same in parameter space;
* any rank: singular values at or below a tolerance are left out;
* too large for a matrix: LSMR.

A Gram squares the condition of D, so its solves are refined once by products with D itself (corrected seminormal
equations, Bjoerck 1987): what is left is of the order of eps cond(D), as with QR, while Cholesky succeeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.flow.errors import FlowError
from pullback.flow.lsmr import lsmr
from pullback.flow.system import Jacobian

#: Small sides up to which all singular values are computed at every step; beyond, the extreme ones by iteration.
_ALL = 64
#: How many of the smallest singular values are kept.
KEPT = 3


@dataclass
class Extremes:
    """The ends of the spectrum of D.

    Attributes:
        largest: the largest singular value.
        smallest: the smallest ones, ascending; upper bounds where they come from iterations.
        left: left singular vector of the smallest, (QN,); None if not known.
        right: its right singular vector, (K,).
        guess: vectors of the small side to start the next iteration from.
    """

    largest: float
    smallest: list[float]
    left: Tensor | None = None
    right: Tensor | None = None
    guess: tuple[Tensor, Tensor] | None = None

    @property
    def ratio(self) -> float:
        """Smallest over largest."""
        return self.smallest[0] / self.largest if self.largest > 0 else 0.0


class Inverse(ABC):
    """D^+ at one point.

    Args:
        D: the Jacobian.
    """

    name: str

    def __init__(self, D: Jacobian) -> None:
        self.D = D

    @abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """D^+ v, from (QN,) to (K,)."""

    @abstractmethod
    def extremes(self, guess: tuple[Tensor, Tensor] | None) -> Extremes:
        """The ends of the spectrum, from where an earlier call left off."""

    def project(self, v: Tensor) -> Tensor:
        """P v = D D^+ v, the projection on the range of D."""
        return self.D.matvec(self.apply(v))


class Triangular(Inverse):
    """By a triangle L with L L^T the Gram of the small side.

    Args:
        D: the Jacobian.
        qr: QR of the dense matrix instead of Cholesky of its Gram.

    Raises:
        FlowError: if the Gram is not positive definite in this precision.
    """

    def __init__(self, D: Jacobian, qr: bool = False) -> None:
        super().__init__(D)
        self.wide = D.rows <= D.columns
        self.name = "qr" if qr else "cholesky"
        self.Q: Tensor | None = None
        if qr:
            dense = D.dense()
            self.Q, R = torch.linalg.qr(dense.T if self.wide else dense)
            self.L = R.T
            if not bool((R.diagonal() != 0).all()):
                raise FlowError("D has lost its rank exactly; use regime='any-rank'.")
            return
        L, info = torch.linalg.cholesky_ex(D.gram() if self.wide else D.normal())
        if int(info):
            raise FlowError(
                "The Gram of D is not positive definite in this precision: D has lost its rank, or its condition is "
                "beyond the root of it. Use solver='qr' or regime='any-rank', or float64."
            )
        self.L = L

    def apply(self, v: Tensor) -> Tensor:
        """See the base class."""
        if self.Q is not None:
            if self.wide:
                return self.Q @ _lower(self.L, v)
            out: Tensor = torch.linalg.solve_triangular(self.L.T, (self.Q.T @ v)[:, None], upper=True)
            return out[:, 0]
        theta = self._once(v)
        return theta + self._once(v - self.D.matvec(theta))

    def _once(self, v: Tensor) -> Tensor:
        D = self.D
        if self.wide:
            return D.rmatvec(_solve(self.L, v[:, None])[:, 0])
        return _solve(self.L, D.rmatvec(v)[:, None])[:, 0]

    def extremes(self, guess: tuple[Tensor, Tensor] | None) -> Extremes:
        """All singular values of L if it is small, else inverse and power iterations on it."""
        L, m = self.L, len(self.L)
        if m <= _ALL:
            U, values, _ = torch.linalg.svd(L)
            return self._ends(float(values[0]), values.flip(0)[:KEPT], U[:, -1], None)
        sweeps = 2 if guess is not None else 12
        if guess is None:
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(m, KEPT + 1, generator=generator, dtype=torch.float64).to(L)
            guess = start, start[:, :KEPT]
        V, top = guess
        for _ in range(sweeps):
            V = torch.linalg.qr(_solve(L, V))[0]
            top = torch.linalg.qr(L @ (L.T @ top))[0]
        half = torch.linalg.solve_triangular(L, V, upper=False)
        values, turn = torch.linalg.eigh(half.T @ half)
        V = V @ turn.flip(1)
        largest = float(torch.linalg.matrix_norm(L.T @ top, 2))
        return self._ends(largest, values.flip(0).rsqrt()[:KEPT], V[:, 0], (V, top))

    def _ends(self, largest: float, smallest: Tensor, p: Tensor, guess: tuple[Tensor, Tensor] | None) -> Extremes:
        other = self.D.rmatvec(p) if self.wide else self.D.matvec(p)
        other = other / other.norm().clamp_min(torch.finfo(p.dtype).tiny)
        left, right = (p, other) if self.wide else (other, p)
        return Extremes(largest, [float(v) for v in smallest], left, right, guess)


class Truncated(Inverse):
    """By singular values and vectors, those at most ``tolerance`` times the largest left out.

    Args:
        D: the Jacobian.
        tolerance: relative to the largest singular value.
        rank: keep so many of the largest instead; None to go by the tolerance.
        dense: singular values of D itself; else eigenvalues of the Gram, which cannot tell values below 1e-7.
    """

    name = "truncated"

    def __init__(self, D: Jacobian, tolerance: float, rank: int | None = None, dense: bool = True) -> None:
        super().__init__(D)
        self.U, self.values, self.V = decompose(D, dense)
        kept = int((self.values > tolerance * self.values[0]).sum()) if rank is None else rank
        self.rank = kept

    def apply(self, v: Tensor) -> Tensor:
        """See the base class."""
        r = self.rank
        return self.V[:, :r] @ ((self.U[:, :r].T @ v) / self.values[:r])

    def extremes(self, guess: tuple[Tensor, Tensor] | None) -> Extremes:
        """The smallest that are kept come after those left out."""
        smallest = [float(v) for v in self.values.flip(0)[:KEPT]]
        return Extremes(float(self.values[0]), smallest, self.U[:, -1], self.V[:, -1])


class Products(Inverse):
    """By LSMR, for what no matrix fits.

    Rows are scaled to norm one where D has full row rank, columns where it has full column rank: neither changes the
    solution there, and both make fewer iterations.

    Args:
        D: the Jacobian.
        tolerance: of LSMR.
        steps: most iterations of a solve.
    """

    name = "lsmr"

    def __init__(self, D: Jacobian, tolerance: float, steps: int) -> None:
        super().__init__(D)
        self.tolerance, self.steps = tolerance, steps
        self.wide = D.rows <= D.columns
        squares = row_squares(D) if self.wide else torch.cat([block.diagonal() for block in D.blocks])
        self.scale = squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt()
        self.outcome = Extremes(float("nan"), [float("nan")])

    def apply(self, v: Tensor) -> Tensor:
        """See the base class; raises FlowError if LSMR runs out of iterations."""
        D, w = self.D, self.scale
        if self.wide:
            found = lsmr(
                lambda t: w * D.matvec(t), lambda u: D.rmatvec(w * u), w * v, tolerance=self.tolerance, steps=self.steps
            )
        else:
            found = lsmr(
                lambda t: D.matvec(w * t), lambda u: w * D.rmatvec(u), v, tolerance=self.tolerance, steps=self.steps
            )
        if not found.converged:
            raise FlowError(
                f"LSMR did not converge in {self.steps} iterations (Ritz values from {found.smallest:.1e} to "
                f"{found.largest:.1e} after scaling): D is badly conditioned. Give it more (iterations=...), a looser "
                "tol, or memory for a factorisation."
            )
        self.outcome = Extremes(found.largest, [found.smallest])
        return found.x if self.wide else w * found.x

    def extremes(self, guess: tuple[Tensor, Tensor] | None) -> Extremes:
        """Ritz values of the scaled D from the last solve: bounds, not values."""
        return self.outcome


def decompose(D: Jacobian, dense: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition U, values (descending), V of D."""
    if dense:
        U, values, Vh = torch.linalg.svd(D.dense(), full_matrices=False)
        return U, values, Vh.T
    wide = D.rows <= D.columns
    squares, P = torch.linalg.eigh(D.gram() if wide else D.normal())
    P, values = P.flip(1), squares.flip(0).clamp_min(0).sqrt()
    product = D.rmatvec if wide else D.matvec
    other = torch.stack([product(p) for p in P.T], 1) / values.clamp_min(torch.finfo(values.dtype).tiny)
    return (P, values, other) if wide else (other, values, P)


def row_squares(D: Jacobian) -> Tensor:
    """Squared norms of the rows of D, (QN,), formed some samples at a time."""
    total: Tensor | None = None
    for block in D.blocks:
        (rows,) = block.rows.values()
        part = torch.cat([U.square().sum(2) for U in rows.chunks()], 1).reshape(-1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _lower(L: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.linalg.solve_triangular(L, v[:, None], upper=False)
    return out[:, 0]


def _solve(L: Tensor, V: Tensor) -> Tensor:
    """(L L^T)^{-1} V."""
    return torch.cholesky_solve(V, L)
