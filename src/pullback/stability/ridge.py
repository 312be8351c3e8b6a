r"""Ridge and kernel ridge regression: twins in closed form, to test bounds on.

.. math:: L(\theta) = \tfrac1{2n} \sum_i (x_i \cdot \theta - y_i)^2 + \tfrac\xi2 |\theta|^2, \qquad
          \nabla^2 L = H = \tfrac1n X^\top X + \xi I

The flow :math:`\theta' = -M^{-1} \nabla L` in a metric without :math:`\theta` is linear and contracts in M at the
smallest eigenvalue of :math:`M^{-1} H`, everywhere: here the rate is proved, up to round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pullback.stability.bounds import Bound, replace_one
from pullback.stability.errors import StabilityError
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Data
from pullback.stability.twins import Pair

#: What a bound is called that leaves out the factor of data in the metric.
NAIVE = "one rate, without the factor of the data"
_TIMES = 64


class Ridge:
    r"""Ridge regression, trained by its metric flow to a time or to the end.

    Args:
        decay: xi, positive.
        metric: a fixed metric; None for the identity.
        data_scale: s^2 of a metric that holds the data, :math:`\mu I + \tfrac{s^2}{n} X^\top X`, mu from ``metric``;
            None for a fixed metric.
        time: how long the flow runs from zero weights; infinite for the minimiser.

    Raises:
        StabilityError: if the decay, the scale or the time is not positive, or M is not positive definite.
    """

    def __init__(
        self,
        decay: float,
        *,
        metric: FixedMetric | None = None,
        data_scale: float | None = None,
        time: float = math.inf,
    ) -> None:
        if not (decay > 0 and time > 0 and (data_scale is None or data_scale > 0)):
            raise StabilityError(f"decay is {decay}, time {time}, data_scale {data_scale}; give positive numbers.")
        self.decay, self.data_scale, self.time = decay, data_scale, time
        self.metric = FixedMetric() if metric is None else metric

    def train(self, data: Data) -> Tensor:
        """The weights at the time, (K,)."""
        return self.at(data, self.time)

    def at(self, data: Data, time: float) -> Tensor:
        """The weights of the flow from zero at a time, in closed form, (K,)."""
        x, y = data
        end: Tensor = torch.linalg.solve(self.hessian(data), x.T @ y / len(y))
        if math.isinf(time):
            return end
        values, vectors = self._modes(data)  # V^T M V = I, V^T H V = diag(values)
        kept: Tensor = vectors @ (torch.expm1(-values * time) * (vectors.T @ (self._matrix(data) @ -end)))
        return kept

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Euclidean."""
        return float((a - b).norm())

    def losses(self, state: Tensor, data: Data) -> Tensor:
        """Half squared residuals, (n,)."""
        return _half_squares(data[0] @ state - data[1])

    def hessian(self, data: Data) -> Tensor:
        """H, (K, K)."""
        return _gram(data) + self.decay * torch.eye(data[0].shape[1], dtype=data[0].dtype)

    def rate(self, data: Data) -> float:
        """The contraction rate of the flow: the smallest eigenvalue of M^{-1} H."""
        return float(self._modes(data)[0][0])

    def gradient_norms(self, state: Tensor, data: Data) -> Tensor:
        """The norms of the samples' gradients, (n,)."""
        out: Tensor = (data[0] @ state - data[1]).abs() * data[0].norm(dim=1)
        return out

    def bounds(self, pair: Pair[Tensor]) -> list[Bound]:
        """The derived bound; with data in the metric beside it one that forgets so, which is none.

        kappa is taken where the second twin stands (at the end alone, or at times along the flow), and for the losses
        at both ends: norms of affine functions are convex, so they are nowhere larger in between.
        """
        union = pair.union()
        places = [self.at(pair.twin, t) for t in self._times()]
        kappa = max(float(self.gradient_norms(theta, union).max()) for theta in places)
        kappa = max(kappa, *(float(self.gradient_norms(s, pair.points).max()) for s in (pair.state, pair.other)))
        also = () if len(places) == 1 else (f"kappa, at {len(places)} times of the flow",)
        promise = partial(
            replace_one,
            n=len(pair.data[1]),
            mu=self.metric.mu,
            rate=self.rate(pair.data),
            time=self.time,
            source=_PROVED,
            proved=True,
            also=also,
        )
        if self.data_scale is None:
            return [promise(kappa=kappa)]
        H, b = self.hessian(pair.twin), pair.twin[0].T @ pair.twin[1] / len(pair.twin[1])
        whole = max(float((H @ theta - b).norm()) for theta in places)
        B2 = self.data_scale * float(union[0].square().sum(1).max())
        right, wrong = promise(kappa=max(kappa, whole), B2=B2), promise(kappa=max(kappa, whole))
        return [right, replace(wrong, name=NAIVE, derived=False, assumes=("nothing that holds: it forgets the data",))]

    def _times(self) -> list[float]:
        if math.isinf(self.time):
            return [math.inf]  # the end does not depend on the start: let both begin where the second twin ends
        return [self.time * k / _TIMES for k in range(_TIMES + 1)]

    def _matrix(self, data: Data) -> Tensor:
        eye = torch.eye(data[0].shape[1], dtype=data[0].dtype)
        M = self.metric.M.to(eye)
        M = M if M.ndim == 2 else M * eye
        return M if self.data_scale is None else M + self.data_scale * _gram(data)

    def _modes(self, data: Data) -> tuple[Tensor, Tensor]:
        factor = torch.linalg.cholesky(self._matrix(data))
        half = torch.linalg.solve_triangular(factor, self.hessian(data), upper=False)
        values, q = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.T, upper=False))
        return values, torch.linalg.solve_triangular(factor.T, q, upper=True)


