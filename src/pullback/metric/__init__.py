"""Distances between predictions: square-root factors of output metrics, and which loss has which."""

from pullback.metric.base import ElementwiseMetric, OutputMetric
from pullback.metric.bernoulli import Bernoulli
from pullback.metric.categorical import Categorical
from pullback.metric.custom import Custom
from pullback.metric.empirical import Empirical
from pullback.metric.gaussian import Gaussian
from pullback.metric.heads import Heads
from pullback.metric.hessian import LossHessian
from pullback.metric.huber import Huber
from pullback.metric.poisson import Poisson
from pullback.metric.resolve import Criteria, Metrics, cell_weights, resolve, resolve_all
from pullback.metric.sampled import Sampled

__all__ = [
    "Bernoulli",
    "Categorical",
    "Criteria",
    "Custom",
    "ElementwiseMetric",
    "Empirical",
    "Gaussian",
    "Heads",
    "Huber",
    "LossHessian",
    "Metrics",
    "OutputMetric",
    "Poisson",
    "Sampled",
    "cell_weights",
    "resolve",
    "resolve_all",
]
