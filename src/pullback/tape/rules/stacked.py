r"""Rows of one weight whose row blocks are linear layers of inputs of their own, such as queries, keys and values.

.. math:: W = \begin{pmatrix} W_1 \\ \vdots \\ W_G \end{pmatrix}, \qquad y_g = W_g x_g + b_g

so that columns are those of the blocks next to each other, all weights first and all biases behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.tape.rules.base import Rows
from pullback.tape.rules.beside import BesideRows
from pullback.tape.rules.linear import LinearRows
from pullback.tape.rules.sides import Sides


class StackedRows(BesideRows):
    """Linear layers on top of each other in one weight, of equally many rows and as wide.

    Args:
        weight: the weight, shape (G o, i).
        bias: the bias, shape (G o,), or None if it takes no part.
        blocks: rows of every block, top to bottom, of parameters in their own shapes.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, blocks: Sequence[LinearRows]) -> None:
        super().__init__(blocks, "linear")
        self.weight, self.bias, self.blocks = weight, bias, list(blocks)
        self.params = (weight,) if bias is None else (weight, bias)

    @classmethod
    def of(cls, weight: nn.Parameter, bias: nn.Parameter | None, given: Sequence[tuple[Tensor, Tensor]]) -> StackedRows:
        """From inputs (N, P, i) and factors (r, N, P, o) of every block."""
        pieces = weight.detach().chunk(len(given))
        shifts = [None] * len(given) if bias is None else list(bias.detach().chunk(len(given)))
        blocks = [
            LinearRows(_part(W), None if b is None else _part(b), x, s)
            for W, b, (x, s) in zip(pieces, shifts, given, strict=True)
        ]
        return cls(weight, bias, blocks)

    def parts(self) -> Sequence[Rows]:
        """One weight. See the base class."""
        return [self]

    def kept(self) -> slice:
        """As many as the most demanding block needs. See the base class."""
        return slice(None, None, min(block.kept().step or 1 for block in self.blocks))

    def sides(self, keep: slice | None = None) -> Sides | None:
        """A group per block, padded to as many positions. See the base class."""
        keep = keep or self.kept()
        lengths = tuple(block.P for block in self.blocks)
        x = torch.stack([F.pad(block.x[keep], (0, 0, 0, max(lengths) - block.P)) for block in self.blocks])
        s = torch.stack([F.pad(block.s[:, keep], (0, 0, 0, max(lengths) - block.P)) for block in self.blocks])
        if x.shape[1] < self.N:
            s = s * (self.N / x.shape[1]) ** 0.5
        same = len(set(lengths)) == 1
        return Sides(self.weight, self.bias, x, s, True, x.shape[3], None if same else lengths)

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return super().matvec(self._by_block(delta))

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self._by_kind(super().rmatvec(v))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return self._by_kind(super().dense(start, stop))

    def diagonal(self) -> Tensor:
        """See the base class."""
        return self._by_kind(super().diagonal())

    def cross(self, other: Rows) -> Tensor:
        """See the base class."""
        return super().cross(other) if isinstance(other, StackedRows) else Rows.cross(self, other)

    def to(self, dtype: torch.dtype) -> StackedRows:
        """See the base class."""
        return StackedRows(self.weight, self.bias, [block.to(dtype) for block in self.blocks])

    def _by_kind(self, packed: Tensor) -> Tensor:
        """From (W_1, b_1, W_2, ...) along the last axis to (W_1, W_2, ..., b_1, ...)."""
        if self.bias is None:
            return packed
        sizes = [n for block in self.blocks for n in (p.numel() for p in block.params)]
        pieces = packed.split(sizes, -1)
        return torch.cat([*pieces[::2], *pieces[1::2]], -1)

    def _by_block(self, packed: Tensor) -> Tensor:
        """The way back, for a vector."""
        if self.bias is None:
            return packed
        G = len(self.blocks)
        weights, shifts = packed[: self.weight.numel()].chunk(G), packed[self.weight.numel() :].chunk(G)
        return torch.cat([piece for pair in zip(weights, shifts, strict=True) for piece in pair])


def _part(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)
