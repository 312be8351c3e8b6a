r"""Rows of every module whose output is linear in its weight: sums of outer products over positions.

.. math:: U_{(a,n)} = \sum_p s_{anp} \otimes \tilde x_{np}

with :math:`\tilde x` the input, extended by 1 where there is a bias. One position gives the formulas of
theory 2, which never form U. Several positions (sequences, convolutions, repeated calls) are either
contracted pairwise or summed into rows chunk by chunk, whichever takes fewer operations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pullback.tape.rules.base import CHUNK_NUMBERS, Rows
from pullback.tape.rules.square import square

#: What multiplying and summing one pair of positions costs, in multiply-adds of a matrix product (measured).
ELEMENT = 32


class OuterRows(Rows):
    """Rows built from factor rows at the output and something at the input.

    Args:
        weight: the weight parameter, or None if it takes no part.
        bias: the bias parameter, or None.
        s: factor at the module's output, shape (r, N, P, o).

    Attributes:
        P: positions per sample.
    """

    #: whether the weight is stored inputs first, (i, o), as a table is
    input_first: bool = False

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, s: Tensor) -> None:
        super().__init__([p for p in (weight, bias) if p is not None], s.shape[0], s.shape[1])
        self.weight = weight
        self.bias = bias
        self.s = s
        self.P = s.shape[2]

    @abstractmethod
    def inner(self, other: OuterRows, half: bool = False) -> Tensor:
        """Inner products of the inputs (without the bias), shape (N, P, N', P').

        Args:
            other: the rows they are taken with.
            half: whether those below the diagonal may be left out.
        """

    @abstractmethod
    def input_rows(self, start: int, stop: int | None) -> Tensor:
        """Inputs of some samples as vectors, shape (samples, P, i)."""

    @abstractmethod
    def push(self, weight: Tensor) -> Tensor:
        """Change of the output by a change of the weight, shape (N, P, o)."""

    @abstractmethod
    def pull(self, c: Tensor) -> Tensor:
        """Gradient of <c, output> with respect to the weight, c of shape (N, P, o); flattened."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Length i of an input vector."""

    # -- the four products ---------------------------------------------------------------------------

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        pieces = self.split(delta)
        change: Tensor | None = self.push(pieces[0]) if self.weight is not None else None
        if self.bias is not None:
            change = pieces[-1] if change is None else change + pieces[-1]
        assert change is not None
        if self.r == 1:
            return (self.s[0] * change).sum((-2, -1))
        return (self.s * change).sum((-2, -1)).reshape(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        v = v.view(self.r, self.N, 1, 1)
        c = self.s[0] * v[0]
        for a in range(1, self.r):
            # Column by column: a product of all of them at once would be as large as the factor.
            c.addcmul_(self.s[a], v[a])
        pieces = []
        if self.weight is not None:
            pieces.append(self.pull(c))
        if self.bias is not None:
            pieces.append(c.sum((0, 1)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gram(self) -> Tensor:
        """See the base class."""
        return self.gram_into(self.s.new_empty(self.R, self.R))

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        if self._pairwise_flops() <= self._summed_flops():
            return self._pairwise(self, out, half)
        return self._summed(out, half)

    def cross(self, other: Rows) -> Tensor:
        """See the base class."""
        if type(other) is type(self) and isinstance(other, OuterRows) and self.P * other.P <= 16:
            return self._pairwise(other)
        return super().cross(other)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return self._form(start, stop, 0, self.s.shape[3])

    def primal(self) -> Tensor:
        """See the base class; with several columns they are contracted per sample first (r times cheaper)."""
        if not self._structured:
            return super().primal()
        o, i = self.s.shape[3], self.width
        s, x = self.s[:, :, 0], self.input_rows(0, None)[:, 0]
        metric = torch.einsum("ano,anq->noq", s, s)
        out = s.new_empty(self.n, self.n)
        step = max(1, CHUNK_NUMBERS // (o * o + i * i))
        ww = s.new_zeros(o * o, i * i)
        for k in range(0, self.N, step):
            xs = x[k : k + step]
            moments = (xs[:, :, None] * xs[:, None, :]).reshape(-1, i * i)
            ww.addmm_(metric[k : k + step].reshape(-1, o * o).T, moments)
        out[: o * i, : o * i].view(o, i, o, i).copy_(ww.view(o, o, i, i).transpose(1, 2))
        if self.bias is not None:
            wb = (metric.reshape(-1, o * o).T @ x).view(o, o, i).transpose(1, 2)
            out[: o * i, o * i :].view(o, i, o).copy_(wb)
            out[o * i :, : o * i].view(o, o, i).copy_(wb.permute(2, 0, 1))
            out[o * i :, o * i :] = metric.sum(0)
        return out

    def diagonal(self) -> Tensor:
        """With one position the squares factorise. See the base class."""
        if self.P > 1 or self.input_first:
            return super().diagonal()
        s2 = self.s[:, :, 0].square().sum(0)
        pieces = []
        if self.weight is not None:
            pieces.append((s2.T @ self.input_rows(0, None)[:, 0].square()).reshape(-1))
        if self.bias is not None:
            pieces.append(s2.sum(0))
        return joined(pieces, 0)

    def matvec_flops(self) -> float:
        """See the base class."""
        return float(self.N * self.P) * self.n + float(self.R * self.P) * self.s.shape[3]

    # -- costs ----------------------------------------------------------------------------------------

    def gram_flops(self) -> float:
        """See the base class."""
        return min(self._pairwise_flops(), self._summed_flops())

    def primal_flops(self) -> float:
        """See the base class."""
        return float(self.N if self._structured else self.R) * self.n**2

    @property
    def _structured(self) -> bool:
        """Whether the primal comes cheaper from the columns contracted per sample."""
        return self.P == 1 and self.r > 1 and self.weight is not None and not self.input_first

    def _pairwise_flops(self) -> float:
        o = self.s.shape[3]
        elementwise = 2 if self.P == 1 else ELEMENT
        return float(self.R * self.P) ** 2 * (o + elementwise) + float(self.N * self.P) ** 2 * self.width

    def _summed_flops(self) -> float:
        return float(self.R) ** 2 * self.n + float(self.R) * self.P * self.n

    # -- the two ways to a Gram -------------------------------------------------------------------------

    def _pairwise(self, other: OuterRows, out: Tensor | None = None, half: bool = False) -> Tensor:
        """K from inner products of inputs and of factors."""
        if self.weight is None:
            return pairwise(self.s, other.s, self.s.new_ones(self.N, self.P, other.N, other.P), out, half=half)
        inner = self.inner(other, half and self.R == self.N and self.P == 1)
        return pairwise(self.s, other.s, inner, out, self.bias is not None, half)

    def _summed(self, out: Tensor, half: bool = False) -> Tensor:
        """K = U U^T from explicit rows, a slice of output numbers at a time."""
        return square(self._slabs(), out, half)

    def _slabs(self) -> Iterator[Tensor]:
        """U without the order of its columns, a slice of output numbers at a time, (R, columns)."""
        o = self.s.shape[3]
        step = max(1, CHUNK_NUMBERS // (self.R * (self.width + 1)))
        # With several positions weight and bias stand apart: a batched product is quick where its result has no gaps.
        apart = self.P > 1 and self.weight is not None and self.bias is not None
        for k in range(0, o, step):
            yield self._form(0, None, k, min(k + step, o), not apart).view(self.R, -1)
        if apart:
            yield self.s.sum(2).view(self.R, -1)

    def _form(self, start: int, stop: int | None, o0: int, o1: int, bias: bool = True) -> Tensor:
        """Rows of samples start:stop restricted to output numbers o0:o1, shape (r, samples, columns)."""
        s = self.s[:, start:stop, :, o0:o1]
        r, N, _, o = s.shape
        bias = bias and self.bias is not None
        width = 0 if self.weight is None else self.width
        U = s.new_empty(r, N, o * (width + bias))
        if self.weight is not None:
            x = self.input_rows(start, stop)
            for a in range(r):
                # A column at a time, straight into its place: no copies of x, none of the result.
                rows = U[a, :, : o * width].unflatten(1, (o, width))
                if self.P == 1:
                    torch.mul(s[a, :, 0, :, None], x[:, 0, None], out=rows)
                else:
                    torch.bmm(s[a].mT, x, out=rows)
        if bias:
            torch.sum(s, 2, out=U[:, :, o * width :])
        return U


def pairwise(
    s: Tensor, t: Tensor, inner: Tensor, out: Tensor | None = None, bias: bool = False, half: bool = False
) -> Tensor:
    r"""Sum over pairs of positions :math:`\sum_{pq} (s_{anp} \cdot t_{bmq})\, x_{npmq}`.

    Args:
        s: vectors, shape (r, N, P, o).
        t: vectors, shape (r', N', P', o); the same object as ``s`` for a Gram.
        inner: the weights x, shape (N, P, N', P').
        out: memory for the result; a fresh tensor without.
        bias: whether 1 is added to every weight; the weights may be overwritten.
        half: whether nobody reads below the diagonal of a Gram.

    Returns:
        Shape (r N, r' N').
    """
    (r, N, P, o), (r2, N2, P2, _) = s.shape, t.shape
    K = s.new_empty(r * N, r2 * N2) if out is None else out
    if P == P2 == 1:
        left = s.reshape(-1, o)
        if s is t:
            square([left], K, half)
        else:
            torch.mm(left, t.reshape(-1, o).T, out=K)
        if r == r2 == 1:
            x = inner.view(N, N2)
            # One pass over K instead of one over each.
            return torch.addcmul(K, K, x, out=K) if bias else K.mul_(x)
        if bias:
            inner = inner.add_(1.0)
        K.view(r, N, r2, N2).mul_(inner[:, 0, :, 0][:, None, :])
        return K
    if bias:
        inner = inner.add_(1.0)
    # Positions of t lead its columns, so that they are summed over contiguous runs.
    right = t.permute(2, 0, 1, 3).reshape(-1, o).T
    weights = inner.transpose(2, 3).contiguous()
    rows = K.zero_().view(r, N, r2 * N2)
    # Small pieces stay in the cache.
    step = max(1, (CHUNK_NUMBERS >> 4) // (r * P2 * r2 * N2))
    for k in range(0, N, step):
        for p in range(P):
            part = (s[:, k : k + step, p].reshape(-1, o) @ right).view(r, -1, P2, r2, N2)
            part.mul_(weights[k : k + step, p, :, None])
            rows[:, k : k + step] += part.sum(2).flatten(2)
    return K


def held(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter that the module holds itself, None if there is none of that name."""
    return module._parameters.get(name)


def positions(t: Tensor, N: int, lead: int, last: int = 1) -> Tensor:
    """Fold everything between the samples and the last axis into one axis of positions.

    Args:
        t: shape (*lead axes, N * P0, ..., *last axes).
        N: samples.
        lead: axes before the batch axis (1 for a factor, 0 for an input).
        last: axes kept at the end.
    """
    tail = t.shape[t.ndim - last :]
    return t.reshape(*t.shape[:lead], N, -1, *tail)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate the positions of several calls."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
