r"""Layerwise metrics in Kronecker form, averaged over batches.

.. math:: M_l \approx \bar A \otimes \bar B, \qquad \bar A = E[x x^\top], \quad
   \bar B = \textstyle\sum_{a,n,p} s_{anp} s_{anp}^\top

for rows that are sums over positions p of outer products :math:`s_{anp} \otimes x_{np}` (theory 4). With
``shared="expand"`` positions count as if they were samples (K-FAC for convolutions: derivatives at different places
uncorrelated); with ``"reduce"`` each sample has one pair, :math:`\sum_p s` and the mean of x. Damping is factored,
each side by its own mean: :math:`(\bar A + \sqrt d\,\bar a I) \otimes (\bar B + \sqrt d\,\bar b I)` with
:math:`\bar a, \bar b` the mean diagonals: the product's smallest eigenvalue is d times its mean one, whatever the
scale of the loss (the pi-rule of Martens & Grosse with the damping relative to the metric).

A weight used in several places is a sum of Kronecker products :math:`\sum_k L_k \otimes R_k`; it becomes one,
:math:`\sum_k L_k t(R_k) \otimes \sum_k R_k t(L_k)`, divided by :math:`\sum_k t(L_k) t(R_k)` with t the trace, which
keeps the trace (derived here).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.curvature.moments import LARGE, MatrixMoment, Moment, Sample, moment
from pullback.errors import StepError
from pullback.tape import Rows
from pullback.tape.rules.sides import Sides

Shared = Literal["expand", "reduce"]

#: Refreshes in a row that may fail before that is an error.
FAILURES = 5


class Averaged(ABC):
    """The running metric of one weight (with its bias), and its damped inverse.

    Attributes:
        params: the parameters, weight first.
        rule: how its metric is made, for the coverage report.
        seen: refreshes so far.
        velocity: the running step, for momentum.
        failures: refreshes in a row whose inverse could not be had.
    """

    rule: str = "?"

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = tuple(params)
        self.seen = 0
        self.failures = 0
        self.velocity: Tensor | None = None

    @property
    def matrix(self) -> bool:
        """Whether this is a weight that is multiplied by its input, not a scale or a shift."""
        return any(p.ndim > 1 for p in self.params)

    def velocity_like(self, D: Tensor) -> Tensor:
        """The running step, in the block's layout; zero before the first."""
        if self.velocity is None:
            self.velocity = torch.zeros_like(D)
        return self.velocity

    def follow(self, rows: Sequence[Rows], decay: float, damping: float) -> None:
        """Average in the rows of one step and renew the inverse.

        Args:
            rows: rows of these parameters, in all terms.
            decay: how much is kept of the average at most.
            damping: d, relative to the mean of the metric.

        Raises:
            StepError: if the inverse could not be had several times in a row.
        """
        keep = min(decay, 1 - 1 / (self.seen + 1))
        finite = self._follow(rows, keep)
        if finite and self._invert(damping):
            self.seen += 1
            self.failures = 0
            return
        self.failures += 1
        if self.failures >= FAILURES or not self.seen:
            raise StepError(
                f"The metric of {self.describe()} could not be inverted {self.failures} times in a row; look for "
                "inputs or a loss that are not finite, or raise damping."
            )

    def describe(self) -> str:
        """Shape and kind, for messages."""
        return f"a parameter of shape {tuple(self.params[0].shape)} ({self.rule})"

    @abstractmethod
    def _follow(self, rows: Sequence[Rows], keep: float) -> bool:
        """Average in; False and nothing changed if the numbers are not finite."""

    @abstractmethod
    def _invert(self, damping: float) -> bool:
        """Renew the inverse; False and the old one left if that fails."""

    @abstractmethod
    def gathered(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients in the block's own layout, which :meth:`solve` takes and gives."""

    @abstractmethod
    def parted(self, D: Tensor) -> list[Tensor]:
        """The block's layout in the parameters' shapes; views."""

    @abstractmethod
    def solve(self, G: Tensor) -> Tensor:
        """Damped inverse times a gradient, a fresh tensor."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What to resume from, without the parameters."""


class SmallBlock(Averaged):
    """Parameters whose rows are formed one by one: U^T U as a matrix while it is small, else its diagonal."""

    def __init__(
        self, params: Sequence[nn.Parameter], rule: str, side: Moment, seen: int = 0, failures: int = 0
    ) -> None:
        super().__init__(params)
        self.side = side
        self.rule = rule
        self.seen, self.failures = seen, failures

    @classmethod
    def of(cls, rows: Rows) -> SmallBlock:
        """An empty one for such rows."""
        like = rows.params[0]
        sample = Sample([like.new_zeros(1, 1, 1)]) if rows.n <= LARGE else Sample()
        return cls(rows.params, rows.rule, moment(1, rows.n, sample, like))

    def _follow(self, rows: Sequence[Rows], keep: float) -> bool:
        sample = Sample()
        for own in rows:
            if isinstance(self.side, MatrixMoment):
                sample.vectors += [U.reshape(1, -1, own.n) for U in own.chunks()]
            else:
                diagonal = own.diagonal()
                sample.counts = diagonal if sample.counts is None else sample.counts + diagonal
        if not finite(sample):
            return False
        self.side.follow(sample, keep)
        return True

    def _invert(self, damping: float) -> bool:
        return self.side.invert(damping)

    def gathered(self, gradients: Sequence[Tensor]) -> Tensor:
        """One vector. See the base class."""
        return torch.cat([g.reshape(-1) for g in gradients])

    def parted(self, D: Tensor) -> list[Tensor]:
        """See the base class."""
        pieces = D.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def solve(self, G: Tensor) -> Tensor:
        """See the base class."""
        return self.side.from_left(G[None, :, None]).view(-1)

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "form": "small",
            "rule": self.rule,
            "side": self.side.state(),
            "seen": self.seen,
            "failures": self.failures,
        }


