"""Contraction: rates of flows, maps and training systems, and what they say about compositions (docs/theory 15)."""

from pullback.contraction.errors import ContractionError
from pullback.contraction.fit import Fitted, fit_metric
from pullback.contraction.guarantee import Block, Guarantee, Reason, linear_part, part
from pullback.contraction.metrics import Blocks, Factor, Metric
from pullback.contraction.rates import discrete_rate, rate_at
from pullback.contraction.record import Rate
from pullback.contraction.regions import Ball, Box, Region, Sampled
from pullback.contraction.rules import compose, gain, hierarchy, parallel, skew_feedback, small_gain
from pullback.contraction.training import training_rate
from pullback.contraction.worst import PathRates, RegionRate, rate_along, rate_over

__all__ = [
    "Ball",
    "Block",
    "Blocks",
    "Box",
    "ContractionError",
    "Factor",
    "Fitted",
    "Guarantee",
    "Metric",
    "PathRates",
    "Rate",
    "Reason",
    "Region",
    "RegionRate",
    "Sampled",
    "compose",
    "discrete_rate",
    "fit_metric",
    "gain",
    "hierarchy",
    "linear_part",
    "parallel",
    "part",
    "rate_along",
    "rate_at",
    "rate_over",
    "skew_feedback",
    "small_gain",
    "training_rate",
]
