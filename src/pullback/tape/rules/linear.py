"""nn.Linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.outer import OuterRows, held, joined, positions
from pullback.tape.rules.sides import Sides, kept
from pullback.tape.rules.square import square

#: Multiply-adds from which strips are worth their calls.
_STRIPS = 1 << 22


class LinearRows(OuterRows):
    """Rows of ``y = W x + b`` applied at P positions; x has shape (N, P, i)."""

    rule = "linear"

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, x: Tensor, s: Tensor) -> None:
        super().__init__(weight, bias, s)
        self.x = x
        #: factor and input without the axis of positions, (R, o) and (N, i), where there is one position
        self.flat = (s.reshape(-1, s.shape[3]), x.reshape(-1, x.shape[2])) if self.P == 1 else None

    def kept(self) -> slice:
        """See the base class."""
        return kept(self.N, self.P, max(self.width, self.s.shape[3]))

    def sides(self, keep: slice | None = None) -> Sides | None:
        """See the base class."""
        if self.weight is None:
            return None
        keep = keep or self.kept()
        x = self.x[keep]
        s = self.s[:, keep]
        if x.shape[0] < self.N:
            s = s * (self.N / x.shape[0]) ** 0.5
        return Sides(self.weight, self.bias, x[None], s[None], True, self.width)

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
        """One column at one position and half a Gram: strip by strip, while it is in the cache. See the base class."""
        n, i, o = self.N, self.width, self.s.shape[3]
        if not half or not self.stripped or n * n * (i + o) < _STRIPS:
            return super().gram_into(out, half)
        return self.gram_onto(None, out)

    @property
    def stripped(self) -> bool:
        """Whether :meth:`gram_onto` can be had: one column at one position."""
        return self.flat is not None and self.r == 1 and self.weight is not None

    def gram_onto(self, tail: Tensor | None, out: Tensor, scratch: Tensor | None = None) -> Tensor:
        r"""What is given and the Gram, :math:`T + (S S^\top) \circ (X X^\top + 1)`, on and above the diagonal.

        Args:
            tail: T, shape (R, R); None for zero.
            out: memory for the result, shape (R, R), none of the others.
            scratch: memory for :math:`X X^\top`, shape (R, R); fresh without.
        """
        assert self.flat is not None
        s, x = self.flat
        n = self.N
        if self.bias is not None:
            x = torch.cat([x, x.new_ones(n, 1)], 1)
        if n * n * (s.shape[1] + x.shape[1]) < _STRIPS:
            return _onto(tail, s, s, x, x, out, scratch)
        step = -(-n // 4)
        for k in range(0, n, step):
            strip = slice(k, k + step)
            above = None if tail is None else tail[strip, k:]
            _onto(above, s[strip], s[k:], x[strip], x[k:], out[strip, k:], scratch)
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


def _onto(
    tail: Tensor | None, s: Tensor, t: Tensor, x: Tensor, y: Tensor, out: Tensor, scratch: Tensor | None
) -> Tensor:
    r"""One strip, :math:`T + (S T^\top) \circ (X Y^\top)`: with T in one pass over the elements instead of two."""
    if scratch is None:
        inner = x.new_empty(out.shape)
    else:
        inner = scratch if scratch.shape == out.shape else scratch.view(-1)[: out.numel()].view(out.shape)
    torch.mm(s, t.T, out=out)
    torch.mm(x, y.T, out=inner)
    return out.mul_(inner) if tail is None else torch.addcmul(tail, out, inner, out=out)


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
