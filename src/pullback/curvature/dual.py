"""The dual: solve in the R-space by Woodbury (theory 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.curvature.factored import Factored
from pullback.curvature.scalars import cast


class Dual(Factored):
    r"""Factorises :math:`\mu I + K`, :math:`K = \sum_l U_l U_l^\top`, R x R.

    With :math:`w = (\mu I + K)^{-1} (e_0 - U h / \mu)` the direction is :math:`d = -U^\top w - h / \mu` and
    :math:`U d = \mu w - e_0` at no further cost (derived in docs/theory; h = 0 is theory 2's short form,
    :math:`e_0 = 0` its general form).
    """

    name = "dual"

    @classmethod
    def flops(cls, blocks: Sequence[Block]) -> float:
        """See the base class."""
        return sum(block.gram_flops() for block in blocks) + blocks[0].R ** 3 / 3

    @classmethod
    def numbers(cls, blocks: Sequence[Block]) -> float:
        """The Gram, the factor, what the factorisation copies, and one block's share. See the base class."""
        return (3.0 + (len(blocks) > 1)) * blocks[0].R ** 2

    def form(self) -> Tensor:
        """K on and above the diagonal. See the base class."""
        like = torch.empty(0, dtype=self.dtype, device=self.blocks[0].params[0].device)
        K = self.blocks[0].gram(self.workspace.square(("gram", self.slot), self.R, like), half=True)
        for block in self.blocks[1:]:
            K += block.gram(self.workspace.square("part", self.R, like), half=True)
        return K

    def direction(
        self, e0: Tensor, g: Sequence[Tensor], rest: Sequence[Tensor] | None, mu: float
    ) -> tuple[list[Tensor], Tensor]:
        """See the base class."""
        dtype, out = self.matrix.dtype, e0.dtype
        rhs = e0 = cast(e0, dtype)
        if rest is not None:
            rest = [cast(h, dtype) for h in rest]
            rhs = torch.sub(e0, self.matvec(rest), alpha=1 / mu)
        w = self.solve(rhs)
        d = self.rmatvec(-w)
        if rest is not None:
            d = [part.sub_(h, alpha=1 / mu) for part, h in zip(d, rest, strict=True)]
        return [cast(part, out) for part in d], cast(mu * w - e0, out)
