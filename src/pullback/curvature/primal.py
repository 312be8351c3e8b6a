"""The primal: solve in parameter space, where the parameters are fewer than the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.factored import Factored
from pullback.curvature.solver import joined
from pullback.tape.rules.base import CHUNK_NUMBERS


class Primal(Factored):
    r"""Factorises :math:`\mu I + U^\top U`, n x n; the direction is :math:`d = -(\mu I + U^\top U)^{-1} g`."""

    name = "primal"

    @classmethod
    def flops(cls, blocks: Sequence[Block]) -> float:
        """See the base class."""
        n = sum(block.n for block in blocks)
        own = blocks[0].primal_flops() if len(blocks) == 1 else float(blocks[0].R) * n**2
        return own + n**3 / 3

    @classmethod
    def numbers(cls, blocks: Sequence[Block]) -> float:
        """The matrix, the factor, and what the factorisation copies. See the base class."""
        return 3.0 * sum(block.n for block in blocks) ** 2

    def form(self) -> Tensor:
        """U^T U. See the base class."""
        return self.blocks[0].primal() if len(self.blocks) == 1 else self._joint()

    def _joint(self) -> Tensor:
        H: Tensor | None = None
        for t in range(len(self.blocks[0].sizes)):
            for U in self._stacked(t):
                H = U.T @ U if H is None else H.addmm_(U.T, U)
        assert H is not None
        return H

    def _stacked(self, t: int) -> Iterator[Tensor]:
        """Dense rows of all blocks in one term, some samples at a time."""
        present = [block.rows[t] for block in self.blocks if t in block.rows]
        if not present:  # none of these blocks has part in that term
            return
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

    def direction(
        self, e0: Tensor, g: Sequence[Tensor], rest: Sequence[Tensor] | None, mu: float
    ) -> tuple[list[Tensor], Tensor]:
        """See the base class."""
        del rest, mu
        dtype = self.matrix.dtype
        d = self.split(-self.solve(joined(g).to(dtype)))
        return [part.to(e0.dtype) for part in d], self.matvec(d).to(e0.dtype)
