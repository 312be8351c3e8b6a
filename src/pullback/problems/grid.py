"""Several values per option: ``name:key=a|b,key=c|d``, and every optimizer that this means."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from pullback.problems.errors import SpecError
from pullback.problems.optimizer_spec import OptimizerSpec, split_optimizers
from pullback.problems.options import Value, format_spec, parse_spec, parse_value


@dataclass(frozen=True)
class Grid:
    """An optimizer and the values that each of its options takes.

    Attributes:
        name: One of the names that ``pullback optimizers`` lists.
        values: For each option its values, in the order written; none twice.

    Raises:
        SpecError: If the name, an option or the type of a value does not exist.
        MissingExtraError: If the optimizer is in a package that is not installed.
    """

    name: str
    values: dict[str, tuple[Value, ...]]

    def __post_init__(self) -> None:
        self.specs()

    @property
    def axes(self) -> tuple[str, ...]:
        """The options with more than one value."""
        return tuple(key for key, values in self.values.items() if len(values) > 1)

    @property
    def label(self) -> str:
        """``name:key=value,...`` with the options that have one value, the bare name without such."""
        return format_spec(self.name, {key: values[0] for key, values in self.values.items() if len(values) == 1})

    def specs(self) -> list[OptimizerSpec]:
        """Every combination of the values.

        Returns:
            The optimizers, the last option changing fastest.
        """
        combinations = itertools.product(*self.values.values())
        return [OptimizerSpec(self.name, dict(zip(self.values, chosen, strict=True))) for chosen in combinations]


def parse_grid(text: str) -> list[Grid]:
    """Reads grids, written like a list of optimizers but with ``|`` between the values of an option.

    ``|`` binds less than ``/``, which joins the numbers of one value: ``betas=0.9/0.99|0.9/0.999`` is two.

    Args:
        text: For instance ``adam:lr=1e-3|1e-2,weight_decay=0|1e-4,sgd:lr=0.1``.

    Returns:
        The grids, in the order written.

    Raises:
        SpecError: If a name or an option does not exist, a value is empty or comes twice, or an optimizer does.
        MissingExtraError: If an optimizer is in a package that is not installed.
    """
    grids: list[Grid] = []
    for part in split_optimizers(text):
        name, options = parse_spec(part)
        if any(name == grid.name for grid in grids):
            raise SpecError(f"{name} has two grids; write all its values in one, such as {name}:lr=0.1|0.01.")
        grids.append(Grid(name, {key: _values(name, key, value) for key, value in options.items()}))
    return grids


def _values(name: str, key: str, value: Value) -> tuple[Value, ...]:
    if not isinstance(value, str):
        return (value,)
    parts = value.split("|")
    if not all(part.strip() for part in parts):
        raise SpecError(f"{key} of {name} is {value!r}, with nothing on one side of a bar; drop the bar.")
    values = tuple(parse_value(part) for part in parts)
    if len(set(values)) < len(values):
        raise SpecError(f"{key} of {name} is {value!r}, with one value twice; keep one.")
    return values
