"""Levels whose time of arrival is reported: training losses, and scores on the validation data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pullback.problems.errors import SpecError, nearest

LOSS = "loss"
# Which way each quantity improves; of a function of one's own nobody knows.
_RISES = {LOSS: False, "accuracy": True, "rmse": False}


class Scored(Protocol):
    """What a level is held against."""

    @property
    def loss(self) -> float:
        """The loss on the training data."""

    @property
    def validation(self) -> float | None:
        """The loss on the validation data."""

    @property
    def validation_score(self) -> float | None:
        """The test metric on the validation data."""


def rises(quantity: str) -> bool:
    """Whether more of a quantity is better.

    Args:
        quantity: "loss", or the name of a test metric.

    Returns:
        True for the accuracy, False for losses and errors.

    Raises:
        SpecError: If it is neither.
    """
    if quantity not in _RISES:
        raise SpecError(
            f"whether {quantity} should rise or fall is not known; use the loss.{nearest(quantity, _RISES)}"
        )
    return _RISES[quantity]


@dataclass(frozen=True)
class ValidationTarget:
    """A level on the validation data.

    Attributes:
        quantity: "loss", or the name of the problem's test metric, "accuracy" or "rmse".
        level: What it must reach: an accuracy from below, a loss or an error from above.

    Raises:
        SpecError: If the way to better is not known, or the level is not finite.
    """

    quantity: str
    level: float

    def __post_init__(self) -> None:
        rises(self.quantity)
        if not math.isfinite(self.level):
            raise SpecError(f"a validation target must be a finite number, not {self.level}; give another.")

    def __str__(self) -> str:
        return f"validation {self.quantity} {self.level:g}"


Target: TypeAlias = float | ValidationTarget


def met(target: Target, evaluation: Scored) -> bool:
    """Whether an evaluation has reached a level.

    Args:
        target: A training loss, or a level on the validation data.
        evaluation: The evaluation.

    Returns:
        True if it is as good or better; False if it is not a number.
    """
    if not isinstance(target, ValidationTarget):
        return evaluation.loss <= target
    value = evaluation.validation if target.quantity == LOSS else evaluation.validation_score
    if value is None:
        return False
    return value >= target.level if rises(target.quantity) else value <= target.level


def name_of(target: Target) -> str:
    """Writes a level.

    Args:
        target: A training loss, or a level on the validation data.

    Returns:
        The bare number for a training loss, e.g. "0.01"; else e.g. "validation accuracy 0.88".
    """
    return str(target) if isinstance(target, ValidationTarget) else f"{target:g}"
