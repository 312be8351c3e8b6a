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


class ManifoldError(PullbackError):
    """A point is not on its manifold, or a parameter on one is met by something that would move it off."""


class SolverError(StepError):
    """An ODE could not be solved as asked; weights and times are as they were.

    Attributes:
        time: t at which the solver gave up, nan where there is no such time.
        undone: whether an optimizer has put weights and times back to those before its last step, since these may be
            the reason; then going on with the next pass is the remedy.
    """

    def __init__(self, message: str, time: float = float("nan")) -> None:
        super().__init__(message)
        self.time = time
        self.undone = False

    def add(self, words: str) -> None:
        """Say more, on the way to the user."""
        self.args = (f"{self} {words}",)
