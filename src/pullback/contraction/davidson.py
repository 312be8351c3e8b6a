r"""The smallest eigenvalue of :math:`H y = \theta M y` by few products with H: Davidson's method.

A Hessian is the pulled-back metric plus what the residuals curve, :math:`H = U^\top U + S`. Lanczos spends its steps on
the large eigenvalues of the first term. Davidson's method expands the space by the residual, solved with the known term
and a shift, so that these are out of the way; Olsen's correction keeps the expansion from pointing back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError
from pullback.contraction.lanczos import missing

#: Ritz vectors kept for a neighbouring problem.
KEPT = 4


@dataclass
class Lowest:
    """What was found at the lower end.

    Attributes:
        value: smallest Ritz value, an upper bound of the smallest eigenvalue.
        residual: of its vector, in the norm of :math:`M^{-1}`: some eigenvalue lies that near.
        error: estimate of what is missing, see :func:`pullback.contraction.lanczos.missing`.
        products: with H, rough ones and exact ones.
        spent: their cost.
        converged: whether ``error`` met the tolerance.
        vectors: Ritz vectors of the smallest values, (n, k).
    """

    value: float
    residual: float
    error: float
    products: int
    spent: int
    converged: bool
    vectors: Tensor


def davidson(
    rough: Callable[[Tensor], Tensor] | None,
    product: Callable[[Tensor], Tensor],
    metric: Callable[[Tensor], Tensor],
    solve_metric: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor, float, float], Tensor],
    start: Tensor,
    *,
    tol: float,
    scale: float,
    budget: int,
    cost: int,
) -> Lowest:
    """The smallest eigenvalue.

    Args:
        rough: H v to some digits at the cost of one, (n,) to (n,); None to take exact products alone. The space is
            built by these, and what is found is measured by an exact product; where that does not bear it out, exact
            ones go on.
        product: H v.
        metric: M v.
        solve_metric: M^-1 v.
        precondition: (r, theta, spread) to an approximate solve of H - theta M, made definite by ``spread``.
        start: columns to start from, (n, k).
        tol: how much may be missing of the eigenvalue, relative to the larger of ``scale`` and all Ritz values.
        scale: a lower bound of the largest eigenvalue in modulus.
        budget: what products may cost.
        cost: of an exact product; the first costs one more, for the graph that all share.

    Raises:
        ContractionError: if a product is not finite.
    """
    space = _Space(start, budget, metric)
    waiting = list(start.T)
    exact = rough is None
    spent, products = (1 if exact else 0), 0
    while True:
        by, each = (product, cost) if rough is None or exact else (rough, 1)
        space.add(waiting.pop(0), by)
        spent, products = spent + each, products + 1
        # An exact product is kept in reserve for the end.
        full = space.full or spent + (each if exact else each + cost + 1) > budget
        if waiting and not full:
            continue
        values, y, Hy, My = space.lowest()
        theta = float(values[0])
        rest = Hy - theta * My
        residual = max(float(rest @ solve_metric(rest)), 0.0) ** 0.5
        allowed = tol * max(scale, float(values.abs().max()))
        error = missing(values, residual)
        done = space.k == space.size or (space.k > 2 and error <= allowed)
        if (done or full) and not exact:
            Hy = product(y)
            spent, products, exact = spent + cost + 1, products + 1, True
            theta = float(y @ Hy)
            rest = Hy - theta * My
            residual = max(float(rest @ solve_metric(rest)), 0.0) ** 0.5
            error = missing(torch.cat([values.new_tensor([theta]), values[1:]]), residual)
            done = done and (error <= allowed or space.size == 1)
            full = spent + cost > budget
            vectors = space.vectors()
            if not (done or full):
                space.restart(y, My, Hy)
        else:
            vectors = space.vectors()
        if done or full:
            return Lowest(theta, residual, error, products, spent, done, vectors)
        away, back = precondition(rest, theta, residual), precondition(My, theta, residual)
        waiting = [away - (My @ away) / (My @ back) * back]


class _Space:
    """A basis that is orthonormal in M, and its images."""

    def __init__(self, start: Tensor, most: int, metric: Callable[[Tensor], Tensor]) -> None:
        self.size = start.shape[0]
        self.V, self.MV, self.HV = (start.new_empty(min(most, self.size), self.size) for _ in range(3))
        self.k = 0
        self._metric = metric

    @property
    def full(self) -> bool:
        """Whether there is no room left."""
        return self.k == len(self.V)

    def add(self, v: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        """One more direction."""
        k = self.k
        for _ in range(2):
            v = v - (self.MV[:k] @ v) @ self.V[:k]
            Mv = self._metric(v)
            norm = float(v @ Mv) ** 0.5
            v, Mv = v / norm, Mv / norm
        Hv = product(v)
        if not bool(torch.isfinite(Hv).all()):
            raise ContractionError(
                "A product with the Hessian is not finite; look for overflow in the loss or weights."
            )
        self.V[k], self.MV[k], self.HV[k] = v, Mv, Hv
        self.k += 1

    def _ritz(self) -> tuple[Tensor, Tensor]:
        T = self.V[: self.k] @ self.HV[: self.k].T
        values, vectors = torch.linalg.eigh((T + T.T) / 2)
        return values, vectors

    def lowest(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ritz values; the vector of the smallest, its image and its product with M."""
        values, vectors = self._ritz()
        y, k = vectors[:, 0], self.k
        return values, y @ self.V[:k], y @ self.HV[:k], y @ self.MV[:k]

    def vectors(self) -> Tensor:
        """Ritz vectors of the smallest values, (n, k)."""
        return (self._ritz()[1][:, :KEPT].T @ self.V[: self.k]).T

    def restart(self, y: Tensor, My: Tensor, Hy: Tensor) -> None:
        """Only this vector, with an exact image."""
        self.V[0], self.MV[0], self.HV[0] = y, My, Hy
        self.k = 1
