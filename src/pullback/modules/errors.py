"""What a composition may refuse."""

from pullback.errors import PullbackError


class CompositionError(PullbackError):
    """Modules were put together, or called, with states that do not fit; nothing was changed."""
