r"""Running second moments of the vectors on one side of a Kronecker factor, and their damped inverses.

A side of dimension d is held as a matrix while d is small, as its diagonal where the vectors are one-hot, and by its
leading eigenvectors where it is wide:

.. math:: C \approx V^\top V + \tau\,(I - P), \qquad
   (C + \rho I)^{-1} = \tfrac{1}{\tau+\rho}\Bigl(I - \sum_j q_j q_j^\top
   \bigl(1 - \tfrac{\tau+\rho}{\lambda_j+\rho}\bigr)\Bigr)

with rows of V the k leading eigenvectors :math:`q_j` times :math:`\sqrt{\lambda_j}`, P the projector on them and
:math:`\tau` what is left of the trace, spread evenly. V follows the batches by a singular value decomposition of old
rows and new vectors together, taken in the smaller of their two Gram matrices, or, where both are large, by one step
of subspace iteration at a look: averages move slowly. A product with the inverse costs 2 k d instead of d^2 per row
(derived here; the batch-side form of theory 4).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Up to this dimension a side is held as a matrix.
LARGE = 512
#: Leading eigenvectors that are held beyond.
RANK = 128
#: Up to this multiple of their number they are computed anew; of larger matrices they are followed by iteration.
EXACT = 3
#: Vectors that are read for them at a look, evenly spaced; the trace is that of all.
ENOUGH = 4096


@dataclass
class Sample:
    """New vectors of one side, in G groups: their second moment is what a running one follows.

    Attributes:
        vectors: pieces of shape (G, M, d), whose V^T V add up.
        counts: diagonal part from one-hot vectors, shape (d,), or None.
    """

    vectors: list[Tensor] = field(default_factory=list)
    counts: Tensor | None = None

    def scaled(self, factor: float) -> Sample:
        """The same with the moment times a factor."""
        counts = None if self.counts is None else self.counts * factor
        return Sample([v * factor**0.5 for v in self.vectors], counts)

    def trace(self) -> float:
        """Trace of the moment, over all groups."""
        total = sum(float(torch.linalg.vector_norm(v)) ** 2 for v in self.vectors)
        return total + (0.0 if self.counts is None else float(self.counts.sum()))


class Moment(ABC):
    """A running second moment of one side, with a damped inverse that is refreshed on demand."""

    kind: str = "?"

    @abstractmethod
    def follow(self, sample: Sample, keep: float) -> None:
        """C <- keep C + (1 - keep) C_sample."""

    @abstractmethod
    def invert(self, root: float) -> bool:
        """Prepare (C + root mean(C) I)^{-1}, mean(C) the mean of the diagonal.

        Returns:
            False if C is not finite or not positive definite even so; the old inverse is then left.
        """

    @abstractmethod
    def from_left(self, G: Tensor) -> Tensor:
        """Inverse times G, shape (groups, d, .)."""

    @abstractmethod
    def from_right(self, G: Tensor) -> Tensor:
        """G times the inverse, shape (groups, ., d)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """C, shape (groups, d, d); for tests."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors to resume from."""


