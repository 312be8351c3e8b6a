r"""EKFAC: the diagonal of a layer's metric in the eigenbasis of its Kronecker factors, averaged by itself.

.. math:: M_l \approx (Q_L \otimes Q_R)\, \mathrm{diag}(D)\, (Q_L \otimes Q_R)^\top, \qquad
   D = \textstyle\sum_{a,n} (Q_L^\top\, U_{(a,n)}\, Q_R)^{\circ 2}

with U the row as a matrix. Among all diagonals this D is the closest to the metric in that basis (George et al. 2018,
theorem 2); K-FAC's own would be the products of eigenvalues. The basis is renewed now and then, D at every look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.curvature.kronecker import KroneckerBlock, Shared, finite, samples, sides_of
from pullback.curvature.moments import MatrixMoment, Moment, positive
from pullback.tape import Rows
from pullback.tape.rules.base import CHUNK_NUMBERS
from pullback.tape.rules.sides import Sides


class EigenBlock(KroneckerBlock):
    """A weight whose metric is diagonal in the eigenbasis of its two moments, both held as matrices.

    Attributes:
        D: the averaged diagonal, shape (G, left, right).
        basis: looks from one eigenbasis to the next.
    """

    form = "ekfac"

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        rule: str,
        shape: Sequence[int],
        left: Moment,
        right: Moment,
        shared: Shared,
        *,
        basis: int,
        bases: tuple[Tensor, Tensor] | None = None,
        D: Tensor | None = None,
        inverse: Tensor | None = None,
        seen: int = 0,
        failures: int = 0,
    ) -> None:
        super().__init__(params, rule, shape, left, right, shared, seen=seen, failures=failures)
        self.basis = basis
        self.bases = bases
        self.D = D
        self.inverse = inverse

    @classmethod
    def fits(cls, block: KroneckerBlock, rows: Sequence[Rows]) -> bool:
        """Whether both sides have an eigenbasis at hand, and rows are of one kind."""
        matrices = isinstance(block.left, MatrixMoment) and isinstance(block.right, MatrixMoment)
        return matrices and not any(own.table for own in sides_of(rows))

    def _follow(self, rows: Sequence[Rows], keep: float) -> bool:
        sides = self._sides(rows)
        left, right = samples(sides, self.shared)
        if not (finite(left) and finite(right)):
            return False
        self.left.follow(left, keep)
        self.right.follow(right, keep)
        if self.bases is None or self.seen % self.basis == 0:
            assert isinstance(self.left, MatrixMoment)
            assert isinstance(self.right, MatrixMoment)
            (a, P), (b, Q) = torch.linalg.eigh(self.left.C), torch.linalg.eigh(self.right.C)
            # What was averaged in the old basis is gone; the products of eigenvalues stand for it.
            self.D = (a[:, :, None] * b[:, None]).clamp_min_(0)
            self.bases = P, Q
        assert self.D is not None
        self.D.mul_(keep)
        for own in sides:
            self.D.add_(squares(own, *self.bases), alpha=1 - keep)
        return True

    def _invert(self, damping: float) -> bool:
        assert self.D is not None
        inverse = (self.D + damping * positive(self.D.mean((1, 2)))[:, None, None]).reciprocal_()
        if not bool(torch.isfinite(inverse).all()):
            return False
        self.inverse = inverse
        return True

    def solve(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.bases is not None
        assert self.inverse is not None
        P, Q = self.bases
        inside = torch.bmm(torch.bmm(P.transpose(1, 2), G), Q).mul_(self.inverse)
        return torch.bmm(torch.bmm(P, inside), Q.transpose(1, 2))

    def state(self) -> dict[str, Any]:
        """See the base class."""
        more = {"basis": self.basis, "bases": self.bases, "D": self.D, "inverse": self.inverse}
        return {**super().state(), **more}


def squares(sides: Sides, P: Tensor, Q: Tensor) -> Tensor:
    """Sum over rows of the squares of their entries in a basis, shape (G, left, right).

    Args:
        sides: the rows.
        P: basis on the left, shape (G, left, left).
        Q: basis on the right, shape (G, right, right).
    """
    s, x = sides.factor, sides.given_vectors()
    if sides.times is not None:
        s = s * sides.times[:, None]
    F, X = (P, Q) if sides.factor_left else (Q, P)
    s, x = torch.einsum("ganpi,gij->ganpj", s, F), torch.einsum("gnpi,gij->gnpj", x, X)
    G, r, N, positions, o = s.shape
    if positions == 1:
        first, second = s[:, :, :, 0].square().sum(1), x[:, :, 0].square()
        left, right = (first, second) if sides.factor_left else (second, first)
        return left.transpose(1, 2) @ right
    out = s.new_zeros(G, P.shape[1], Q.shape[1])
    step = max(1, CHUNK_NUMBERS // (G * o * x.shape[3]))
    for a in range(r):
        for k in range(0, N, step):
            left, right = s[:, a, k : k + step], x[:, k : k + step]
            if not sides.factor_left:
                left, right = right, left
            out += (left.transpose(2, 3) @ right).square_().sum(1)
    return out
