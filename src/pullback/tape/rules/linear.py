"""nn.Linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.outer import OuterRows, held, joined, positions


class LinearRows(OuterRows):
    """Rows of ``y = W x + b`` applied at P positions; x has shape (N, P, i)."""

    rule = "linear"

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, x: Tensor, s: Tensor) -> None:
        super().__init__(weight, bias, s)
        self.x = x

    @property
    def width(self) -> int:
        """See the base class."""
        return self.x.shape[2]

    def inner(self, other: OuterRows) -> Tensor:
        """See the base class."""
        assert isinstance(other, LinearRows)
        left = self.x.reshape(-1, self.width)
        right = left if other is self else other.x.reshape(-1, self.width)
        return (left @ right.T).view(self.N, self.P, other.N, other.P)

    def input_rows(self, start: int, stop: int | None) -> Tensor:
        """See the base class."""
        return self.x[start:stop]

    def push(self, weight: Tensor) -> Tensor:
        """See the base class."""
        return self.x @ weight.T

    def matvec(self, delta: Tensor) -> Tensor:
        """One position needs no third axis. See the base class."""
        if self.P > 1 or self.weight is None:
            return super().matvec(delta)
        k = self.weight.numel()
        W = delta[:k].view(self.weight.shape)
        x = self.x[:, 0]
        y = x @ W.T if self.bias is None else torch.addmm(delta[k:], x, W.T)
        return (self.s[:, :, 0] * y).sum(-1).reshape(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """One position needs no third axis. See the base class."""
        if self.P > 1 or self.weight is None:
            return super().rmatvec(v)
        s = self.s[:, :, 0]
        c = s[0] * v[:, None] if self.r == 1 else torch.einsum("ano,an->no", s, v.view(self.r, self.N))
        out = v.new_empty(self.n)
        k = self.weight.numel()
        torch.mm(c.T, self.x[:, 0], out=out[:k].view(self.weight.shape))
        if self.bias is not None:
            torch.sum(c, 0, out=out[k:])
        return out

    def pull(self, c: Tensor) -> Tensor:
        """See the base class."""
        return (c.reshape(-1, c.shape[2]).T @ self.x.reshape(-1, self.width)).reshape(-1)

    def to(self, dtype: torch.dtype) -> LinearRows:
        """See the base class."""
        return LinearRows(self.weight, self.bias, self.x.to(dtype), self.s.to(dtype))


def linear_rows(module: nn.Linear, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> LinearRows:
    """Rows of a linear layer; several calls are several positions.

    Args:
        module: the layer.
        calls: its calls in one term.
        wanted: names of its parameters that take part.
        N: samples.
    """
    x = joined([positions(call.input(), N, 0) for call in calls], 1)
    s = joined([positions(call.factor(), N, 1) for call in calls], 2)
    weight = held(module, "weight") if "weight" in wanted else None
    bias = held(module, "bias") if "bias" in wanted else None
    return LinearRows(weight, bias, x, s)
