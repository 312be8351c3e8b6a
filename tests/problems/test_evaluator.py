from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pullback.problems import Budget, Problem, SpecError, compare, run

Fake = Callable[[str, Callable[..., Any]], None]
THREE = Budget(steps=3)


def offset(shift: float, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, rows, dtype=torch.float64).unsqueeze(1)
    return x, 3 * x + 1 + shift


def test_the_scale_of_the_loss_is_trained_and_reported(line: Problem) -> None:
    half = dataclasses.replace(line, loss_scale=0.5)
    whole, scaled = (run(p, "sgd:lr=0.1", budget=THREE).history for p in (line, half))
    assert scaled[0].loss == pytest.approx(0.5 * whole[0].loss, rel=1e-15)
    twice = run(half, "sgd:lr=0.2", budget=THREE).history
    assert twice[-1].loss == pytest.approx(0.5 * whole[-1].loss, rel=1e-12)
    # A quadratic: one undamped step of ours finds the minimum whatever the scale.
    assert (run(half, "gauss-newton:damping=1e-12", budget=Budget(steps=2)).loss or 0.0) < 1e-20
    with pytest.raises(SpecError, match="loss_scale of line is 0"):
        dataclasses.replace(line, loss_scale=0.0)


def test_a_sealed_test_split_is_scored_once_with_the_weights_chosen_on_validation(line: Problem, fake: Fake) -> None:
    class Passes(torch.optim.SGD):
        """Sets the bias to 0, 1, 2: the validation targets are best at 1, the training targets at 2."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.calls = 0

        def step(self, closure: Any = None) -> None:
            weight, bias = self.param_groups[0]["params"]
            with torch.no_grad():
                weight.fill_(3.0)
                bias.fill_(self.calls)
            self.calls += 1

    fake("passes", Passes)
    sealed = dataclasses.replace(line, sealed=True, train=offset(1.0), validation=offset(0.0), test=offset(0.25))
    result = run(sealed, "passes", budget=THREE)
    assert [evaluation.test for evaluation in result.history[:-1]] == [None] * 3
    assert result.history[2].validation == pytest.approx(0.0, abs=1e-15)
    assert result.loss == pytest.approx(0.0, abs=1e-15)
    assert result.test == pytest.approx(0.25)
    last = run(dataclasses.replace(sealed, validation=None), "passes", budget=THREE)
    assert [evaluation.test for evaluation in last.history] == [None, None, None, pytest.approx(0.75)]
    seen = run(dataclasses.replace(sealed, sealed=False), "passes", budget=THREE)
    assert seen.history[2].test == pytest.approx(0.25)
    assert seen.test == pytest.approx(0.75)
    assert len(result.to_json()["history"][0]) == 6


def test_a_failed_run_leaves_the_test_split_sealed(line: Problem) -> None:
    result = run(dataclasses.replace(line, sealed=True), "sgd:lr=1e300", budget=THREE)
    assert result.failure is not None
    assert result.test is None


def test_a_metric_of_the_model(line: Problem) -> None:
    def slope_error(model: nn.Module) -> float:
        assert not model.training
        return abs(float(model.weight) - 3.0)

    problem = dataclasses.replace(line, test=None, model_metric=slope_error)
    assert problem.metric_name == "slope_error"
    assert (run(problem, "gauss-newton:damping=1e-12", budget=THREE).test or 0.0) < 1e-10
    with pytest.raises(SpecError, match="keep one"):
        dataclasses.replace(line, model_metric=slope_error)


def test_every_seed_may_have_its_own_data(line: Problem) -> None:
    def redraw(seed: int) -> Problem:
        if seed > 2:
            raise SpecError("line has 3 splits; give fewer seeds.")
        return dataclasses.replace(line, train=offset(seed), name="inner", targets=())

    problem = dataclasses.replace(line, redraw=redraw)
    runs = compare(problem, "gauss-newton:damping=1e-12,lr=1", seeds=3, budget=THREE).runs
    assert len({entry.history[0].loss for entry in runs}) == 3
    assert all(entry.targets == line.targets and (entry.loss or 0) < 1e-12 for entry in runs)
    assert problem.for_seed(1).name == "line"
    assert line.for_seed(1) is line
    steps: list[object] = []
    with pytest.raises(SpecError, match="give fewer seeds"):
        compare(problem, "sgd", seeds=4, budget=THREE, progress=steps.append)
    assert not steps


def test_a_run_may_end_at_a_loss(line: Problem) -> None:
    result = run(line, "sgd:lr=0.5", budget=Budget(steps=500), until=1e-2)
    assert result.steps < 50
    assert result.loss is not None
    assert result.loss <= 1e-2 < result.history[-2].loss
    assert result.steps_to[1.0] == (result.arrival(1.0) or result.history[0]).step
    assert result.steps_to[1e-30] is None
    told: list[float] = []
    run(line, "sgd:lr=0.5", budget=Budget(steps=500), until=1e-2, progress=lambda p: told.append(p.fraction))
    assert told[-1] == 1.0
    assert sum(fraction >= 1 for fraction in told) == 1


@pytest.mark.parametrize(("optimizer", "least"), [("gauss-newton", 1.0), ("lbfgs", 2.0), ("sgd", None)])
def test_trials_are_counted(line: Problem, optimizer: str, least: float | None) -> None:
    result = run(line, optimizer, budget=THREE)
    assert result.steps == 3
    if least is None:
        assert result.trials_per_step is None
    else:
        assert result.trials_per_step is not None
        assert result.trials_per_step >= least
