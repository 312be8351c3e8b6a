"""Where things are printed, and how errors are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from pullback.errors import PullbackError


def stdout() -> Console:
    """The console for results.

    Returns:
        A new console, so that a redirected ``sys.stdout`` is respected.
    """
    return Console(highlight=False)


def stderr() -> Console:
    """The console for everything that is not a result: progress, notes, errors.

    Returns:
        A new console on ``sys.stderr``.
    """
    return Console(stderr=True, highlight=False)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns Ctrl-C, and errors this library raises on purpose, into one line on stderr and an exit code.

    Yields:
        Nothing.

    Raises:
        Exit: With code 2 in place of a `PullbackError`, 130 in place of a KeyboardInterrupt.
    """
    try:
        yield
    except PullbackError as error:
        _say(str(error))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        _say("interrupted")
        raise typer.Exit(130) from error


def _say(sentence: str) -> None:
    # Neither wrapped nor read as markup: the sentence may quote anything.
    stderr().print(f"pullback: {sentence}", markup=False, soft_wrap=True)
