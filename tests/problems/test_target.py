from __future__ import annotations

import dataclasses
import math

import pytest

from pullback.problems import Budget, Evaluation, Problem, Run, SpecError, ValidationTarget, compare, run, summarise
from pullback.problems.target import met, name_of, rises


def test_accuracies_rise_and_the_rest_falls() -> None:
    assert rises("accuracy")
    assert not rises("loss")
    assert not rises("rmse")
    with pytest.raises(SpecError, match="whether slope should rise or fall is not known"):
        ValidationTarget("slope", 1.0)
    with pytest.raises(SpecError, match="finite"):
        ValidationTarget("loss", math.inf)


@pytest.mark.parametrize(
    ("target", "evaluation", "reached"),
    [
        (0.5, Evaluation(0, 0, 0.5, None), True),
        (0.5, Evaluation(0, 0, math.nan, None), False),
        (ValidationTarget("accuracy", 0.9), Evaluation(0, 0, 0.0, 1.0, 0.0, 0.89), False),
        (ValidationTarget("accuracy", 0.9), Evaluation(0, 0, 9.0, 0.0, 9.0, 0.9), True),
        (ValidationTarget("rmse", 0.9), Evaluation(0, 0, 9.0, 9.0, 9.0, 0.9), True),
        (ValidationTarget("rmse", 0.9), Evaluation(0, 0, 0.0, 0.0, 0.0, 0.91), False),
        (ValidationTarget("loss", 0.9), Evaluation(0, 0, 9.0, 9.0, 0.9, 9.0), True),
        (ValidationTarget("loss", 0.9), Evaluation(0, 0, 0.0, 0.0, 1.0, 0.0), False),
        (ValidationTarget("loss", 0.9), Evaluation(0, 0, 0.0, 0.0), False),
        (ValidationTarget("accuracy", 0.9), Evaluation(0, 0, 0.0, 0.0, 0.0, math.nan), False),
    ],
)
def test_met(target: float | ValidationTarget, evaluation: Evaluation, reached: bool) -> None:
    assert met(target, evaluation) is reached


def test_names() -> None:
    assert name_of(0.001) == "0.001"
    assert name_of(ValidationTarget("accuracy", 0.88)) == "validation accuracy 0.88"


def test_arrivals_are_recorded_and_summarised() -> None:
    level = ValidationTarget("accuracy", 0.8)
    rows = [(0.0, 0, 2.0, 0.9, 2.0, 0.1), (0.5, 10, 1.0, 0.9, 1.5, 0.8), (1.0, 20, 0.5, 0.9, 1.0, 0.7)]
    history = tuple(Evaluation(*row) for row in rows)
    one = Run("a", {}, 0, 20, 1.0, 1.0, history, (0.5,), validation_targets=(level,))
    two = dataclasses.replace(one, seed=1, history=history[:1])
    assert one.reached == {0.5: 1.0, level: 0.5}
    assert one.steps_to == {0.5: 20, level: 10}
    assert one.validation_score == 0.7
    assert one.to_json()["steps_to"] == {"0.5": 20, "validation accuracy 0.8": 10}
    (summary,) = summarise([one, two])
    arrival = summary.reached[level]
    assert (arrival.count, arrival.runs, arrival.steps, arrival.worst_steps) == (1, 2, None, None)
    assert summary.to_json()["reached"]["validation accuracy 0.8"]["count"] == 1
    assert summary.validation_score is not None
    assert summary.validation_score.median == pytest.approx(0.4)


def with_validation(line: Problem) -> Problem:
    x, y = line.train
    return dataclasses.replace(line, validation=(x[:3], y[:3]), test=None)


def test_a_run_may_end_at_levels_of_both_kinds(line: Problem) -> None:
    problem = with_validation(line)
    far, near = ValidationTarget("rmse", 1e-3), ValidationTarget("loss", 1e-2)
    ends = {}
    for name, until in {"near": near, "far": far, "all": [near, far, 1e-1], "float": 1e-1}.items():
        result = run(problem, "sgd:lr=0.3", budget=Budget(steps=900), until=until)
        last = result.history[-1]
        levels = until if isinstance(until, list) else [until]
        assert all(met(level, last) for level in levels)
        assert not all(met(level, result.history[-2]) for level in levels)
        ends[name] = result.steps
    assert ends["float"] < ends["far"] == ends["all"] < 900
    assert ends["near"] < ends["far"]


def test_evaluations_hold_the_loss_and_the_score_of_the_validation_data(line: Problem) -> None:
    problem = with_validation(line)
    result = run(problem, "sgd:lr=0.3", budget=Budget(steps=2))
    for evaluation in result.history:
        assert evaluation.validation is not None
        assert evaluation.validation_score == pytest.approx(evaluation.validation**0.5)
    wanted = dataclasses.replace(problem, validation_targets=(ValidationTarget("rmse", 1e-30),))
    (raced,) = compare(wanted, "sgd:lr=0.3", seeds=1, budget=Budget(steps=2)).runs
    assert raced.steps_to == {1.0: None, 1e-30: None, ValidationTarget("rmse", 1e-30): None}
    with pytest.raises(SpecError, match="targets on validation data and no such data"):
        dataclasses.replace(line, validation_targets=wanted.validation_targets)


def test_the_training_loss_may_be_reported_on_some_rows(line: Problem) -> None:
    x, y = line.train
    some = dataclasses.replace(line, reported=(x[:2], y[:2]))
    whole, part = (run(problem, "sgd:lr=0.1", budget=Budget(steps=2)) for problem in (line, some))
    model = line.build_model(0)
    assert part.history[0].loss == pytest.approx(line.loss(model(x[:2]), y[:2]).item(), rel=1e-12)
    # The steps are the same.
    assert part.test == whole.test
    with pytest.raises(SpecError, match="reported of line has 2 inputs and 1 targets"):
        dataclasses.replace(line, reported=(x[:2], y[:1]))
