r"""Rates of the training system along a path, in a metric held fixed at each place.

Of :math:`\theta' = -M^{-1} \nabla L` it is the smallest eigenvalue of :math:`H y = \lambda M y`, H the Hessian of the
whole loss; a step of length h stretches distances by at most :math:`\max |1 - h \lambda|` (docs/theory 15). Of small
models all eigenvalues are computed; else both ends are Lanczos's, or the lower one Davidson's where M is pulled back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad

from pullback.action.metrics import LocalRows
from pullback.certification.training import Place
from pullback.contraction import Rate, rate_at
from pullback.contraction.davidson import davidson
from pullback.contraction.products import jacobian_products
from pullback.contraction.rates import check_jacobian
from pullback.contraction.record import exact
from pullback.stability.objective import Data, Objective
from pullback.stability.rows import PulledRows

#: Up to here all eigenvalues are computed.
DENSE = 1000
_TOL = 1e-4
_STEPS = 150
#: Gradients that a rate by Davidson may cost.
_BUDGET = 200


@dataclass(frozen=True)
class Ends:
    """Both ends of the spectrum at a place.

    Attributes:
        step: steps taken before it.
        rate: the smallest eigenvalue.
        top: the rate of the reversed flow, so that the largest eigenvalue is ``-top.value``; None where not computed.
    """

    step: int
    rate: Rate
    top: Rate | None

    @property
    def largest(self) -> float | None:
        """The largest eigenvalue, what is estimated to be missing added; None if it did not converge."""
        return -self.top.value if self.top is not None and self.top.converged else None

    def factor(self, h: float) -> tuple[float, float] | None:
        """What a step of length h may stretch distances by: the estimate, and the end of its interval.

        Args:
            h: length of the step.

        Returns:
            Both, or None where an end of the spectrum is not known.
        """
        if self.top is None or not (self.top.converged and self.rate.converged):
            return None
        each = [(self.rate.value, self.top.value), (self.rate.lower, self.top.lower)]
        estimate, bound = (max(abs(1 - h * low), abs(1 + h * top)) for low, top in each)
        return estimate, bound

    def to_dict(self, h: float | None) -> dict[str, Any]:
        """All of it as plain numbers."""
        rate, factor = self.rate, None if h is None else self.factor(h)
        return {
            "step": self.step,
            "rate": rate.value,
            "lower": rate.lower if math.isfinite(rate.lower) else None,
            "upper": rate.upper,
            "confidence": rate.confidence,
            "converged": rate.converged,
            "proved": rate.proved,
            "method": rate.method,
            "evaluations": rate.evaluations + (0 if self.top is None else self.top.evaluations),
            "largest": self.largest,
            "factor": None if factor is None else factor[0],
            "factor_bound": None if factor is None or not math.isfinite(factor[1]) else factor[1],
        }


def gradient_field(objective: Objective, data: Data) -> Callable[[Tensor], Tensor]:
    """The gradient of the whole loss as a function that can be differentiated, (K,) to (K,)."""

    def loss(theta: Tensor) -> Tensor:
        z = functional_call(objective.model, objective.unpack(theta), (data[0],))
        value: Tensor = objective.criterion(z, data[1])
        return value + 0.5 * objective.decay * (theta @ theta)

    return grad(loss)


def ends_at(objective: Objective, place: Place, data: Data, seed: int) -> Ends:
    """Both ends in the identity metric.

    Raises:
        ContractionError: If the Hessian is not finite there.
    """
    field = gradient_field(objective, data)
    if objective.size <= DENSE:
        values = torch.linalg.eigvalsh(_hessian(field, place.theta))
        return _exactly(place.step, values)
    low = _lanczos(lambda theta: -field(theta), place.theta, seed)
    return Ends(place.step, low, _lanczos(field, place.theta, seed))


def largest_ends(objective: Objective, theta: Tensor, data: Data) -> tuple[float, float]:
    """Smallest and largest eigenvalue by Lanczos, what is estimated to be missing taken off and added."""
    field = gradient_field(objective, data)
    return _lanczos(lambda at: -field(at), theta, 0).value, -_lanczos(field, theta, 0).value


class PulledRates:
    """Rates in an optimizer's own metric, ``mu I + U^T U`` of a batch, each started from the one before.

    Args:
        objective: the loss.
        data: all samples of it.
        partition: who moves with whom.
        seed: of the first start.
    """

    def __init__(self, objective: Objective, data: Data, partition: str, seed: int) -> None:
        self.objective, self.data = objective, data
        self._rows = PulledRows(objective, None, partition)
        self._generator = torch.Generator().manual_seed(seed)
        self._near: Tensor | None = None

    def at(self, place: Place) -> Ends:
        """The rate; the largest eigenvalue too where all are computed.

        Raises:
            ContractionError: If the Hessian is not finite there.
        """
        metric = self.metric_at(place)
        field, size = gradient_field(self.objective, self.data), self.objective.size
        if size <= DENSE:
            M = torch.stack([metric.apply(row) for row in torch.eye(size, dtype=place.theta.dtype)])
            L = torch.linalg.cholesky((M + M.T) / 2)
            half = torch.linalg.solve_triangular(L, _hessian(field, place.theta), upper=False)
            values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.T, upper=False))
            return _exactly(place.step, values)
        product = jacobian_products(field, place.theta)[0]
        drawn = torch.randn(size, 1, dtype=place.theta.dtype, generator=self._generator)
        start = drawn if self._near is None else torch.cat([self._near, drawn], 1)
        found = davidson(
            None, product, metric.apply, metric.solve, lambda rest, theta, spread: metric.solve(rest), start,
            tol=_TOL, scale=0.0, budget=_BUDGET, cost=2,
        )  # fmt: skip
        self._near = found.vectors
        rate = Rate(
            found.value - found.error, -math.inf, found.value, found.residual, found.error, found.converged, False,
            None, "davidson", found.products, found.spent, found.vectors,
        )  # fmt: skip
        return Ends(place.step, rate, None)

    def metric_at(self, place: Place) -> LocalRows:
        """The metric of the step from there."""
        assert place.mu is not None
        return LocalRows(self._rows, self._rows.at(place.theta, place.batch), place.mu)


def _lanczos(field: Callable[[Tensor], Tensor], theta: Tensor, seed: int) -> Rate:
    return rate_at(field, theta, method="lanczos", symmetric=True, tol=_TOL, steps=_STEPS, seed=seed)


def _hessian(field: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    push = jacobian_products(field, theta)[0]
    H = check_jacobian(torch.func.vmap(push)(torch.eye(len(theta), dtype=theta.dtype)), theta)
    return (H + H.T) / 2


def _exactly(step: int, values: Tensor) -> Ends:
    n = len(values)
    return Ends(step, exact(float(values[0]), n, n), exact(-float(values[-1]), n, n))
