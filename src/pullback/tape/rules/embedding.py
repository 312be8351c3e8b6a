"""nn.Embedding: a linear layer on one-hot inputs that are never formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.outer import OuterRows, held, joined
from pullback.tape.rules.sides import Sides


class EmbeddingRows(OuterRows):
    """Rows of a table look-up; ``index`` has shape (N, P), s shape (r, N, P, o)."""

    rule = "embedding"
    input_first = True

    def __init__(self, weight: nn.Parameter, index: Tensor, s: Tensor) -> None:
        super().__init__(weight, None, s)
        self.index = index

    def sides(self, keep: slice | None = None) -> Sides:
        """All samples: numbers of rows cost little. See the base class."""
        del keep
        assert self.weight is not None
        return Sides(self.weight, None, self.index[None], self.s[None], False, self.width)

    @property
    def width(self) -> int:
        """Rows of the table: the length of a one-hot input."""
        assert self.weight is not None
        return self.weight.shape[0]

    def inner(self, other: OuterRows, half: bool = False) -> Tensor:
        """One where the looked-up rows agree. See the base class."""
        del half
        assert isinstance(other, EmbeddingRows)
        same = self.index[:, :, None, None] == other.index[None, None]
        return same.to(self.s.dtype)

    def input_rows(self, start: int, stop: int | None) -> Tensor:
        """See the base class."""
        return torch.nn.functional.one_hot(self.index[start:stop], self.width).to(self.s.dtype)

    def push(self, weight: Tensor) -> Tensor:
        """See the base class."""
        return weight[self.index]

    def pull(self, c: Tensor) -> Tensor:
        """See the base class."""
        out = c.new_zeros(self.width, c.shape[2])
        return out.index_add_(0, self.index.reshape(-1), c.reshape(-1, c.shape[2])).reshape(-1)

    def _form(self, start: int, stop: int | None, o0: int, o1: int, bias: bool = True) -> Tensor:
        del bias  # a table has none
        s = self.s[:, start:stop, :, o0:o1]
        index = self.index[start:stop]
        r, N, P, o = s.shape
        U = s.new_zeros(r, N, self.width, o)
        U.scatter_add_(2, index[None, :, :, None].expand(r, N, P, o), s)
        return U.flatten(2)

    def _summed_flops(self) -> float:
        return float(self.R) ** 2 * self.n + float(self.R) * self.P * self.s.shape[3]

    def to(self, dtype: torch.dtype) -> EmbeddingRows:
        """See the base class."""
        assert self.weight is not None
        return EmbeddingRows(self.weight, self.index, self.s.to(dtype))


def embedding_rows(module: nn.Embedding, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> EmbeddingRows:
    """Rows of an embedding; several calls are further positions.

    Args:
        module: the layer.
        calls: its calls in one term.
        wanted: names of its parameters that take part.
        N: samples.
    """
    del wanted
    index = joined([call.input().reshape(N, -1) for call in calls], 1)
    s = joined([call.factor().reshape(call.r, N, -1, module.embedding_dim) for call in calls], 2)
    if module.padding_idx is not None:
        # The padding row takes no gradient.
        s = s * (index != module.padding_idx).to(s.dtype)[..., None]
    weight = held(module, "weight")
    assert weight is not None
    return EmbeddingRows(weight, index, s)
