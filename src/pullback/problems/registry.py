"""The problems that have a name: a new one is one decorated function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pullback.problems.entry import Entry
from pullback.problems.errors import SpecError, nearest
from pullback.problems.options import parse_spec
from pullback.problems.problem import Problem
from pullback.problems.problem_file import is_file_spec, load_from_file

Factory = TypeVar("Factory", bound=Callable[..., Problem])


_ENTRIES: dict[str, Entry] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Gives a problem a name on the command line.

    The function's keyword arguments are the options, ``width=32`` after the name; an argument called ``data``
    receives the data folder. The first line of its docstring is the summary in ``pullback problems``.

    Args:
        name: Lower case, words joined by ``-``.

    Returns:
        The decorator, which returns the function unchanged.

    Raises:
        SpecError: If the name is taken.
    """

    def decorate(factory: Factory) -> Factory:
        if name in _ENTRIES:
            raise SpecError(f"there is already a problem called {name!r}; choose another name.")
        _ENTRIES[name] = Entry(name, factory)
        return factory

    return decorate


def entries() -> Iterator[Entry]:
    """The problems that have a name, in alphabetical order.

    Yields:
        One entry per problem; nothing is loaded.
    """
    for name in sorted(_ENTRIES):
        yield _ENTRIES[name]


def load_problem(text: str, data: str | Path | None = None) -> Problem:
    """Loads a problem from what the command line says.

    Args:
        text: ``name``, ``name:key=value,...``, ``file.py:function`` or ``file.py:function:key=value,...``.
        data: The data folder, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem.

    Raises:
        SpecError: If the name, the file, the function or an option does not exist.
        DataError: If a data file is missing or damaged.
        MissingExtraError: If the problem needs a package that is not installed.
    """
    folder = Path(data) if data is not None else None
    if is_file_spec(text):
        return load_from_file(text, folder)
    name, options = parse_spec(text)
    if name not in _ENTRIES:
        raise SpecError(f"there is no problem called {name!r}.{nearest(name, _ENTRIES)}")
    return _ENTRIES[name].make(options, folder)
