"""A guaranteed rate with its metric, and the tree of reasons for it: what rules of composition take and give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError
from pullback.contraction.metrics import check, factor
from pullback.contraction.record import Rate
from pullback.contraction.worst import RegionRate


@dataclass(frozen=True)
class Reason:
    """Why a rate holds.

    Attributes:
        text: one sentence.
        given: what it was concluded from.
    """

    text: str
    given: tuple[Reason, ...] = ()

    def lines(self, depth: int = 0) -> list[str]:
        """The tree, indented."""
        return ["  " * depth + self.text, *(line for reason in self.given for line in reason.lines(depth + 1))]


@dataclass(frozen=True)
class Block:
    """The metric of one part of the state, ``weight * M``.

    Attributes:
        name: of the part.
        size: n, numbers of its state.
        weight: k, positive.
        M: its own metric, (n, n); None for the identity.
    """

    name: str
    size: int
    weight: float = 1.0
    M: Tensor | None = field(default=None, repr=False)

    @cached_property
    def theta(self) -> Tensor | None:
        """The factor of the own metric, without the weight; None for the identity."""
        return None if self.M is None else factor(self.M)

    def __str__(self) -> str:
        """As it stands in a certificate."""
        own = f"I({self.size})" if self.M is None else f"M({self.size} x {self.size})"
        return f"{self.name}: {self.weight:.6g} {own}"


@dataclass(frozen=True)
class Guarantee:
    """A system that contracts at a rate in a block-diagonal metric. A composite is one again.

    Attributes:
        rate: the guaranteed rate.
        blocks: the metric, in the order of the state.
        proved: whether the rate is proved, given the assumptions; else something in it was only measured.
        how: the tree of reasons.
        region: where it holds; empty for everywhere.
        confidence: probability that all that was sampled or drawn at random is as stated; 1 if nothing was.
        assumptions: what the caller stated and nobody checked.
    """

    rate: float
    blocks: tuple[Block, ...]
    proved: bool
    how: Reason
    region: str = ""
    confidence: float = 1.0
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.weights) < len(self.blocks):
            raise ContractionError(f"Parts of {self.name} have the same name; give every part its own.")
        if math.isnan(self.rate):
            raise ContractionError(f"The rate of {self.name} is not a number; nothing can be guaranteed.")
        if not 0 <= self.confidence <= 1:
            raise ContractionError(f"The confidence of {self.name} is {self.confidence}; give a number from 0 to 1.")

    @property
    def name(self) -> str:
        """Names of the parts."""
        return " + ".join(block.name for block in self.blocks)

    @property
    def size(self) -> int:
        """Numbers of the whole state."""
        return sum(block.size for block in self.blocks)

    @property
    def contracting(self) -> bool:
        """Whether the rate is positive."""
        return self.rate > 0

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every block by its name."""
        return {block.name: block.weight for block in self.blocks}

    @cached_property
    def theta(self) -> Tensor:
        """The factor of the whole metric, M = theta^T theta, float64 (n, n)."""
        pieces = [
            block.weight**0.5 * (torch.eye(block.size, dtype=torch.float64) if block.theta is None else block.theta)
            for block in self.blocks
        ]
        whole: Tensor = pieces[0] if len(pieces) == 1 else torch.block_diag(*pieces)
        return whole

    @property
    def metric(self) -> Tensor:
        """The whole metric, float64 (n, n)."""
        M: Tensor = self.theta.T @ self.theta
        return M

    def weighed(self, k: float) -> tuple[Block, ...]:
        """The blocks of k M."""
        return tuple(replace(block, weight=block.weight * k) for block in self.blocks)

    def __str__(self) -> str:
        """A certificate a person can read."""
        head = f"{self.name}: " + (
            f"contracts at rate {self.rate:.6g} or faster"
            if self.contracting
            else f"NOT shown to contract, rate {self.rate:.6g}"
        )
        state = "proved" if self.proved else "NOT PROVED, in part measured"
        state += ", given what is assumed" if self.assumptions else ""
        lines = [
            head,
            f"  status: {state}" + (f", with probability {self.confidence:g}" if self.confidence < 1 else ""),
        ]
        lines.append(f"  where: {self.region or 'everywhere'}")
        lines.append("  metric: diag(" + ", ".join(str(block) for block in self.blocks) + ")")
        lines += [f"  assumed: {text}" for text in self.assumptions]
        return "\n".join([*lines, "  because:", *self.how.lines(2)])


