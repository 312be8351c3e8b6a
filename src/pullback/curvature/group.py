"""A group of blocks that solve together: which space, which matrix, which step.

Dual: K = sum of the blocks' Grams, R x R. Primal: H = U^T U, n x n. Both give the same direction
(theory 2); the cheaper one is taken, within memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.cholesky import Factorised, Outcome, factorise
from pullback.errors import StepError
from pullback.tape.rules.base import CHUNK_NUMBERS

Space = Literal["dual", "primal"]


def memory_budget() -> float:
    """Bytes a curvature matrix may take: half of what the machine has."""
    try:
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX machine
        return 4e9


class Group:
    """Blocks that share one metric M = mu I + U^T U.

    Args:
        blocks: the blocks, with the same R.
        space: ``"dual"``, ``"primal"`` or None for the cheaper.

    Attributes:
        space: which matrix is factorised.
        outcome: rung of the Cholesky ladder in the last :meth:`factorise`.
    """

    def __init__(self, blocks: Sequence[Block], space: Space | None = None) -> None:
        self.blocks = list(blocks)
        self.R = self.blocks[0].R
        self.n = sum(block.n for block in self.blocks)
        self.space: Space = space or self._cheaper()
        self.outcome: Outcome = "cholesky"
        self._matrix: Tensor | None = None
        self._factor: Factorised | None = None

    # -- cost ------------------------------------------------------------------------------------------

    def flops(self, space: Space) -> float:
        """Multiply-adds of forming and factorising the matrix of one space."""
        if space == "dual":
            return sum(block.gram_flops() for block in self.blocks) + self.R**3 / 3
        if len(self.blocks) == 1:
            return self.blocks[0].primal_flops() + self.n**3 / 3
        return float(self.R) * self.n**2 + self.n**3 / 3

    def _cheaper(self) -> Space:
        budget = memory_budget()
        # The matrix, its shifted copy and the factor live at the same time; 8 bytes in the worst case.
        fits = {"dual": budget >= 24.0 * self.R**2, "primal": 24.0 * self.n**2 <= budget}
        if not any(fits.values()):
            names = ", ".join(block.name for block in self.blocks[:3])
            raise StepError(
                f"The metric of {names} needs a {min(self.R, self.n)} x {min(self.R, self.n)} matrix, over the "
                f"{budget / 1e9:.0f} GB this machine allows; use metric=Sampled(m=1), a smaller batch or "
                "partition='layerwise'."
            )
        usable = [space for space in ("dual", "primal") if fits[space]]
        return min(usable, key=self.flops)  # type: ignore[arg-type]

    # -- matrix ----------------------------------------------------------------------------------------

    @property
    def matrix(self) -> Tensor:
        """K (R x R) or H (n x n), formed at first use."""
        if self._matrix is None:
            self._matrix = self._gram() if self.space == "dual" else self._primal()
        return self._matrix

    def trace(self) -> Tensor:
        """Trace of U^T U, the same in both spaces."""
        return self.matrix.diagonal().sum()

    def _gram(self) -> Tensor:
        K = self.blocks[0].gram()
        for block in self.blocks[1:]:
            K += block.gram()
        return K

    def _primal(self) -> Tensor:
        if len(self.blocks) == 1:
            return self.blocks[0].primal()
        H: Tensor | None = None
        for t in range(len(self.blocks[0].sizes)):
            for U in self._stacked(t):
                H = U.T @ U if H is None else H.addmm_(U.T, U)
        assert H is not None
        return H

    def _stacked(self, t: int) -> Iterator[Tensor]:
        """Dense rows of all blocks in one term, some samples at a time."""
        present = [block.rows[t] for block in self.blocks if t in block.rows]
        r, N = present[0].r, present[0].N
        like = present[0].dense(0, 1)
        step = max(1, CHUNK_NUMBERS // (r * self.n))
        for start in range(0, N, step):
            stop = min(start + step, N)
            parts = [
                block.rows[t].dense(start, stop) if t in block.rows else like.new_zeros(r, stop - start, block.n)
                for block in self.blocks
            ]
            yield torch.cat(parts, 2).reshape(-1, self.n)

    def to_double(self) -> None:
        """Form the matrix in float64 from now on: its small eigenvalues have drowned in float32."""
        self.blocks = [block.to(torch.float64) for block in self.blocks]
        self._matrix = None

    # -- solve -----------------------------------------------------------------------------------------

    def factorise(self, mu: float) -> None:
        """Factorise matrix + mu I.

        Args:
            mu: damping, positive.
        """
        self._factor = factorise(self.matrix, mu)
        self.outcome = self._factor.outcome

    def direction(
        self, e0: Tensor, g: Sequence[Tensor], rest: Sequence[Tensor] | None, mu: float
    ) -> tuple[list[Tensor], Tensor]:
        r"""The minimiser of :math:`g \cdot d + \tfrac12 |U d|^2 + \tfrac{\mu}{2} |d|^2`, :math:`g = U^\top e_0 + h`.

        Dual: :math:`d = -U^\top w - h/\mu` with :math:`w = (\mu I + K)^{-1} (e_0 - U h / \mu)`, hence
        :math:`U d = \mu w - e_0` at no further cost (derived in docs/theory; h = 0 is theory 2's short form,
        :math:`e_0 = 0` its general form).

        Args:
            e0: R-space residual, shape (R,).
            g: gradient of every block, packed.
            rest: what of the gradient ``U^T e0`` does not explain, per block; None if nothing.
            mu: the damping of the last :meth:`factorise`.

        Returns:
            Packed directions per block, and ``U d`` of shape (R,).
        """
        assert self._factor is not None
        dtype, out = self.matrix.dtype, e0.dtype
        if self.space == "primal":
            joint = torch.cat(list(g)) if len(g) > 1 else g[0]
            flat = -self._factor.solve(joint.to(dtype))
            d = list(flat.split([block.n for block in self.blocks]))
            return [part.to(out) for part in d], self.matvec(d).to(out)
        rhs = e0 = e0.to(dtype)
        if rest is not None:
            rest = [h.to(dtype) for h in rest]
            rhs = e0 - self.matvec(rest) / mu
        w = self._factor.solve(rhs)
        d = [-block.rmatvec(w) for block in self.blocks]
        if rest is not None:
            d = [part - h / mu for part, h in zip(d, rest, strict=True)]
        return [part.to(out) for part in d], (mu * w - e0).to(out)

    def matvec(self, delta: Sequence[Tensor]) -> Tensor:
        """U delta, from packed vectors of the blocks to (R,)."""
        out = self.blocks[0].matvec(delta[0])
        for block, part in zip(self.blocks[1:], delta[1:], strict=True):
            out = out + block.matvec(part)
        return out