class KroneckerBlock(Averaged):
    """A weight whose rows are outer products.

    Args:
        params: the weight and, if there is one, its bias.
        rule: for the coverage report.
        shape: groups, left and right entries of the weight.
        factor_left: whether the factor is the left side, and the bias on the right; without a bias it has no meaning.
        left, right: the moments.
        shared: what positions are taken for.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        rule: str,
        shape: Sequence[int],
        left: Moment,
        right: Moment,
        shared: Shared,
        seen: int = 0,
        failures: int = 0,
    ) -> None:
        super().__init__(params)
        self.rule = rule
        self.shape = tuple(shape)
        self.left, self.right = left, right
        self.shared: Shared = shared
        self.seen, self.failures = seen, failures

    @classmethod
    def of(cls, rows: Sequence[Rows], shared: Shared) -> KroneckerBlock:
        """An empty one for such rows."""
        sides = sides_of(rows)
        first = next((own for own in sides if own.bias is not None), sides[0])  # a tied table has none
        groups = first.factor.shape[0]
        total = first.weight.numel() // groups
        outer = first.factor.shape[4]
        high, wide = (outer, total // outer) if first.factor_left else (total // outer, outer)
        left, right = samples(sides, shared)
        params = [first.weight] if first.bias is None else [first.weight, first.bias]
        extra = int(first.bias is not None)
        like = first.weight
        rule = " + ".join(dict.fromkeys(own.rule for own in rows))
        both = moment(groups, high, left, like), moment(groups, wide + extra, right, like)
        return cls(params, rule, (groups, high, wide), *both, shared)

    def _follow(self, rows: Sequence[Rows], keep: float) -> bool:
        left, right = samples(self._sides(rows), self.shared)
        if not (finite(left) and finite(right)):
            return False
        self.left.follow(left, keep)
        self.right.follow(right, keep)
        return True

    def _sides(self, rows: Sequence[Rows]) -> list[Sides]:
        """Sides in as many groups as those before."""
        sides = sides_of(rows)
        groups = sorted({self.shape[0], *(own.factor.shape[0] for own in sides)})
        if len(groups) > 1:
            raise StepError(
                f"A weight of shape {tuple(self.params[0].shape)} was used in {self.shape[0]} groups, and now "
                f"in other numbers ({groups}); call an attention with query, key and value the same always or never."
            )
        return sides

    def _invert(self, damping: float) -> bool:
        root = damping**0.5
        return self.left.invert(root) and self.right.invert(root)

    def gathered(self, gradients: Sequence[Tensor]) -> Tensor:
        """(G, left, right), the bias as the last column. See the base class."""
        if len(gradients) == 1:
            return gradients[0].reshape(self.shape)
        return torch.cat([gradients[0].reshape(self.shape), gradients[1].reshape(*self.shape[:2], 1)], 2)

    def parted(self, D: Tensor) -> list[Tensor]:
        """See the base class."""
        if len(self.params) == 1:
            return [D.view(self.params[0].shape)]
        G, high, wide = self.shape
        weight = self.params[0].shape
        # The axes of one row of the weight are next to each other, whatever follows it.
        inner = D[:, :, :wide].unflatten(2, weight[1:]) if len(weight) > 2 else D[:, :, :wide]
        return [inner.flatten(0, 1), D[:, :, wide].reshape(G * high)]

    def solve(self, G: Tensor) -> Tensor:
        """See the base class."""
        return self.right.from_right(self.left.from_left(G))

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "rule": self.rule, "shape": self.shape, "left": self.left.state(),
            "right": self.right.state(), "shared": self.shared, "seen": self.seen, "failures": self.failures,
        }  # fmt: skip


def sides_of(rows: Sequence[Rows]) -> list[Sides]:
    """Sides of every one of them."""
    found = [own.sides() for own in rows]
    assert all(own is not None for own in found)
    return [own for own in found if own is not None]


def finite(sample: Sample) -> bool:
    """Whether all numbers are finite."""
    return all(math.isfinite(float(v.sum())) for v in sample.vectors)


def samples(sides: Sequence[Sides], shared: Shared) -> tuple[Sample, Sample]:
    """New vectors on the left and on the right of a weight.

    Sides of the same kind (micro-batches) share their given moment, a mean over all; those of different kinds (a tied
    table) are combined with their traces as weights.

    Args:
        sides: sides of the same weight.
        shared: what positions are taken for.
    """
    kinds: dict[tuple[bool, bool], list[Sides]] = {}
    for own in sides:
        kinds.setdefault((own.table, own.factor_left), []).append(own)
    pairs = [_pair(own, shared) for own in kinds.values()]
    if len(pairs) == 1:
        return pairs[0]
    traces = [(left.trace(), right.trace()) for left, right in pairs]
    total = sum(a * b for a, b in traces) or 1.0
    wide = max(v.shape[2] for _, b in pairs for v in b.vectors)
    left, right = Sample(), Sample()
    for (a, b), (tl, tr) in zip(pairs, traces, strict=True):
        _add(left, a.scaled(tr / total**0.5))
        b.vectors = [nn.functional.pad(v, (0, wide - v.shape[2])) for v in b.vectors]  # without an entry for the bias
        _add(right, b.scaled(tl / total**0.5))
    return left, right


def _add(out: Sample, other: Sample) -> None:
    out.vectors += other.vectors
    if other.counts is not None:
        out.counts = other.counts if out.counts is None else out.counts + other.counts


def _pair(sides: Sequence[Sides], shared: Shared) -> tuple[Sample, Sample]:
    given, factor = Sample(), Sample()
    # Expanded, the mean over positions of x x^T stands beside the sum over positions of s s^T.
    reduce = shared == "reduce" and not any(own.table for own in sides)
    count = sum(own.given.shape[1] * (1 if reduce else own.counted) for own in sides)
    for own in sides:
        s = own.summed_factor() if reduce else own.spread_factor()
        factor.vectors.append(s.reshape(s.shape[0], -1, s.shape[-1]))
        if own.table:
            hits = torch.bincount(own.given.reshape(-1), minlength=own.entries).to(s.dtype) / count
            given.counts = hits if given.counts is None else given.counts + hits
            continue
        x = own.averaged_vectors() if reduce else own.spread_given().flatten(1, 2)
        given.vectors.append(x * count**-0.5)
    return (factor, given) if sides[0].factor_left else (given, factor)
