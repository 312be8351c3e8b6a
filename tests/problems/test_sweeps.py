from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from pullback.problems import (
    Budget,
    Comparison,
    Evaluation,
    Measure,
    Problem,
    Run,
    SpecError,
    Sweep,
    compare,
    parse_grid,
)


def run_of(lr: float, seed: int, loss: float, score: float | None = None, failure: str | None = None) -> Run:
    history = (Evaluation(0.0, 0, 2.0, 0.1, 2.0, 0.1), Evaluation(1.0, 9, loss, score, loss + 1, score))
    return Run("sgd", {"lr": lr}, seed, 9, 1.0, 1.0, history, (), failure)


LOSS = Measure("loss", "loss")


def swept(*runs: Run, by: Measure = LOSS, grid: str = "sgd:lr=0.1|1") -> Sweep:
    return Sweep(Comparison("digits", "accuracy", {"threads": 1}, runs), tuple(parse_grid(grid)), by)


def test_a_failed_seed_is_worse_than_all_others() -> None:
    sweep = swept(
        *(run_of(0.1, seed, loss) for seed, loss in enumerate((0.3, 0.1, 0.2))),
        run_of(1.0, 0, 0.01),
        run_of(1.0, 1, 0.02),
        run_of(1.0, 2, 1.0, failure="broke"),
    )
    good, risky = sweep.cells(sweep.grids[0])
    assert (good.median, good.best, good.worst, good.failed, good.runs) == (0.2, 0.1, 0.3, 0, 3)
    assert (risky.median, risky.best, risky.worst, risky.failed, risky.runs) == (0.02, 0.01, None, 1, 3)
    assert sweep.best(sweep.grids[0]) == risky


@pytest.mark.parametrize("loss", [2.5, math.nan, math.inf])
def test_ending_above_the_beginning_or_nowhere_is_a_failure(loss: float) -> None:
    sweep = swept(run_of(0.1, 0, loss), run_of(0.1, 1, 0.5), run_of(1.0, 0, 1.9))
    half, fine = sweep.cells(sweep.grids[0])
    assert (half.median, half.best, half.failed) == (None, 0.5, 1)
    assert (fine.median, fine.failed) == (1.9, 0)


def test_an_interrupted_run_is_none() -> None:
    sweep = swept(run_of(0.1, 0, 0.5, failure="interrupted"))
    for cell in sweep.cells(sweep.grids[0]):
        assert (cell.runs, cell.failed, cell.median) == (0, 0, None)
    assert sweep.best(sweep.grids[0]) is None
    assert sweep.to_json()["best"] == {"sgd": None}


@pytest.mark.parametrize(
    ("part", "quantity", "best", "median"),
    [
        ("loss", "loss", 0.1, 0.2),
        ("validation", "accuracy", 1.0, 0.9),
        ("test", "accuracy", 1.0, 0.9),
        ("validation", "rmse", 0.1, 0.8),
        ("validation-loss", "loss", 0.1, 1.2),
    ],
)
def test_what_is_best_depends_on_the_measure(part: str, quantity: str, best: float, median: float) -> None:
    sweep = swept(run_of(0.1, 0, 0.2, 0.8), run_of(1.0, 0, 0.3, 0.9), by=Measure(part, quantity))
    found = sweep.best(sweep.grids[0])
    assert found is not None
    assert (found.options["lr"], found.median) == (best, pytest.approx(median))


def test_the_json_adds_the_cells() -> None:
    result = swept(run_of(0.1, 0, 0.2), run_of(1.0, 0, math.nan)).to_json()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {"problem", "metric", "machine", "summary", "runs", "by", "higher_is_better", "cells", "best"}
    assert (result["by"], result["higher_is_better"], result["best"]) == ("training loss", False, {"sgd": "sgd:lr=0.1"})
    assert result["cells"][1] == {
        "optimizer": "sgd",
        "options": {"lr": 1},
        "runs": 1,
        "failed": 1,
        "median": None,
        "best": None,
        "worst": None,
    }


def test_the_measure_follows_the_data(line: Problem) -> None:
    validated = dataclasses.replace(line, validation=line.train)
    assert str(Measure.of(line)) == "training loss"
    assert str(Measure.of(validated)) == "validation rmse"
    assert str(Measure.of(validated, "validation-loss")) == "validation loss"
    assert str(Measure.of(line, "test")) == "test rmse"
    assert not Measure.of(line, "test").rises


@pytest.mark.parametrize(
    ("change", "part", "message"),
    [
        ({}, "tset", "Did you mean 'test'"),
        ({}, "validation", "no validation data"),
        ({}, "validation-loss", "no validation data"),
        ({"test": None}, "test", "no test data"),
        ({"sealed": True}, "test", "are sealed"),
        ({"test_metric": lambda outputs, targets: 0.0}, "test", "should rise or fall is not known"),
    ],
)
def test_what_cannot_be_judged_by_is_refused(line: Problem, change: dict[str, Any], part: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Measure.of(dataclasses.replace(line, **change), part)


def test_a_real_one(line: Problem) -> None:
    grids = parse_grid("sgd:lr=0.01|0.3|1e300")
    specs = [spec for grid in grids for spec in grid.specs()]
    result = Sweep(compare(line, specs, seeds=2, budget=Budget(steps=9)), tuple(grids), Measure.of(line))
    slow, fast, wild = result.cells(grids[0])
    assert result.best(grids[0]) == fast
    assert slow.median is not None
    assert fast.median is not None
    assert fast.median < slow.median
    assert (wild.failed, wild.median) == (2, None)


def test_the_rates_of_a_host(line: Problem) -> None:
    grids = parse_grid("ocnopt:lr=0.01|0.3,host=sgd|rmsprop")
    specs = [spec for grid in grids for spec in grid.specs()]
    result = Sweep(compare(line, specs, seeds=1, budget=Budget(steps=3)), tuple(grids), Measure.of(line))
    cells = result.cells(grids[0])
    assert [cell.failed for cell in cells] == [0] * 4
    assert len({cell.median for cell in cells}) == 4