class MatrixMoment(Moment):
    """C as a matrix per group.

    Attributes:
        C: the moment, shape (G, d, d).
        inverse: of its damped form, or None before the first.
    """

    kind = "matrix"

    def __init__(self, C: Tensor, inverse: Tensor | None = None) -> None:
        self.C = C
        self.inverse = inverse

    @classmethod
    def empty(cls, groups: int, d: int, like: Tensor) -> MatrixMoment:
        """Zero."""
        return cls(like.new_zeros(groups, d, d))

    def follow(self, sample: Sample, keep: float) -> None:
        """See the base class."""
        self.C.mul_(keep)
        for v in sample.vectors:
            self.C.baddbmm_(v.transpose(1, 2), v, alpha=1 - keep)
        if sample.counts is not None:
            self.C.diagonal(dim1=1, dim2=2).add_(sample.counts, alpha=1 - keep)

    def invert(self, root: float) -> bool:
        """By Cholesky. See the base class."""
        damped = self.C.clone()
        damped.diagonal(dim1=1, dim2=2).add_(root * positive(self.mean())[:, None])
        L, info = torch.linalg.cholesky_ex(damped)
        if bool(info.any()) or not math.isfinite(float(L.diagonal(dim1=1, dim2=2).sum())):
            return False
        self.inverse = torch.cholesky_inverse(L)
        return True

    def mean(self) -> Tensor:
        """Mean of the diagonal, shape (G,)."""
        return self.C.diagonal(dim1=1, dim2=2).mean(1)

    def from_left(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.inverse is not None
        return torch.bmm(self.inverse, G)

    def from_right(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.inverse is not None
        return torch.bmm(G, self.inverse)

    def dense(self) -> Tensor:
        """See the base class."""
        return self.C

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": self.kind, "C": self.C, "inverse": self.inverse}


class DiagonalMoment(Moment):
    """The diagonal of C, shape (G, d): exact for one-hot vectors."""

    kind = "diagonal"

    def __init__(self, c: Tensor, inverse: Tensor | None = None) -> None:
        self.c = c
        self.inverse = inverse

    @classmethod
    def empty(cls, groups: int, d: int, like: Tensor) -> DiagonalMoment:
        """Zero."""
        return cls(like.new_zeros(groups, d))

    def follow(self, sample: Sample, keep: float) -> None:
        """See the base class."""
        self.c.mul_(keep)
        for v in sample.vectors:
            self.c.add_(v.square().sum(1), alpha=1 - keep)
        if sample.counts is not None:
            self.c.add_(sample.counts, alpha=1 - keep)

    def invert(self, root: float) -> bool:
        """See the base class."""
        inverse = (self.c + root * positive(self.c.mean(1))[:, None]).reciprocal()
        if not bool(torch.isfinite(inverse).all()):
            return False
        self.inverse = inverse
        return True

    def from_left(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.inverse is not None
        return self.inverse[:, :, None] * G

    def from_right(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.inverse is not None
        return G * self.inverse[:, None]

    def dense(self) -> Tensor:
        """See the base class."""
        return torch.diag_embed(self.c)

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": self.kind, "c": self.c, "inverse": self.inverse}


class LeadingMoment(Moment):
    """The leading eigenvectors of C and its trace; one group.

    Attributes:
        V: leading eigenvectors times the roots of their eigenvalues, shape (k, d).
        trace: trace of C.
        Q: eigenvectors, shape (k, d), or None before the first inverse.
        cut: 1 - (tau + rho) / (lambda + rho), shape (k,).
        scale: 1 / (tau + rho).
    """

    kind = "leading"

    def __init__(
        self,
        V: Tensor,
        trace: float = 0.0,
        rank: int = RANK,
        Q: Tensor | None = None,
        cut: Tensor | None = None,
        scale: float = 0.0,
    ) -> None:
        self.V = V
        self.trace = trace
        self.rank = rank
        self.Q = Q
        self.cut = cut
        self.scale = scale

    @classmethod
    def empty(cls, d: int, like: Tensor, rank: int = RANK) -> LeadingMoment:
        """Zero."""
        return cls(like.new_zeros(0, d), rank=rank)

    def follow(self, sample: Sample, keep: float) -> None:
        """See the base class."""
        new = [thinned(v[0]) * (1 - keep) ** 0.5 for v in sample.vectors]
        rows = torch.cat([self.V * keep**0.5, *new])
        self.trace = keep * self.trace + (1 - keep) * sample.trace()
        k = min(self.rank, *rows.shape)
        if len(self.V) == k and min(rows.shape) > EXACT * k:
            self._iterate(rows)
        elif rows.shape[0] <= rows.shape[1]:
            self.V = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -k:].T @ rows
        else:
            # More vectors than entries (windows of many positions): the other Gram matrix has the same eigenvalues.
            values, Q = torch.linalg.eigh(rows.T @ rows)
            self.V = (Q[:, -k:] * values[-k:].clamp_min(0).sqrt()).T.contiguous()

    def _iterate(self, rows: Tensor) -> None:
        """One step of subspace iteration from the old vectors, and the best vectors in the new subspace."""
        Q = torch.linalg.qr(rows.T @ (rows @ self.V.T)).Q
        inside = rows @ Q
        values, E = torch.linalg.eigh(inside.T @ inside)
        self.V = ((Q @ E) * values.clamp_min(0).sqrt()).T.contiguous()

    def invert(self, root: float) -> bool:
        """See the base class."""
        d = self.V.shape[1]
        values = self.V.square().sum(1)
        if not bool(torch.isfinite(values).all()):
            return False
        rest = max(0.0, self.trace - float(values.sum())) / max(1, d - len(values))
        rho = root * (self.trace / d if self.trace > 0 else 1.0)
        floor = torch.finfo(values.dtype).eps * values.amax()
        # A row that is round-off has no direction.
        self.Q = (
            torch.where(values > floor, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)[:, None] * self.V
        )
        self.cut = 1 - (rest + rho) / (values + rho)
        self.scale = 1 / (rest + rho)
        return True

    def from_left(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.Q is not None
        assert self.cut is not None
        inside = (self.Q @ G[0]) * self.cut[:, None]
        return torch.addmm(G[0], self.Q.T, inside, alpha=-1).mul_(self.scale)[None]

    def from_right(self, G: Tensor) -> Tensor:
        """See the base class."""
        assert self.Q is not None
        assert self.cut is not None
        inside = (G[0] @ self.Q.T) * self.cut
        return torch.addmm(G[0], inside, self.Q, alpha=-1).mul_(self.scale)[None]

    def dense(self) -> Tensor:
        """See the base class."""
        d = self.V.shape[1]
        values = self.V.square().sum(1)
        rest = max(0.0, self.trace - float(values.sum())) / max(1, d - len(values))
        Q = self.V * values.rsqrt()[:, None]
        return (self.V.T @ self.V + rest * (torch.eye(d, dtype=Q.dtype) - Q.T @ Q))[None]

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": self.kind, **vars(self)}


def thinned(v: Tensor) -> Tensor:
    """Not many more than enough of the rows, scaled up so that their moment has the size of that of all."""
    some = v[:: max(1, len(v) // ENOUGH)]
    return some if len(some) == len(v) else some * (len(v) / len(some)) ** 0.5


def moment(groups: int, d: int, sample: Sample, like: Tensor) -> Moment:
    """A zero moment of the kind that suits a side.

    Args:
        groups: groups of the side.
        d: its dimension.
        sample: what it will follow.
        like: gives dtype and device.
    """
    if not sample.vectors or (d > LARGE and (groups > 1 or sample.counts is not None)):
        return DiagonalMoment.empty(groups, d, like)
    return MatrixMoment.empty(groups, d, like) if d <= LARGE else LeadingMoment.empty(d, like)


def restored(state: dict[str, Any]) -> Moment:
    """A moment from its :meth:`Moment.state`."""
    state = dict(state)
    kinds: dict[str, Any] = {kind.kind: kind for kind in (MatrixMoment, DiagonalMoment, LeadingMoment)}
    made: Moment = kinds[state.pop("kind")](**state)
    return made


def positive(mean: Tensor) -> Tensor:
    """A mean that damping can be relative to: one where nothing was seen yet (its gradient is zero as well)."""
    return torch.where(mean > 0, mean, torch.ones_like(mean))
