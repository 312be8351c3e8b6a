r"""Convolutions over one to three axes, with groups, forwards and transposed.

A convolution is a linear layer on windows: with s the factor at output position p and x the window there,

.. math:: U_{(a,n)} = \sum_p s_{anp} \otimes x_{np} \quad\text{in every group of channels.}

A transposed convolution is the adjoint of a convolution, :math:`\langle s, W^* x\rangle = \langle W s, x\rangle`:
its rows are those of that convolution with the roles of input and factor exchanged, windows of s against x.
Products with vectors are the convolutions themselves; windows are cut only for Grams and rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor
from pullback.tape.rules.base import CHUNK_NUMBERS, DenseRows, Rows
from pullback.tape.rules.geometry import Conv, Geometry
from pullback.tape.rules.outer import ELEMENT, held, joined, pairwise
from pullback.tape.rules.sides import Sides, kept
from pullback.tape.rules.square import square


class ConvRows(Rows):
    """Rows of a convolution; further calls are further positions.

    Args:
        geometry: how the window moves.
        shape: shape of the weight.
        weight: the weight parameter, or None if it takes no part.
        bias: the bias parameter, or None.
        x: inputs per call, shape (N, channels, *axes).
        s: factors per call, shape (r, N, output channels, *axes).
    """

    def __init__(
        self,
        geometry: Geometry,
        shape: torch.Size,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        x: Sequence[Tensor],
        s: Sequence[Tensor],
    ) -> None:
        super().__init__([p for p in (weight, bias) if p is not None], s[0].shape[0], s[0].shape[1])
        self.geometry = geometry
        self.shape = shape
        self.weight = weight
        self.bias = bias
        self.x = list(x)
        self.s = list(s)
        self.rule = f"conv{' transposed' * geometry.transposed} {len(geometry.kernel)}d"

    # -- sizes: rows of group g are (left, g) x (right, g), left leading in the weight's layout ------------

    @property
    def P(self) -> int:
        """Positions per sample, over all calls."""
        images = self.x if self.geometry.transposed else self.s
        return sum(math.prod(t.shape[-len(self.geometry.kernel) :]) for t in images)

    @property
    def left(self) -> int:
        """Channels of one group on the side without windows."""
        return self.shape[0] // self.geometry.groups

    @property
    def right(self) -> int:
        """Numbers in one window of one group."""
        return math.prod(self.shape[1:])

    @property
    def axes(self) -> int:
        """Axes the window moves along."""
        return len(self.geometry.kernel)

    # -- products with vectors -----------------------------------------------------------------------------

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        pieces = self.split(delta)
        out = delta.new_zeros(self.r, self.N)
        for x, s in zip(self.x, self.s, strict=True):
            change = delta.new_zeros(())
            if self.weight is not None:
                change = self.geometry.push(x, pieces[0], s.shape[3:])
            if self.bias is not None:
                change = change + pieces[-1].view(-1, *(1,) * self.axes)
            for a in range(self.r):
                out[a] += (s[a] * change).flatten(1).sum(1)
        return out.view(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        v = v.view(self.r, self.N, *(1,) * (1 + self.axes))
        weight: Tensor | None = None
        bias: Tensor | None = None
        for x, s in zip(self.x, self.s, strict=True):
            # Column by column: a product of all of them at once would be as large as the factor.
            c = s[0] * v[0]
            for a in range(1, self.r):
                c.addcmul_(s[a], v[a])
            if self.weight is not None:
                part = self.geometry.pull(x, c, v.new_empty(self.shape)).reshape(-1)
                weight = part if weight is None else weight.add_(part)
            if self.bias is not None:
                part = c.flatten(2).sum((0, 2))
                bias = part if bias is None else bias.add_(part)
        return joined([t for t in (weight, bias) if t is not None], 0)

    # -- rows ------------------------------------------------------------------------------------------------

    def _pairs(self, start: int, stop: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For every column the two sides (n, groups, left, P) and (n, groups, right, P), all calls joined."""
        g, calls = self.geometry, list(zip(self.x, self.s, strict=True))
        if not g.transposed:
            windows = joined([g.patches(x[start:stop], s.shape[3:]) for x, s in calls], 3)
            for a in range(self.r):
                yield joined([_grouped(s[a, start:stop], g.groups) for s in self.s], 3), windows
            return
        inputs = joined([_grouped(x[start:stop], g.groups) for x in self.x], 3)
        for a in range(self.r):
            yield inputs, joined([g.patches(s[a, start:stop], x.shape[2:]) for x, s in calls], 3)

    def _form(self, out: Tensor, start: int, m0: int, m1: int) -> None:
        """Fill weight columns m0:m1 of every group, out (r, n, groups, m1 - m0, right), from sample start on."""
        n, groups = out.shape[1:3]
        step = max(1, CHUNK_NUMBERS // (groups * self.right * self.P))
        for k in range(0, n, step):
            pairs = self._pairs(start + k, start + min(k + step, n))
            for block, (left, right) in zip(out[:, k : k + step], pairs, strict=True):
                a = left[:, :, m0:m1].flatten(0, 1)
                torch.bmm(a, right.flatten(0, 1).transpose(1, 2), out=block.flatten(0, 1))

    def _bias_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Factor summed over positions, shape (r, n, output channels)."""
        parts = [s[:, start:stop].flatten(3).sum(3) for s in self.s]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        stop = self.N if stop is None else min(stop, self.N)
        pieces = []
        if self.weight is not None:
            U = self.s[0].new_empty(self.r, stop - start, self.geometry.groups, self.left, self.right)
            self._form(U, start, 0, self.left)
            pieces.append(U.flatten(2))
        if self.bias is not None:
            pieces.append(self._bias_rows(start, stop))
        return joined(pieces, 2)

    # -- Grams -----------------------------------------------------------------------------------------------

    def gram(self) -> Tensor:
        """See the base class."""
        return self.gram_into(self.s[0].new_empty(self.R, self.R))

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        if self._pairwise_flops() > self._summed_flops():
            return square(self._slabs(), out, half)
        K = self._pairwise(self, out)
        if self.bias is not None:
            K += square([self._bias_rows().flatten(0, 1)])
        return K

    def cross(self, other: Rows) -> Tensor:
        """See the base class."""
        if not isinstance(other, ConvRows) or self.weight is None or self.P * other.P > 16:
            return super().cross(other)
        K = self._pairwise(other)
        if self.bias is not None:
            K += self._bias_rows().flatten(0, 1) @ other._bias_rows().flatten(0, 1).T
        return K

    def _slabs(self) -> Iterator[Tensor]:
        """U a few columns of every group at a time, (R, columns)."""
        groups = self.geometry.groups
        step = max(1, CHUNK_NUMBERS // (self.R * groups * self.right))
        for m0 in range(0, self.left if self.weight is not None else 0, step):
            m1 = min(m0 + step, self.left)
            U = self.s[0].new_empty(self.r, self.N, groups, m1 - m0, self.right)
            self._form(U, 0, m0, m1)
            yield U.view(self.R, -1)
        if self.bias is not None:
            yield self._bias_rows().flatten(0, 1)

    def _sides(self) -> tuple[Tensor, Tensor]:
        """The side that carries the columns (r, N, P, groups, .) and the other one (N, P, groups, .)."""
        pairs = list(self._pairs(0, None))
        which = 1 if self.geometry.transposed else 0
        wide = torch.stack([pair[which] for pair in pairs])
        return wide.permute(0, 1, 4, 2, 3), pairs[0][1 - which].permute(0, 3, 1, 2)

    def _pairwise(self, other: ConvRows, out: Tensor | None = None) -> Tensor:
        """K without the bias: a sum over groups and pairs of positions of products of inner products."""
        s, x = self._sides()
        t, y = (s, x) if other is self else other._sides()
        K: Tensor | None = None
        for g in range(self.geometry.groups):
            a, b = x[:, :, g].reshape(-1, x.shape[3]), y[:, :, g].reshape(-1, y.shape[3])
            inner = (a @ b.T).view(*x.shape[:2], *y.shape[:2])
            u = s[:, :, :, g]
            part = pairwise(u, u if other is self else t[:, :, :, g], inner, out if K is None else None)
            K = part if K is None else K.add_(part)
        assert K is not None
        return K

    def kept(self) -> slice:
        """See the base class."""
        return kept(self.N, self.P, max(self.left, self.right))

    def sides(self, keep: slice | None = None) -> Sides | None:
        """See the base class."""
        if self.weight is None or (self.geometry.transposed and self.bias is not None):
            return None  # the bias of a transposed convolution is not on the side of its factor's windows
        keep = keep or self.kept()
        some = ConvRows(
            self.geometry, self.shape, self.weight, self.bias, [x[keep] for x in self.x], [s[:, keep] for s in self.s]
        )
        s, x = some._sides()
        factor, given = s.permute(3, 0, 1, 2, 4), x.permute(2, 0, 1, 3)
        if some.N < self.N:
            factor = factor * (self.N / some.N) ** 0.5
        left = not self.geometry.transposed
        return Sides(self.weight, self.bias, given, factor, left, given.shape[3])

    def parts(self) -> Sequence[Rows]:
        """Weight and bias of a transposed convolution apart. See the base class."""
        if not self.geometry.transposed or self.weight is None or self.bias is None:
            return [self]
        weight = ConvRows(self.geometry, self.shape, self.weight, None, self.x, self.s)
        return [weight, DenseRows([self.bias], self._bias_rows(), self.rule)]

    # -- costs -----------------------------------------------------------------------------------------------

    def gram_flops(self) -> float:
        """See the base class."""
        return min(self._pairwise_flops(), self._summed_flops())

    def matvec_flops(self) -> float:
        """See the base class."""
        return float(self.N * self.P) * self.n + float(sum(s.numel() for s in self.s))

    def _pairwise_flops(self) -> float:
        if self.weight is None:
            return math.inf
        wide, narrow = (self.right, self.left) if self.geometry.transposed else (self.left, self.right)
        elementwise = 2 if self.P == 1 else ELEMENT
        pairs = float(self.R * self.P) ** 2 * (wide + elementwise) + float(self.N * self.P) ** 2 * narrow
        return self.geometry.groups * pairs

    def _summed_flops(self) -> float:
        return float(self.R) ** 2 * self.n + float(self.R) * self.P * self.n

    def to(self, dtype: torch.dtype) -> ConvRows:
        """See the base class."""
        x, s = [t.to(dtype) for t in self.x], [t.to(dtype) for t in self.s]
        return ConvRows(self.geometry, self.shape, self.weight, self.bias, x, s)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """Images (n, c, *axes) as (n, groups, c / groups, positions)."""
    return t.reshape(t.shape[0], groups, t.shape[1] // groups, -1)


def conv_rows(module: Conv, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> ConvRows:
    """Rows of a convolution; several calls, also on images of several sizes, are further positions.

    Args:
        module: the layer.
        calls: its calls in one term, each with a batch of N images.
        wanted: names of its parameters that take part.
        N: samples.
    """
    geometry = Geometry.of(module)
    x, s = [call.input() for call in calls], [call.factor() for call in calls]
    lead = len(geometry.kernel) + 1
    # One image without a batch axis: the module takes that too.
    x = [t if t.ndim > lead else t[None] for t in x]
    s = [t if t.ndim > lead + 1 else t[:, None] for t in s]
    assert all(t.shape[0] == N for t in x)
    weight = held(module, "weight") if "weight" in wanted else None
    bias = held(module, "bias") if "bias" in wanted else None
    return ConvRows(geometry, module.weight.shape, weight, bias, x, s)
