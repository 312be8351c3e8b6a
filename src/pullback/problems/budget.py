"""How long a run may train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pullback.problems.errors import SpecError


@dataclass(frozen=True)
class Budget:
    """A limit on one run: exactly one of seconds, steps and epochs.

    Attributes:
        seconds: Charged seconds; the step that crosses the limit is the last.
        steps: Calls of the optimizer's ``step``.
        epochs: Passes over the training data; for a full-batch problem the same as steps.

    Raises:
        SpecError: If not exactly one of them is given, or it is not positive.
    """

    seconds: float | None = None
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.seconds, self.steps, self.epochs) if limit is not None]
        if len(limits) != 1:
            raise SpecError("a budget is exactly one of seconds, steps and epochs; give one of them.")
        if not (limits[0] > 0 and math.isfinite(limits[0])):
            raise SpecError(f"a budget must be positive and finite, not {limits[0]}; give a larger one.")

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """The number of steps this budget allows.

        Args:
            steps_per_epoch: Batches in one pass over the training data.

        Returns:
            The number of steps, or None for a budget in seconds.
        """
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        return self.steps

    def fraction(self, seconds: float, steps: int, steps_per_epoch: int) -> float:
        """How much of the budget is used.

        Args:
            seconds: Charged seconds so far.
            steps: Steps so far.
            steps_per_epoch: Batches in one pass over the training data.

        Returns:
            Zero at the beginning, one or more once the run must end.
        """
        if self.seconds is not None:
            return seconds / self.seconds
        total = self.total_steps(steps_per_epoch)
        assert total is not None
        return steps / total