def part(
    name: str,
    rate: float | Rate | RegionRate,
    *,
    size: int | None = None,
    metric: Tensor | None = None,
    region: str = "",
) -> Guarantee:
    """A part, from its rate.

    Args:
        name: how it is called in certificates.
        rate: a number (assumed as stated), a rate at a point (it holds where the Jacobian is that one: everywhere for
            linear parts), or the worst rate of a sampled region.
        size: n; may be left out if the metric is given.
        metric: constant, (n, n); None for the identity.
        region: where it holds.

    Returns:
        The guarantee. It is proved only for a stated number (an assumption) or a rate from all eigenvalues; a rate
        that has not converged counts by the lower end of its interval.

    Raises:
        ContractionError: if size and metric differ, the metric is not positive definite, or the rate is unknown: it has
            not converged and has no lower end, or its trajectory left the region.
    """
    if metric is not None:
        metric = check(metric.detach().double())
        if size is not None and size != len(metric):
            raise ContractionError(f"The part {name} has size {size} and a metric of shape {tuple(metric.shape)}.")
        size = len(metric)
    if size is None or size < 1:
        raise ContractionError(f"The size of the part {name} is not known; give size or metric.")
    blocks = (Block(name, size, 1.0, metric),)
    if isinstance(rate, Rate):
        if not rate.converged and math.isinf(rate.lower):
            raise ContractionError(f"The rate of {name} has not converged and has no lower end: {rate}.")
        value = min(rate.value, rate.lower) if math.isfinite(rate.lower) else rate.value
        sure = 1.0 if rate.proved or rate.confidence is None else rate.confidence
        where = region or f"where {name} has the Jacobian of the point its rate was taken at"
        return Guarantee(value, blocks, rate.proved, Reason(f"{name}: {rate}"), where, sure)
    if isinstance(rate, RegionRate):
        if not rate.certified:
            raise ContractionError(f"The rates of {name} certify nothing: {rate.why_not}.")
        where = region or f"a share of at least {1 - rate.share:.4g} of the {rate.region}"
        return Guarantee(rate.worst, blocks, False, Reason(f"{name}: {rate}"), where, rate.confidence)
    text = f"{name} contracts at rate {rate:.6g} in its metric"
    return Guarantee(float(rate), blocks, True, Reason(text), region, 1.0, (text,))


def linear_part(name: str, A: Tensor, *, metric: Tensor | None = None) -> Guarantee:
    """A linear part x' = A x, its rate from all eigenvalues.

    Args:
        name: how it is called in certificates.
        A: (n, n).
        metric: (n, n); None for the identity.

    Raises:
        ContractionError: if shapes differ, numbers are not finite, or the metric is not positive definite.
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not bool(torch.isfinite(A).all()):
        raise ContractionError(f"The part {name} needs a square matrix of finite numbers, got {tuple(A.shape)}.")
    A = A.detach().double()
    if metric is not None:
        if metric.shape != A.shape:
            raise ContractionError(
                f"The part {name} has a matrix of shape {tuple(A.shape)} and a metric of shape {tuple(metric.shape)}."
            )
        metric = check(metric.detach().double())
    block = Block(name, len(A), 1.0, metric)
    F = A
    if block.theta is not None:
        F = torch.linalg.solve_triangular(block.theta, block.theta @ A, upper=True, left=False)
    rate = -float(torch.linalg.eigvalsh((F + F.T) / 2)[-1])
    return Guarantee(rate, (block,), True, Reason(f"{name}: linear, rate {rate:.6g} from all eigenvalues"))
