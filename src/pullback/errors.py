"""The errors users see. Each message says what was wrong, with both shapes where there are two, and the remedy."""

from __future__ import annotations


class PullbackError(RuntimeError):
    """Base class of every error this library raises on purpose."""


class CoverageError(PullbackError):
    """A parameter or a module cannot be given its share of the metric."""


class MixingError(CoverageError):
    """A layer makes one sample's output depend on another sample, so the metric has no rows."""


class MetricError(PullbackError):
    """The output metric does not fit the loss, the prediction or the target."""


class StepError(PullbackError):
    """A step was asked for that cannot be taken; weights and state are as they were."""
