"""pullback: train systems of modules with the geometry they really have.

A metric of the outputs is pulled back through the modules, beside the gradient, and inverted in the small
space it came from. See the README for the loop and ``docs/`` for the mathematics.
"""

from pullback.control import BellmanStage, Game, bellman, stages_of
from pullback.errors import CoverageError, MetricError, MixingError, PullbackError, SolverError, StepError
from pullback.metric import (
    Bernoulli,
    Categorical,
    Custom,
    Empirical,
    Gaussian,
    Huber,
    LossHessian,
    OutputMetric,
    Poisson,
    Sampled,
)
from pullback.optim import (
    Coverage,
    Damping,
    FeedbackGaussNewton,
    GaussNewton,
    Kronecker,
    KroneckerGame,
    LayerwiseMetric,
    Momentum,
    OCNOpt,
    PolicyRecord,
    Refresh,
    StepRecord,
    Trust,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "BellmanStage",
    "Bernoulli",
    "Categorical",
    "Coverage",
    "CoverageError",
    "Custom",
    "Damping",
    "Empirical",
    "FeedbackGaussNewton",
    "Game",
    "GaussNewton",
    "Gaussian",
    "Huber",
    "Kronecker",
    "KroneckerGame",
    "LayerwiseMetric",
    "LossHessian",
    "MetricError",
    "MixingError",
    "Momentum",
    "OCNOpt",
    "OutputMetric",
    "Poisson",
    "PolicyRecord",
    "PullbackError",
    "Refresh",
    "Sampled",
    "SolverError",
    "StepError",
    "StepRecord",
    "Trust",
    "__version__",
    "bellman",
    "stages_of",
]
