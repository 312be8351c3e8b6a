"""The torch.optim.Optimizer faces: thin, each a choice of the rooms below."""

from pullback.optim.base import PullbackOptimizer
from pullback.optim.feedback import FeedbackGaussNewton
from pullback.optim.gauss_newton import GaussNewton
from pullback.optim.layerwise import LayerwiseMetric
from pullback.optim.options import Damping, Momentum
from pullback.optim.record import Coverage, Covered, StepRecord

__all__ = [
    "Coverage",
    "Covered",
    "Damping",
    "FeedbackGaussNewton",
    "GaussNewton",
    "LayerwiseMetric",
    "Momentum",
    "PullbackOptimizer",
    "StepRecord",
]
