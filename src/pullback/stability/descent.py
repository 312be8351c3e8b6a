r"""Steps :math:`\theta - h M^{-1} \nabla L` in a fixed metric, with bounds from what their own path measures.

With :math:`\Phi` the step on the first data set and :math:`\delta_k` the distance of the twins before step k,

.. math:: \delta_{k+1} = \Phi(\theta_k) - \Phi(\theta_k') - \tfrac{h}{n} M^{-1} (\nabla l_j - \nabla l_j')(\theta_k')

so that :math:`|\delta_{k+1}|_M \le q_k |\delta_k|_M + 2 \kappa_k h / (n \sqrt\mu)`. For a given pair the factor
:math:`q_k = |\Phi(\theta_k) - \Phi(\theta_k')|_M / |\delta_k|_M` takes one more gradient and no eigenvalue: that bound
assumes nothing. For any pair it is replaced by the spectrum of :math:`I - h M^{-1} \nabla^2 L` between the twins, which
is only sampled (docs/theory 16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pullback.stability.bounds import Bound, along_steps, stated_scaling
from pullback.stability.constants import output_lipschitz
from pullback.stability.errors import StabilityError
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Data, Objective
from pullback.stability.twins import Pair

#: Takes packed weights and data to the smallest and largest eigenvalue of M^{-1} times the Hessian of L.
Spectrum = Callable[[Tensor, Data], tuple[float, float]]

PATHWISE = "along the pair"
SPECTRAL = "sampled spectrum"
_PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Trail:
    """Weights along steps of one length.

    Attributes:
        thetas: packed weights, one more than steps.
        h: length of a step.
    """

    thetas: list[Tensor]
    h: float

    @property
    def end(self) -> Tensor:
        """The trained weights, (K,)."""
        return self.thetas[-1]


class Descent:
    """Full-batch steps in a fixed metric from fixed weights.

    Args:
        objective: the loss with its decay.
        start: packed weights it begins at, (K,); None for the model's own.
        steps: how many, at least one.
        h: their length.
        metric: the metric; None for the identity.
        spectrum: eigenvalues of M^{-1} times the Hessian, for the bound from rates; None leaves that bound out.
        every: steps between two evaluations of ``spectrum``.
        scaling: whether to evaluate P's stated scaling too.

    Raises:
        StabilityError: if steps or h make no sense.
    """

    def __init__(
        self,
        objective: Objective,
        start: Tensor | None = None,
        *,
        steps: int,
        h: float,
        metric: FixedMetric | None = None,
        spectrum: Spectrum | None = None,
        every: int = 10,
        scaling: bool = True,
    ) -> None:
        if steps < 1 or every < 1 or not h > 0:
            raise StabilityError(f"steps is {steps}, every {every} and h {h}; give at least one and a positive length.")
        self.objective, self.steps, self.h = objective, steps, h
        self.start = objective.get() if start is None else start
        self.metric = FixedMetric() if metric is None else metric
        self.spectrum, self.every, self.scaling = spectrum, every, scaling

    def step(self, theta: Tensor, data: Data) -> Tensor:
        """One step from packed weights, (K,)."""
        return theta - self.h * self.metric.solve(self.objective.gradient(theta, data))

    def train(self, data: Data) -> Trail:
        """See :class:`~pullback.stability.Learner`."""
        thetas = [self.start]
        for _ in range(self.steps):
            thetas.append(self.step(thetas[-1], data))
        return Trail(thetas, self.h)

    def distance(self, a: Trail, b: Trail) -> float:
        """Euclidean, of the trained weights."""
        return float((a.end - b.end).norm())

    def losses(self, state: Trail, data: Data) -> Tensor:
        """Without decay. See :class:`~pullback.stability.Learner`."""
        return self.objective.losses(state.end, data)

    def bounds(self, pair: Pair[Trail]) -> list[Bound]:
        """The bound along the pair; with a spectrum that from rates; P's scaling."""
        n, kappas = len(pair.data[0]), self.kappas(pair)
        end = self._between(pair)
        promise = partial(along_steps, [self.h] * self.steps, n=n, mu=self.metric.mu, kappa_end=end)
        found = [promise(self.factors(pair), kappas, name=PATHWISE, source=_SECANT, proved=True, of_loss=_ENDS)]
        if self.spectrum is not None:
            factors = self.spectral_factors(pair)
            found.append(promise(factors, kappas, name=SPECTRAL, source=self._sampled(), of_loss=_ENDS))
        if self.scaling:
            L = output_lipschitz(self.objective, pair.state.end, pair.data[0])
            found.append(
                stated_scaling(kappa=max(*kappas, end), lipschitz=L, xi=self.metric.xi, mu=self.metric.mu, n=n)
            )
        return found

    def kappas(self, pair: Pair[Trail]) -> list[float]:
        """The largest norm of a sample's gradient of both data sets, where the second twin stands before each step."""
        union = pair.union()
        return [float(self.objective.gradient_norms(theta, union).max()) for theta in pair.other.thetas[:-1]]

    def factors(self, pair: Pair[Trail]) -> list[float]:
        """What each step on the first data set did to the distance of these twins.

        The second twin's own step is known; on the first data set it differs by one sample's gradient.
        """
        n, here = len(pair.data[0]), slice(pair.index, pair.index + 1)
        ours, theirs = ((x[here], y[here]) for x, y in (pair.data, pair.twin))
        out = []
        for k in range(self.steps):
            a, b = pair.state.thetas[k], pair.other.thetas[k]
            apart = self.metric.norm(a - b)
            if apart == 0:
                out.append(1.0)
                continue
            change = self.objective.gradient(b, ours) - self.objective.gradient(b, theirs)
            stepped = pair.other.thetas[k + 1] - self.h / n * self.metric.solve(change)
            out.append(self.metric.norm(pair.state.thetas[k + 1] - stepped) / apart)
        return out

    def spectral_factors(self, pair: Pair[Trail]) -> list[float]:
        """The norm of I - h M^{-1} Hessian halfway between the twins, every so many steps, held until the next."""
        assert self.spectrum is not None
        out: list[float] = []
        for k in range(0, self.steps, self.every):
            low, high = self.spectrum((pair.state.thetas[k] + pair.other.thetas[k]) / 2, pair.data)
            out += [max(abs(1 - self.h * low), abs(1 - self.h * high))] * min(self.every, self.steps - k)
        return out

    def _between(self, pair: Pair[Trail]) -> float:
        """The largest gradient of a compared loss, at five places between the two ends."""
        a, b = pair.state.end, pair.other.end
        places = [a + s * (b - a) for s in _PLACES]
        return max(float(self.objective.gradient_norms(theta, pair.points).max()) for theta in places)

    def _sampled(self) -> str:
        return f"eigenvalues halfway between the twins, every {self.every} steps"


