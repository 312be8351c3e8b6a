"""An optimizer and its options, as written on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pullback.problems.errors import SpecError
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.options import Value, format_spec, parse_spec


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and its options.

    Attributes:
        name: One of the names that ``pullback optimizers`` lists.
        options: Options other than their defaults.

    Raises:
        SpecError: If the name, an option or the type of a value does not exist.
        MissingExtraError: If the optimizer is in a package that is not installed.
    """

    name: str
    options: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        optimizer_entry(self.name).check(self.options)

    @property
    def label(self) -> str:
        """``name:key=value,...``, the bare name without options."""
        return format_spec(self.name, self.options)


def parse_optimizer(text: str) -> OptimizerSpec:
    """Reads one optimizer, ``name:key=value,...``.

    Args:
        text: For instance ``adam:lr=3e-3,betas=0.9/0.99``.

    Returns:
        The optimizer.

    Raises:
        SpecError: If it is no optimizer, or more than one.
        MissingExtraError: If the optimizer is in a package that is not installed.
    """
    found = parse_optimizers(text)
    if len(found) != 1:
        raise SpecError(f"{text!r} names {len(found)} optimizers where one is wanted; give one.")
    return found[0]


def parse_optimizers(text: str) -> list[OptimizerSpec]:
    """Reads optimizers separated by commas, which also separate the options of one.

    A token that contains ``=`` and no name before a colon continues the options of the optimizer before it,
    so ``layerwise-metric:samples=1,damping=0.1,adam:lr=3e-3`` is two optimizers.

    Args:
        text: The list.

    Returns:
        The optimizers, in the order written.

    Raises:
        SpecError: If a name or an option does not exist, an optimizer comes twice, or there is none.
        MissingExtraError: If an optimizer is in a package that is not installed.
    """
    specs = [OptimizerSpec(*parse_spec(part)) for part in split_optimizers(text)]
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise SpecError(f"{label} is listed twice; keep one, or give them different options.")
    return specs


def split_optimizers(text: str) -> list[str]:
    """Parts a list of optimizers, whose commas also separate the options of one.

    Args:
        text: The list, as `parse_optimizers` has it.

    Returns:
        One ``name:key=value,...`` per optimizer, unchecked.

    Raises:
        SpecError: If an option comes before any optimizer, or there is nothing between two commas.
    """
    groups: list[list[str]] = []
    for token in text.split(","):
        if not token.strip():
            raise SpecError(f"{text!r} has nothing between two commas or at an end; drop the comma.")
        if "=" in token and ":" not in token.partition("=")[0]:
            if not groups:
                raise SpecError(f"{token.strip()!r} is an option before any optimizer; write name:{token.strip()}.")
            groups[-1].append(token)
        else:
            groups.append([token])
    return [_join(group) for group in groups]


def _join(group: Iterable[str]) -> str:
    name, *options = (token.strip() for token in group)
    return f"{name}{',' if ':' in name else ':'}{','.join(options)}" if options else name
