"""Constants that bounds are made of, measured on a model and its data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from pullback.metric import Metrics
from pullback.stability.bounds import Bound, replace_one, stated_scaling
from pullback.stability.fixed import FixedMetric
from pullback.stability.norms import chain_grams, is_chain
from pullback.stability.objective import Data, Objective, check_data
from pullback.stability.rows import PulledRows, largest_share


def gradient_bound(objective: Objective, thetas: Iterable[Tensor], data: Data) -> float:
    """kappa: the largest norm of a sample's gradient, over all samples and all places given.

    Args:
        objective: the loss; its decay belongs to no sample and is left out.
        thetas: packed weights.
        data: samples.
    """
    return max(float(objective.gradient_norms(theta, data).max()) for theta in thetas)


def output_lipschitz(objective: Objective, theta: Tensor, inputs: Tensor, chunk: int = 256) -> float:
    """The largest spectral norm of a sample's output Jacobian in the parameters, at one place.

    Args:
        objective: the model and its packing.
        theta: packed weights (K,).
        inputs: one row per sample.
        chunk: samples at a time; each takes outputs x K numbers.
    """

    def outputs(at: Tensor, x: Tensor) -> Tensor:
        z: Tensor = functional_call(objective.model, objective.unpack(at), (x[None],))
        return z.reshape(-1)

    best = 0.0
    if is_chain(objective.model, inputs):
        return math.sqrt(float(torch.linalg.eigvalsh(chain_grams(objective.moved(theta), inputs)).max()))
    for part in inputs.split(chunk):
        D = vmap(jacrev(outputs), (None, 0))(theta.detach(), part)
        best = max(best, float(torch.linalg.eigvalsh(D @ D.mT).max()))
    return math.sqrt(best)


def data_share(objective: Objective, theta: Tensor, data: Data, metric: Metrics = None) -> float:
    r"""B^2 of the layerwise metric :math:`\mu I + U_l^\top U_l`: the largest :math:`|u_i|^2` of a sample, over modules.

    Args:
        objective: model and criterion.
        theta: packed weights (K,).
        data: samples.
        metric: overrides the output metric that the criterion resolves to.
    """
    return largest_share(PulledRows(objective, metric).at(theta, data), len(data[0]))


@dataclass(frozen=True)
class Constants:
    """What was measured, and where.

    Attributes:
        n: samples.
        kappa: largest norm of a sample's gradient.
        mu: smallest eigenvalue of the metric.
        xi: smallest over largest eigenvalue of the metric.
        lipschitz: of the outputs in the parameters.
        rate: contraction rate, as given.
        source: where the rate comes from.
        B2: largest |u_i|^2 if the metric holds the data, else None.
        places: number of weights at which kappa, L and B^2 were measured: they are proved nowhere else.
    """

    n: int
    kappa: float
    mu: float
    xi: float
    lipschitz: float
    rate: float
    source: str
    B2: float | None
    places: int

    def bounds(self, time: float) -> list[Bound]:
        """The derived bound after a time of training, and the stated scaling beside it."""
        own = replace_one(
            kappa=self.kappa, n=self.n, mu=self.mu, rate=self.rate, time=time, B2=self.B2, source=self.source
        )
        return [own, stated_scaling(kappa=self.kappa, lipschitz=self.lipschitz, xi=self.xi, mu=self.mu, n=self.n)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words."""
        return asdict(self)


def measure(
    objective: Objective,
    thetas: Iterable[Tensor],
    data: Data,
    *,
    rate: float,
    source: str,
    metric: FixedMetric | None = None,
    mu: float | None = None,
) -> Constants:
    """Measure the constants of a model on data, at some weights.

    Args:
        objective: model and criterion.
        thetas: packed weights, along the path of training as a rule.
        data: samples.
        rate: contraction rate, from wherever.
        source: where from, in words.
        metric: the fixed metric; None for the identity, unless ``mu`` is given.
        mu: mass of the layerwise metric ``mu I + U_l^T U_l``, which holds the data; None for a fixed metric.

    Raises:
        StabilityError: if the data are less than two samples or not finite, or both metrics are given.
    """
    check_data(data)
    places = list(thetas)
    if mu is not None and metric is not None:
        raise ValueError("Give a fixed metric, or mu for the layerwise one, not both.")
    kappa = gradient_bound(objective, places, data)
    lipschitz = max(output_lipschitz(objective, theta, data[0]) for theta in places)
    n, count = len(data[0]), len(places)
    if mu is None:
        fixed = FixedMetric() if metric is None else metric
        return Constants(n, kappa, fixed.mu, fixed.xi, lipschitz, rate, source, None, count)
    FixedMetric(mu)  # refuses a mass that is not positive
    # The bound with data in the metric asks kappa to hold for the whole gradient too.
    kappa = max(kappa, *(float(objective.gradient(theta, data).norm()) for theta in places))
    rows = PulledRows(objective)
    shares, largest = [], mu
    for theta in places:
        groups = rows.at(theta, data)
        shares.append(largest_share(groups, n))
        for blocks in groups:
            largest = max(largest, mu + float(torch.linalg.eigvalsh(sum_of_grams(blocks))[-1]))
    return Constants(n, kappa, mu, mu / largest, lipschitz, rate, source, max(shares), count)


def sum_of_grams(blocks: Iterable[Any]) -> Tensor:
    """U U^T of blocks that move jointly, (R, R)."""
    grams = [block.gram() for block in blocks]
    return grams[0] if len(grams) == 1 else torch.stack(grams).sum(0)
