"""U of one module in one term: what a rule must supply, and the dense form everything can fall back to.

Index convention: ``a`` factor column, ``n`` sample, ``p`` position inside a sample (time step, pixel, call),
``o`` output number of the module, ``i`` input number. A row of U is a pair (a, n); R = r N of them, columns
first. A parameter vector is packed as the concatenation of the flattened parameters, in the order of
``params``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pullback.tape.rules.sides import Sides
from pullback.tape.rules.square import square

#: Numbers that a temporary of a rule may hold; larger ones are worked through in chunks.
CHUNK_NUMBERS = 1 << 24


class Rows(ABC):
    r"""The rows :math:`U_{(a,n)} = \partial_w \langle s_{an}, f(x_n, w)\rangle` of one module in one term.

    Attributes:
        params: the parameters the columns belong to, in packing order.
        r: factor columns.
        N: samples.
        R: number of rows, r N.
        n: number of columns, the parameters.
    """

    #: name of the rule, for the coverage report
    rule: str = "?"

    def __init__(self, params: Sequence[nn.Parameter], r: int, N: int) -> None:
        self.params = tuple(params)
        self.r = r
        self.N = N
        self.R = r * N
        self.n = sum(p.numel() for p in self.params)

    def sides(self, keep: slice | None = None) -> Sides | None:
        """The two sides of the rows of its weight (and bias), if they are sums of outer products.

        Args:
            keep: which samples to read, where those of several modules are compared; None for :meth:`kept`.
        """
        del keep
        return None

    def kept(self) -> slice:
        """Which samples the moments of its sides need."""
        return slice(None)

    def parts(self) -> Sequence[Rows]:
        """Rows of independent sets of parameters, if they can be told apart; else the rows themselves."""
        return [self]

    @abstractmethod
    def gram(self) -> Tensor:
        """U U^T, shape (R, R), a fresh tensor."""

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """U U^T, in ``out`` (shape (R, R)) where the rule can write there; returns where it is.

        Args:
            out: the memory.
            half: whether nobody reads below the diagonal, so that nothing need be written there.
        """
        del out, half
        return self.gram()

    @abstractmethod
    def matvec(self, delta: Tensor) -> Tensor:
        """U delta, from packed (n,) to (R,)."""

    @abstractmethod
    def rmatvec(self, v: Tensor) -> Tensor:
        """U^T v, from (R,) to packed (n,)."""

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows of samples ``start:stop``, shape (r, samples, n)."""

    @abstractmethod
    def gram_flops(self) -> float:
        """Multiply-adds of :meth:`gram`."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Rows:
        """The same rows in another precision."""

    def primal(self) -> Tensor:
        """U^T U, shape (n, n), a fresh tensor."""
        return square(U.reshape(-1, self.n).T for U in self.chunks())

    def primal_flops(self) -> float:
        """Multiply-adds of :meth:`primal`."""
        return float(self.R) * self.n**2

    def diagonal(self) -> Tensor:
        """Diagonal of U^T U, shape (n,)."""
        out: Tensor | None = None
        for U in self.chunks():
            part = U.square().sum((0, 1))
            out = part if out is None else out + part
        assert out is not None
        return out

    def matvec_flops(self) -> float:
        """Multiply-adds of a product with U or U^T, roughly."""
        return float(self.R) * self.n

    def cross(self, other: Rows) -> Tensor:
        """U U'^T with the rows of another term for the same parameters, shape (R, R')."""
        return self.dense().reshape(-1, self.n) @ other.dense().reshape(-1, other.n).T

    def chunks(self) -> Iterator[Tensor]:
        """Dense rows, some samples at a time, each piece within the chunk size."""
        step = max(1, CHUNK_NUMBERS // max(1, self.r * self.n))
        for start in range(0, self.N, step):
            yield self.dense(start, min(start + step, self.N))

    def split(self, packed: Tensor) -> list[Tensor]:
        """Views of a packed vector in the parameters' shapes."""
        pieces = packed.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]


class DenseRows(Rows):
    """Rows held as one array, for parameters that are few or wired in no particular way.

    Args:
        params: as in :class:`Rows`.
        U: shape (r, N, n).
        rule: name for the coverage report.
    """

    def __init__(self, params: Sequence[nn.Parameter], U: Tensor, rule: str) -> None:
        super().__init__(params, U.shape[0], U.shape[1])
        self.U = U
        self.rule = rule

    def gram(self) -> Tensor:
        """See the base class."""
        return square([self.U.reshape(-1, self.n)])

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        return square([self.U.reshape(-1, self.n)], out, half)

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return self.U.reshape(-1, self.n) @ delta

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.U.reshape(-1, self.n).T @ v

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return self.U[:, start:stop]

    def gram_flops(self) -> float:
        """See the base class."""
        return float(self.R) ** 2 * self.n

    def to(self, dtype: torch.dtype) -> DenseRows:
        """See the base class."""
        return DenseRows(self.params, self.U.to(dtype), self.rule)
