from __future__ import annotations

import json
from collections.abc import Callable

from typer.testing import Result

Pullback = Callable[..., Result]


def test_arrivals_at_validation_levels(pullback: Pullback, own: str) -> None:
    arguments = (
        "compare",
        f"{own}:validation=true",
        "--optimizers",
        "sgd:lr=0.3,adam",
        "--steps",
        "60",
        "--seeds",
        "2",
    )
    levels = ("--target-validation", "0.5,loss=0.01,0.5")
    printed = json.loads(pullback(*arguments, *levels, "--json").stdout)
    keys = ["0.1", "1e-09", "validation rmse 0.5", "validation loss 0.01"]
    for run in printed["runs"]:
        assert list(run["steps_to"]) == list(run["reached"]) == keys
        assert all(len(row) == 6 for row in run["history"])
    for run in printed["runs"][::2]:
        step = next(row[1] for row in run["history"] if row[5] <= 0.5)
        assert run["steps_to"]["validation rmse 0.5"] == step
        assert run["steps_to"]["validation loss 0.01"] == next(row[1] for row in run["history"] if row[4] <= 0.01)
        assert run["steps"] == 60
    assert printed["summary"][0]["reached"]["validation loss 0.01"]["count"] == 2
    text = pullback(*arguments, *levels).stdout
    assert "valid. rmse 0.5" in text
    assert "valid. loss 0.01" in text


def test_stop_waits_for_all_that_was_stated(pullback: Pullback, own: str) -> None:
    arguments = ("train", f"{own}:validation=true", "--optimizer", "sgd:lr=0.3", "--steps", "900", "--stop", "--json")
    (own_levels,) = json.loads(pullback(*arguments).stdout)["runs"]
    (validation,) = json.loads(pullback(*arguments, "--target-validation", "0.5").stdout)["runs"]
    (both,) = json.loads(pullback(*arguments, "--target-validation", "0.5", "--target", "1e-4").stdout)["runs"]
    assert own_levels["steps"] == own_levels["steps_to"]["1e-09"]
    assert validation["steps"] == validation["steps_to"]["validation rmse 0.5"] < own_levels["steps"]
    assert both["steps"] == both["steps_to"]["0.0001"] > both["steps_to"]["validation rmse 0.5"]


def test_an_own_metric_has_no_known_direction(pullback: Pullback, own: str) -> None:
    result = pullback("train", "sinc", "--target-validation", "0.5")
    assert result.exit_code == 2
    assert "no such data" in result.stderr
    result = pullback("train", "rates", "--target-validation", "0.5")
    assert "whether rate_error should rise or fall is not known; use the loss" in result.stderr
