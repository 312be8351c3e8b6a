"""Errors whose message is the whole story: what was wrong, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pullback.errors import PullbackError


class SpecError(PullbackError, ValueError):
    """A problem, optimizer, option or budget was written in a way that means nothing."""


class DataError(PullbackError):
    """A data file is missing or damaged."""


class MissingExtraError(PullbackError, ImportError):
    """An optional dependency is not installed."""


def missing_extra(what: str, package: str, extra: str) -> MissingExtraError:
    """Makes the error for an optional dependency that is not installed.

    Args:
        what: What needs it, as the subject of the sentence, e.g. "the problem wine".
        package: The distribution that could not be imported.
        extra: The extra of pullback which brings it.

    Returns:
        The error, ready to be raised.
    """
    return MissingExtraError(f'{what} needs {package}: pip install "pullback[{extra}]"')


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Says which known name was probably meant.

    Args:
        word: What was written.
        candidates: The names that exist.

    Returns:
        " Did you mean 'x'?", or " Known: ..." where nothing is close; it begins with a space, to be appended.
    """
    known = sorted(candidates)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""


def one_line(error: BaseException) -> str:
    """Describes an exception on one line.

    Args:
        error: The exception.

    Returns:
        Its type and the first line of its message.
    """
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
