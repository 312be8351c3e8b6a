"""A function that makes a problem, and the options its signature offers."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pullback.problems.errors import SpecError
from pullback.problems.options import Value, check_options, format_spec
from pullback.problems.problem import Problem


@dataclass(frozen=True)
class Entry:
    """A function that makes a problem.

    Attributes:
        name: What the command line calls it.
        factory: Makes the problem; its arguments are the options of the problem, but ``data``, which receives
            the data folder (a `Path` or None).
    """

    name: str
    factory: Callable[..., Problem]

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0].rstrip(".")

    @property
    def needs_data(self) -> bool:
        """Whether the problem reads a data folder."""
        return "data" in inspect.signature(self.factory).parameters

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The options: every named argument but ``data``."""
        every = inspect.signature(self.factory).parameters
        unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {key: value for key, value in every.items() if key != "data" and value.kind not in unnamed}

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The words an option may be, of options that say so; the default first."""
        hints = typing.get_type_hints(self.factory)
        words = {
            key: [word for word in typing.get_args(hints[key]) if word != parameter.default]
            for key, parameter in self.parameters.items()
            if typing.get_origin(hints.get(key)) is typing.Literal
        }
        return {key: (str(self.parameters[key].default), *others) for key, others in words.items()}

    def make(self, options: Mapping[str, Value], data: Path | None = None) -> Problem:
        """Makes the problem.

        Args:
            options: Arguments of the factory; its type hints are checked.
            data: The data folder, or None for the environment variable PULLBACK_DATA.

        Returns:
            The problem, its options added to its name.

        Raises:
            SpecError: If an option is unknown, missing or of the wrong type, or the factory returns something
                else.
            DataError: If a data file is missing or damaged.
            MissingExtraError: If the problem needs a package that is not installed.
        """
        hints = typing.get_type_hints(self.factory)
        checked = check_options(self.name, options, {key: hints.get(key, Any) for key in self.parameters})
        for key, parameter in self.parameters.items():
            if parameter.default is parameter.empty and key not in options:
                raise SpecError(f"{self.name} needs the option {key!r}; write {self.name}:{key}=...")
        problem: object = self.factory(**checked, **({"data": data} if self.needs_data else {}))
        if not isinstance(problem, Problem):
            raise SpecError(f"{self.name} returned {type(problem).__name__}; it must return a pullback Problem.")
        return replace(problem, name=format_spec(problem.name, options)) if options else problem
