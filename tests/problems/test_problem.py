from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from pullback.problems import Budget, Problem, SpecError
from pullback.problems.problem import accuracy, rmse


def test_steps_per_epoch_and_budgets(line: Problem) -> None:
    assert (line.steps_per_epoch, line.default_budget) == (1, Budget(steps=200))
    batches = dataclasses.replace(line, batch_size=5)
    assert (batches.steps_per_epoch, batches.default_budget) == (3, Budget(epochs=20))
    assert dataclasses.replace(line, budget=Budget(steps=3)).default_budget == Budget(steps=3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"test_metric": "accurracy"}, "Did you mean 'accuracy'"),
        ({"dtype": torch.float32}, "convert the inputs"),
        ({"train": (torch.zeros(3, 1, dtype=torch.float64), torch.zeros(2, 1))}, "3 inputs and 2 targets"),
        ({"train": (torch.zeros(0, 1, dtype=torch.float64), torch.zeros(0, 1))}, "at least one"),
        ({"targets": (float("nan"),)}, "finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused(line: Problem, change: dict[str, Any], part: str) -> None:
    with pytest.raises(SpecError, match=part):
        dataclasses.replace(line, **change)


def test_metrics() -> None:
    assert accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 3.0], [3.0, 2.0]]), torch.tensor([1, 0, 0, 0])) == 0.75
    assert accuracy(torch.tensor([[2.0], [-2.0]]), torch.tensor([[1.0], [1.0]])) == 0.5
    assert rmse(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 3.0])) == pytest.approx(2**0.5)


def test_a_metric_may_be_a_function(line: Problem) -> None:
    def worst(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        return (outputs - targets).abs().max().item()

    changed = dataclasses.replace(line, test_metric=worst)
    assert changed.metric_name == "worst"
    assert changed.score(torch.ones(2), torch.zeros(2)) == 1.0
    assert line.metric_name == "rmse"


@pytest.mark.parametrize(
    "limits", [{}, {"steps": 1, "epochs": 1}, {"seconds": 0.0}, {"steps": -1}, {"seconds": float("inf")}]
)
def test_a_budget_is_one_positive_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="a budget"):
        Budget(**limits)


def test_fractions_of_a_budget() -> None:
    assert Budget(seconds=4).fraction(1.0, 99, 5) == 0.25
    assert Budget(steps=10).fraction(9.0, 5, 5) == 0.5
    assert Budget(epochs=2).fraction(9.0, 5, 5) == 0.5
    assert Budget(seconds=4).total_steps(5) is None


def test_a_problem_without_test_data(line: Problem) -> None:
    bare = Problem(
        name="bare",
        make_model=lambda seed: nn.Linear(1, 1),
        train=line.train,
        criterion=nn.MSELoss(),
        dtype=torch.float64,
    )
    assert bare.test is None
