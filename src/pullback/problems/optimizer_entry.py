"""An optimizer that has a name: where its options come from and how it is built."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from pullback.problems.errors import SpecError
from pullback.problems.options import Value, check_options

# Arguments that are no choice of a command line: what is trained, objects, and switches that change what is
# minimised.
_HIDDEN = {
    "self",
    "params",
    "model",
    "criterion",
    "metric",
    "fallback",
    "grad_scaler",
    "maximize",
    "capturable",
    "differentiable",
    "seed",
}


class Stepper(Protocol):
    """What the training loop asks of an optimizer."""

    def zero_grad(self) -> None:
        """Forgets the gradients."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step."""


_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _signatures(source: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions whose arguments are options: a constructor, and those it passes its ``**options`` on to."""
    if not inspect.isclass(source):
        yield source
        return
    for kind in source.__mro__:
        own = vars(kind).get("__init__")
        if own is None or kind is object:
            continue
        yield own
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in inspect.signature(own).parameters.values()):
            return


@dataclass(frozen=True)
class Option:
    """An option of an optimizer.

    Attributes:
        hint: The type of the value.
        default: The value if none is written.
    """

    hint: Any
    default: Any


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer that has a name.

    Attributes:
        name: What the command line calls it.
        summary: One line.
        source: Imports and returns the class whose signature lists the options.
        build: Makes the optimizer from the model, the criterion and the options that are to be passed.
        extra: Options that the signature lacks, or whose type or default is another here; always passed to
            `build`.
        closure: Whether ``step`` wants a closure that computes loss and gradients.
    """

    name: str
    summary: str
    source: Callable[[], Callable[..., Any]]
    build: Callable[[nn.Module, nn.Module, dict[str, Any]], Stepper]
    extra: Mapping[str, Option] = field(default_factory=dict)
    closure: bool = False

    def options(self) -> dict[str, Option]:
        """The options that exist.

        Returns:
            The options by name, in the order of the signature.

        Raises:
            MissingExtraError: If the optimizer is in a package that is not installed.
        """
        found: dict[str, Option] = {}
        for maker in _signatures(self.source()):
            hints = typing.get_type_hints(maker)
            for parameter in inspect.signature(maker).parameters.values():
                if parameter.name not in _HIDDEN and parameter.kind not in _UNNAMED:
                    found.setdefault(parameter.name, Option(hints.get(parameter.name, Any), parameter.default))
        return {**found, **self.extra}

    def check(self, options: Mapping[str, Value]) -> dict[str, Any]:
        """Checks names and types of options.

        Args:
            options: What was written after the colon.

        Returns:
            What to pass to `build`.

        Raises:
            SpecError: If an option is unknown or of the wrong type.
            MissingExtraError: If the optimizer is in a package that is not installed.
        """
        checked = check_options(self.name, options, {key: option.hint for key, option in self.options().items()})
        return {key: option.default for key, option in self.extra.items()} | checked

    def make(self, options: Mapping[str, Value], model: nn.Module, criterion: nn.Module) -> Stepper:
        """Makes the optimizer.

        Args:
            options: What was written after the colon.
            model: The model to train.
            criterion: The loss module that the training loop calls.

        Returns:
            The optimizer.

        Raises:
            SpecError: If an option is unknown or of the wrong type, or the optimizer refuses it.
            MissingExtraError: If the optimizer is in a package that is not installed.
        """
        checked = self.check(options)
        try:
            return self.build(model, criterion, checked)
        except (ValueError, TypeError) as error:
            raise SpecError(f"{self.name} refuses: {str(error).partition(chr(10))[0]}") from error
