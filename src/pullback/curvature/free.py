"""Matrix-free: conjugate gradients in the R-space, for what is too large for both dual and primal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.solver import Solver
from pullback.curvature.workspace import Workspace
from pullback.errors import StepError


class MatrixFree(Solver):
    r"""Solves :math:`(\mu I + K) w = b` with K applied as :math:`\sum_l U_l (U_l^\top v)`, nothing formed.

    Args:
        blocks: the blocks, all with the same R.
        workspace: not used.
        slot: not used.
        tolerance: the relative residual :math:`|b - (\mu I + K) w| / |b|` it stops at.
        iterations: most products with K per solve; a solve that runs out of them is kept as it is, and says so.
    """

    name = "cg"

    def __init__(
        self,
        blocks: Sequence[Block],
        workspace: Workspace | None = None,
        slot: int = 0,
        *,
        tolerance: float = 1e-6,
        iterations: int = 250,
    ) -> None:
        super().__init__(blocks, workspace, slot)
        self.tolerance = tolerance
        self.iterations = iterations
        self._mu = 0.0

    @classmethod
    def flops(cls, blocks: Sequence[Block]) -> float:
        """A hundred products with U and U^T, the order of what a solve takes. See the base class."""
        return 100.0 * sum(4.0 * block.matvec_flops() for block in blocks)

    @classmethod
    def numbers(cls, blocks: Sequence[Block]) -> float:
        """A few vectors. See the base class."""
        return 6.0 * blocks[0].R + 2.0 * sum(block.n for block in blocks)

    def trace(self) -> Tensor:
        """Exact: the sum of squares of all rows. See the base class."""
        total = self.blocks[0].diagonal().sum()
        for block in self.blocks[1:]:
            total = total + block.diagonal().sum()
        return total

    def factorise(self, mu: float) -> None:
        """See the base class."""
        self._mu = mu

    def direction(
        self, e0: Tensor, g: Sequence[Tensor], rest: Sequence[Tensor] | None, mu: float
    ) -> tuple[list[Tensor], Tensor]:
        """See the base class."""
        del g
        rhs = e0.double()
        if rest is not None:
            rhs = rhs - self.matvec(rest).double() / mu
        w = self._solve(rhs)
        d = [-part for part in self.rmatvec(w)]
        if rest is not None:
            d = [part - h / mu for part, h in zip(d, rest, strict=True)]
        return [part.to(e0.dtype) for part in d], self.matvec(d).to(e0.dtype)

    def _solve(self, b: Tensor) -> Tensor:
        # The recursion runs in float64: R-vectors are cheap, and CG loses orthogonality fast in float32.
        norm = float(b.norm())
        w, r = torch.zeros_like(b), b
        p, rr, count = r, norm**2, 0
        while count < self.iterations and rr**0.5 > self.tolerance * norm:
            Kp = self.matvec(self.rmatvec(p)).double() + self._mu * p
            curvature = float(p @ Kp)
            if not curvature > 0:
                raise StepError("Conjugate gradients met a direction of no curvature; the metric is not finite.")
            w = w + (rr / curvature) * p
            r = r - (rr / curvature) * Kp
            before, rr = rr, float(r @ r)
            p = r + (rr / before) * p
            count += 1
        done = "" if rr**0.5 <= self.tolerance * norm else " (stopped early)"
        self.outcome = f"{count} iterations{done}"
        return w