@dataclass
class Expansion:
    r"""A function :math:`f = \sum_i a_i k(x_i, .)`.

    Attributes:
        points: the x_i, (n, features).
        weights: the a_i, (n,).
    """

    points: Tensor
    weights: Tensor


class KernelRidge:
    r"""Kernel ridge regression, the minimiser of :math:`\tfrac1{2n} \sum_i (f(x_i) - y_i)^2 + \tfrac\xi2 |f|^2`.

    Distances are those of the kernel's Hilbert space, in which the flow of L contracts at least at rate xi.

    Args:
        kernel: takes (n, features) and (m, features) to (n, m); symmetric positive semidefinite.
        decay: xi, positive.

    Raises:
        StabilityError: if the decay is not positive.
    """

    def __init__(self, kernel: Callable[[Tensor, Tensor], Tensor], decay: float) -> None:
        if not decay > 0:
            raise StabilityError(f"decay is {decay}; give a positive number.")
        self.kernel, self.decay = kernel, decay

    def train(self, data: Data) -> Expansion:
        """See :class:`~pullback.stability.Learner`.

        Raises:
            StabilityError: if the kernel matrix has an eigenvalue below zero.
        """
        x, y = data
        K = self.kernel(x, x)
        values, vectors = torch.linalg.eigh(K)
        if float(values[0]) < -1e-10 * float(values[-1]):
            raise StabilityError(
                f"The kernel matrix has the eigenvalue {float(values[0]):.3g}; take a kernel that is PSD."
            )
        return Expansion(x, vectors @ ((vectors.T @ y) / (values.clamp_min(0) + len(y) * self.decay)))

    def distance(self, a: Expansion, b: Expansion) -> float:
        """|f - g| in the kernel's space."""
        if a.points.shape == b.points.shape:  # twins share all points but one: no cancellation between equal ones
            same = (a.points == b.points).all(1)
            points = torch.cat([a.points, b.points[~same]])
            weights = torch.cat([torch.where(same, a.weights - b.weights, a.weights), -b.weights[~same]])
        else:
            points, weights = torch.cat([a.points, b.points]), torch.cat([a.weights, -b.weights])
        return math.sqrt(max(0.0, float(weights @ self.kernel(points, points) @ weights)))

    def losses(self, state: Expansion, data: Data) -> Tensor:
        """Half squared residuals, (n,)."""
        return _half_squares(self._residuals(state, data))

    def gradient_norms(self, state: Expansion, data: Data) -> Tensor:
        """|f(x_i) - y_i| sqrt(k(x_i, x_i)), (n,)."""
        diagonal = torch.stack([self.kernel(x[None], x[None])[0, 0] for x in data[0]])
        return self._residuals(state, data).abs() * diagonal.sqrt()

    def bounds(self, pair: Pair[Expansion]) -> list[Bound]:
        """The derived bound with the rate xi; kappa as for :class:`Ridge`."""
        kappa = max(float(self.gradient_norms(s, pair.points).max()) for s in (pair.state, pair.other))
        return [replace_one(kappa=kappa, n=len(pair.data[1]), mu=1.0, rate=self.decay, source=_PROVED, proved=True)]

    def _residuals(self, state: Expansion, data: Data) -> Tensor:
        return self.kernel(data[0], state.points) @ state.weights - data[1]


_PROVED = "the flow is linear, so the same everywhere"


def _half_squares(residuals: Tensor) -> Tensor:
    return 0.5 * residuals.square()


def _gram(data: Data) -> Tensor:
    return data[0].T @ data[0] / len(data[0])
