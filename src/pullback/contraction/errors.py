"""The error of contraction: what was wrong, and the remedy."""

from __future__ import annotations

from pullback.errors import PullbackError


class ContractionError(PullbackError):
    """A rate or a guarantee was asked for that does not exist for these parts and this metric."""
