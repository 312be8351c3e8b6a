"""pullback: train systems of modules with the geometry they really have.

A metric of the outputs is pulled back through the modules, beside the gradient, and inverted in the small
space it came from. See the README for the loop and ``docs/`` for the mathematics.
"""

from pullback.control import BellmanStage, bellman
from pullback.errors import CoverageError, MetricError, MixingError, PullbackError, StepError
from pullback.metric import (
    Bernoulli,
    Categorical,
    Custom,
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
    LayerwiseMetric,
    Momentum,
    StepRecord,
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
    "FeedbackGaussNewton",
    "GaussNewton",
    "Gaussian",
    "Huber",
    "LayerwiseMetric",
    "LossHessian",
    "MetricError",
    "MixingError",
    "Momentum",
    "OutputMetric",
    "Poisson",
    "PullbackError",
    "Sampled",
    "StepError",
    "StepRecord",
    "__version__",
    "bellman",
]
