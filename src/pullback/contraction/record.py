"""What is known of a rate at a point."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

#: Chance that the probabilistic end of an interval does not hold.
DELTA = 0.01


@dataclass(frozen=True)
class Rate:
    r"""A contraction rate at one point, per unit of time (per step for maps).

    Attributes:
        value: the rate, what is estimated to be missing taken off: never rounded up.
        lower: lower end of the interval; -inf where nothing is known.
        upper: upper end; the rate is certainly not above it, but for round-off.
        residual: residual of the Ritz pair: some eigenvalue, not yet the one that counts, lies that near.
        error: what was taken off.
        converged: whether ``error`` met the tolerance.
        proved: whether value is a lower bound but for round-off: all eigenvalues were computed.
        confidence: probability that the rate is not below ``lower``, over the random start; None where nothing is
            known.
        method: ``"dense"``, ``"lanczos"`` or ``"davidson"``.
        products: products with the Jacobian, its transpose or the Hessian, together.
        evaluations: what they cost in evaluations of the field (a product with a Jacobian, or with its transpose: 1) or
            gradients of the loss (a product with the Hessian: 2; a difference of gradients: 1; a column of the metric
            pulled back: 1).
        vectors: where a neighbouring rate may start, (n, k); None for dense rates.
        factor: for a map, the largest growth of a distance in one step; else None.
    """

    value: float
    lower: float
    upper: float
    residual: float
    error: float
    converged: bool
    proved: bool
    confidence: float | None
    method: str
    products: int
    evaluations: int
    vectors: Tensor | None = field(default=None, repr=False, compare=False)
    factor: float | None = None

    @property
    def contracting(self) -> bool:
        """Whether the lower end of the interval is above zero, with the confidence stated."""
        return self.lower > 0

    def __str__(self) -> str:
        """One sentence."""
        if self.proved:
            known = "all eigenvalues computed"
        elif not self.converged:
            known = "UNPROVED, not converged"
        else:
            known = f"unproved, {self.method} converged"
        sure = f" with probability {self.confidence:g}" if self.confidence is not None and not self.proved else ""
        low = "unknown" if math.isinf(self.lower) else f"{self.lower:.6g}"
        return (
            f"rate {self.value:.6g} ({known}; between {low}{sure} and {self.upper:.6g}; residual {self.residual:.1e}, "
            f"{self.evaluations} evaluations)"
        )


def exact(value: float, products: int, evaluations: int, factor: float | None = None) -> Rate:
    """A rate from all eigenvalues."""
    return Rate(value, value, value, 0.0, 0.0, True, True, 1.0, "dense", products, evaluations, None, factor)
