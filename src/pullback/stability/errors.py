"""The error of stability and action: what was wrong, and the remedy."""

from __future__ import annotations

from pullback.errors import PullbackError


class StabilityError(PullbackError):
    """A bound, a pair of twins or an action was asked for that does not exist for these numbers."""
