r"""The two sides of rows that are sums of outer products: what Kronecker factors are the moments of.

.. math:: U_{(a,n)} = \sum_p \ell_{anp} \otimes r_{anp}

In the weight's own layout one side leads (``left``) and one follows (``right``); one of them is the factor that was
pulled back, the other what the layer was given. Only rules whose rows have this form have sides.

Positions may be nodes of a quadrature in time, rows :math:`\int \ell(t) \otimes r(t)\,dt`. Time points next to each
other are no independent samples, so their moments are :math:`\int r r^\top dt` and :math:`\int \ell \ell^\top dt`
(theory 7; what adds up over positions taken for samples would fall with their number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Samples that are read at least, and positions per number in a vector, where not all are needed for a moment.
SAMPLES, POSITIONS = 16, 8
#: Entries that count for it: of longer vectors only the leading directions are wanted.
ENTRIES = 512


@dataclass(frozen=True)
class Sides:
    """Both sides of a weight's rows, in G groups.

    Attributes:
        weight: the parameter, its numbers in the order (G, left, right).
        bias: the parameter that goes with the factor's side, as if the other side had one more entry of 1; or None.
        given: what the layer was given, shape (G, N, P, d); or rows of a table by number, integers of shape (1, N, P).
        factor: the factor, shape (G, r, N, P, d'), already times the root of what part of the samples was kept.
        factor_left: whether the factor is the left side.
        entries: d, entries of a given vector.
        lengths: how many of the P positions each group has, where they differ; those behind are zeros. None for all.
        times: weight of every position's node in a quadrature in time, shape (P,); None where positions just add up.
        nodes: number of these nodes.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    given: Tensor
    factor: Tensor
    factor_left: bool
    entries: int
    lengths: tuple[int, ...] | None = None
    times: Tensor | None = None
    nodes: int = 1

    @property
    def table(self) -> bool:
        """Whether given vectors are one-hot, and held as numbers."""
        return not self.given.is_floating_point()

    def given_vectors(self) -> Tensor:
        """Given vectors with the 1 of the bias, shape (G, N, P, d or d + 1)."""
        x = self.given
        if self.table:
            return nn.functional.one_hot(x, self.entries).to(self.factor.dtype)
        if self.bias is None:
            return x
        ones = x.new_ones(*x.shape[:3], 1)
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths, device=x.device)
            ones *= torch.arange(x.shape[2], device=x.device)[:, None] < lengths[:, None, None, None]
        return torch.cat([x, ones], 3)

    def spread_given(self) -> Tensor:
        """Given vectors whose mean square over positions is their moment, shape (G, N, P, d or d + 1)."""
        x = self.given_vectors()
        return x if self.times is None else x * (self.times * self.nodes).sqrt()[:, None]

    def spread_factor(self) -> Tensor:
        """Factors whose squares, summed over positions, are their moment, shape (G, r, N, P, d')."""
        return self.factor if self.times is None else self.factor * self.times.sqrt()[:, None]

    def summed_factor(self) -> Tensor:
        """Factors summed over positions (integrated over time), shape (G, r, N, d')."""
        return self.factor.sum(3) if self.times is None else (self.factor * self.times[:, None]).sum(3)

    def averaged_vectors(self) -> Tensor:
        """Their mean over positions, shape (G, N, d or d + 1)."""
        x = self.given_vectors()
        if self.times is not None:
            return (x * self.times[:, None]).sum(2) / self.times.sum()
        return x.mean(2) if self.lengths is None else x.sum(2) / self.counted

    @property
    def counted(self) -> int | Tensor:
        """Positions of a sample that count: P, or shape (G, 1, 1) where groups differ."""
        if self.lengths is None:
            return int(self.given.shape[2])
        return torch.tensor(self.lengths, dtype=self.given.dtype, device=self.given.device)[:, None, None]

    def rows(self) -> Tensor:
        """Rows in the layout of the weight with its bias, shape (r, N, G, left, right); formed one by one."""
        x, s = self.given_vectors(), self.factor
        if self.times is not None:
            s = s * self.times[:, None]
        if self.factor_left:
            return torch.einsum("ganpo,gnpi->angoi", s, x)
        return torch.einsum("gnpi,ganpo->angio", x, s)


def kept(samples: int, positions: int, entries: int) -> slice:
    """Which samples to read for the moment of vectors with so many entries: evenly spaced, or all.

    Args:
        samples: how many there are.
        positions: positions of each.
        entries: entries of a vector.
    """
    wanted = max(SAMPLES, math.ceil(POSITIONS * min(entries, ENTRIES) / positions))
    return slice(None, None, max(1, samples // wanted))
