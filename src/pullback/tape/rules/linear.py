"""nn.Linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.outer import OuterRows, held, joined, positions
from pullback.tape.rules.square import square


class LinearRows(OuterRows):
    """Rows of ``y = W x + b`` applied at P positions; x has shape (N, P, i)."""

    rule = "linear"

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, x: Tensor, s: Tensor) -> None:
        super().__init__(weight, bias, s)
        self.x = x
        #: factor and input without the axis of positions, (R, o) and (N, i), where there is one position
        self.flat = (s.reshape(-1, s.shape[3]), x.reshape(-1, x.shape[2])) if self.P == 1 else None

    @property
    def width(self) -> int:
        """See the base class."""
        return self.x.shape[2]

    def inner(self, other: OuterRows, half: bool = False) -> Tensor:
        """See the base class."""
        assert isinstance(other, LinearRows)
        left = self.x.reshape(-1, self.width)
        if other is self:
            return square([left], None, half).view(self.N, self.P, self.N, self.P)
        right = other.x.reshape(-1, self.width)
        return (left @ right.T).view(self.N, self.P, other.N, other.P)

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """One column at one position and half a Gram: block by block, while it is in the cache. See the base class."""
        n, i, o = self.N, self.width, self.s.shape[3]
        if not half or self.flat is None or self.r > 1 or self.weight is None or n * n * (i + o) < 1 << 22:
            return super().gram_into(out, half)
        s, x = self.flat
        step = -(-n // 4)
        for k in range(0, n, step):
            block = out[: k + step, k : k + step]
            torch.mm(s[: k + step], s[k : k + step].T, out=block)
            inner = x[: k + step] @ x[k : k + step].T
            # (S S^T) o (X X^T + 1)
            if self.bias is None:
                block.mul_(inner)
            else:
                torch.addcmul(block, block, inner, out=block)
        return out

    def input_rows(self, start: int, stop: int | None) -> Tensor:
        """See the base class."""
        return self.x[start:stop]

    def push(self, weight: Tensor) -> Tensor:
        """See the base class."""
        return self.x @ weight.T

    def matvec(self, delta: Tensor) -> Tensor:
        """One position needs no third axis. See the base class."""
        if self.flat is None or self.weight is None:
            return super().matvec(delta)
        s, x = self.flat
        k = self.weight.numel()
        W = delta[:k].view(self.weight.shape)
        y = x @ W.T if self.bias is None else torch.addmm(delta[k:], x, W.T)
        if self.r > 1:
            s = s.view(self.r, self.N, -1)
        out: Tensor = torch.linalg.vecdot(s, y)
        return out.view(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """One position needs no third axis. See the base class."""
        if self.flat is None or self.weight is None:
            return super().rmatvec(v)
        s, x = self.flat
        if self.r == 1:
            c = s * v[:, None]
        else:
            c = torch.einsum("ano,an->no", s.view(self.r, self.N, -1), v.view(self.r, self.N))
        out = v.new_empty(self.n)
        k = self.weight.numel()
        torch.mm(c.T, x, out=out[:k].view(self.weight.shape))
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