_SECANT = "what the steps did to this very pair"
_ENDS = ("kappa of the losses, at five places between the two ends",)


class Training:
    """Any training as a learner: measured twins, and the bounds that you know for them.

    Args:
        objective: the loss.
        train: takes data to trained packed weights (K,); the same data must give the same weights.
        bounds: takes a pair to bounds; None for none.
    """

    def __init__(
        self,
        objective: Objective,
        train: Callable[[Data], Tensor],
        bounds: Callable[[Pair[Tensor]], list[Bound]] | None = None,
    ) -> None:
        self.objective, self._train, self._bounds = objective, train, bounds

    def train(self, data: Data) -> Tensor:
        """See :class:`~pullback.stability.Learner`.

        Raises:
            StabilityError: if the trained weights are not finite.
        """
        theta = self._train(data)
        if not bool(torch.isfinite(theta).all()):
            raise StabilityError("The trained weights are not finite; take shorter steps, or look for bad data.")
        return theta.detach().clone()

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Euclidean."""
        return float((a - b).norm())

    def losses(self, state: Tensor, data: Data) -> Tensor:
        """Without decay. See :class:`~pullback.stability.Learner`."""
        return self.objective.losses(state, data)

    def bounds(self, pair: Pair[Tensor]) -> list[Bound]:
        """The bounds that were given."""
        return [] if self._bounds is None else self._bounds(pair)
