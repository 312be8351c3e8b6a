from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pullback.problems import Budget
from pullback.problems.schedule import Schedule


def evaluated(budget: Budget, steps_per_epoch: int, steps: int, seconds_per_step: float = 1.0) -> list[int]:
    schedule = Schedule(budget, steps_per_epoch)
    return [step for step in range(1, steps + 1) if schedule.due(step * seconds_per_step, step)]


def test_mini_batches_are_evaluated_by_the_epoch() -> None:
    assert evaluated(Budget(epochs=40), 12, 48) == [12, 24, 36, 48]


def test_a_short_run_is_a_curve_too() -> None:
    assert evaluated(Budget(steps=40), 469, 12) == [2, 4, 6, 8, 10, 12]
    assert evaluated(Budget(seconds=2.0), 469, 6, seconds_per_step=0.05) == [2, 4, 6]


@given(st.integers(1, 5000))
def test_the_full_batch_is_evaluated_ever_more_seldom(total: int) -> None:
    steps = evaluated(Budget(steps=total), 1, total)
    assert steps[: min(total, 399)] == list(range(1, min(total, 399) + 1))
    before = [0, *steps]
    assert all(b - a <= max(1, b / 200) for a, b in zip(before, steps, strict=False))
    assert len(steps) <= 420 + 300 * max(0.0, math.log(total / 399))
