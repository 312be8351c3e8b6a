"""Distances between predictions: square-root factors of output metrics, and which loss has which."""

from pullback.metric.base import ElementwiseMetric, OutputMetric
from pullback.metric.bernoulli import Bernoulli
from pullback.metric.categorical import Categorical
from pullback.metric.custom import Custom
from pullback.metric.gaussian import Gaussian
from pullback.metric.resolve import cell_weights, resolve
from pullback.metric.sampled import Sampled

__all__ = [
    "Bernoulli",
    "Categorical",
    "Custom",
    "ElementwiseMetric",
    "Gaussian",
    "OutputMetric",
    "Sampled",
    "cell_weights",
    "resolve",
]
