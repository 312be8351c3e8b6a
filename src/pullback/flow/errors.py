"""The error of flows: what was wrong, and the remedy."""

from __future__ import annotations

from pullback.errors import PullbackError


class FlowError(PullbackError):
    """A flow was asked for that does not exist for this model and these targets; the weights are as they were."""
