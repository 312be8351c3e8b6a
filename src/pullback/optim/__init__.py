"""The torch.optim.Optimizer faces: thin, each a choice of the rooms below."""

from pullback.optim.base import PullbackOptimizer
from pullback.optim.feedback import FeedbackGaussNewton
from pullback.optim.games import KroneckerGame
from pullback.optim.gauss_newton import GaussNewton
from pullback.optim.kronecker import Kronecker
from pullback.optim.layerwise import LayerwiseMetric
from pullback.optim.ocnopt import OCNOpt, PolicyRecord
from pullback.optim.options import Damping, Momentum
from pullback.optim.record import Coverage, Covered, StepRecord
from pullback.optim.trust import Refresh, Trust

__all__ = [
    "Coverage",
    "Covered",
    "Damping",
    "FeedbackGaussNewton",
    "GaussNewton",
    "Kronecker",
    "KroneckerGame",
    "LayerwiseMetric",
    "Momentum",
    "OCNOpt",
    "PolicyRecord",
    "PullbackOptimizer",
    "Refresh",
    "StepRecord",
    "Trust",
]
