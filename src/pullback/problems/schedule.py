"""When to evaluate: often enough to see the curve, seldom enough to stay cheap."""

from __future__ import annotations

from pullback.problems.budget import Budget


class Schedule:
    """Says after which steps a run is evaluated.

    With mini-batches: after each epoch, which costs a third of the epoch or less. With the full batch: after
    each of the first 399 steps, then at intervals of a two-hundredth of the steps so far, so that times of
    arrival are known exactly, later to 0.5 %. Either way no more than a twentieth of the budget passes
    between two evaluations, so that a short run is a curve too.

    Args:
        budget: The limit of the run.
        steps_per_epoch: Batches in one pass over the training data.
    """

    _PARTS = 20
    _FINE = 200

    def __init__(self, budget: Budget, steps_per_epoch: int) -> None:
        self._budget = budget
        self._steps_per_epoch = steps_per_epoch
        self._last_step = 0
        self._last_part = 0

    def due(self, seconds: float, steps: int) -> bool:
        """Whether to evaluate now; saying so counts as having evaluated.

        Args:
            seconds: Charged seconds so far.
            steps: Steps so far.

        Returns:
            True if an evaluation is due.
        """
        fraction = self._budget.fraction(seconds, steps, self._steps_per_epoch)
        part = int(self._PARTS * fraction + 1e-9)  # 3/20 of a budget is 2.9999... parts in floats.
        if self._steps_per_epoch > 1:
            due = steps % self._steps_per_epoch == 0
        else:
            due = steps - self._last_step >= max(1, steps // self._FINE)
        if not due and part == self._last_part:
            return False
        self._last_step, self._last_part = steps, part
        return True
