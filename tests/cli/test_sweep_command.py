from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Pullback = Callable[..., Result]
GRID = "sgd:lr=0.01|0.3|1e38,momentum=0|0.5,adam:lr=0.01|0.1"
SHORT = ("--steps", "12", "--seeds", "2")


def test_a_table_a_record_and_a_picture_per_optimizer(pullback: Pullback, own: str, tmp_path: Path) -> None:
    result = pullback("sweep", own, "--grid", GRID, *SHORT, "--out", str(tmp_path / "map"))
    assert result.exit_code == 0, result.stderr
    title, by, *lines = result.stdout.splitlines()
    assert (title, by) == ("line, 2 seeds, 1 thread", "by training loss; less is better")
    adam = lines.index("adam")
    header, *rows = lines[1:adam]
    assert header.split() == ["lr", "momentum", "median", "best", "worst", "failed", "ms/step", "seconds"]
    assert [row.replace("*", " ").split()[:2] for row in rows] == [
        [lr, momentum] for lr in ("0.01", "0.3", "1e+38") for momentum in ("0", "0.5")
    ]
    # Right-aligned columns end where their titles do.
    for word in ("median", "failed", "ms/step"):
        end = header.index(word) + len(word)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows)
    assert sum(row.startswith("*") for row in rows) == 1
    assert all("2/2" in row and " - " in row for row in rows[-2:])
    assert "failed" not in lines[adam + 1]
    assert "sgd:lr=1e+38,momentum=0, seed 0" in result.stdout
    kept = json.loads((tmp_path / "map" / "result.json").read_text(), parse_constant=pytest.fail)
    assert [cell["failed"] for cell in kept["cells"]] == [0, 0, 0, 0, 2, 2, 0, 0]
    assert kept["best"]["adam"] == "adam:lr=0.1"
    for name in ("sweep-sgd.png", "sweep-adam.png"):
        assert (tmp_path / "map" / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stderr


def test_options_with_one_value_are_named_once_and_leave_room_for_numbers(pullback: Pullback, own: str) -> None:
    grid = "sgd:lr=0.1|1e38,momentum=0.9,dampening=0.125,nesterov=false"
    result = pullback("sweep", f"{own}:validation=true", "--grid", grid, *SHORT)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    start = lines.index("sgd:momentum=0.9,dampening=0.125,nesterov=false")
    header, row = lines[start + 2 : start + 4]
    assert header.split() == ["lr", "median", "best", "worst", "failed", "loss", "ms/step", "seconds"]
    assert row.replace("*", " ").split()[0] == "0.1"
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout


def test_runs_are_interleaved_by_seed(pullback: Pullback, own: str) -> None:
    result = pullback("sweep", own, "--grid", "sgd:lr=0.1|0.2,adam", *SHORT, "--json")
    printed: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    order = [(run["optimizer"], run["options"].get("lr"), run["seed"]) for run in printed["runs"]]
    assert order == [(*cell, seed) for seed in (0, 1) for cell in (("sgd", 0.1), ("sgd", 0.2), ("adam", None))]
    assert printed["by"] == "training loss"
    # One initial model per seed, whatever the cell.
    assert len({run["history"][0][2] for run in printed["runs"]}) == 2


def test_the_metric_may_be_chosen(pullback: Pullback, own: str) -> None:
    arguments = ("sweep", f"{own}:validation=true", "--grid", "sgd:lr=0.1|0.2", "--steps", "4", "--seeds", "1")
    assert "by validation rmse; less" in pullback(*arguments).stdout
    assert "by test rmse" in pullback(*arguments, "--metric", "test").stdout
    text = pullback(*arguments, "--metric", "validation-loss").stdout
    assert "validation loss" in text.splitlines()[1]
    assert "train" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--grid", "sgdd:lr=1|2"], "Did you mean 'sgd'"),
        (["--grid", "sgd:lr=1|2|"], "nothing on one side of a bar"),
        (["--grid", "sgd:lr=-1|1"], "sgd refuses"),
        (["--grid", "sgd:lr=1|2", "--metric", "tset"], "Did you mean 'test'"),
        (["--grid", "sgd:lr=1|2", "--metric", "validation"], "has no validation data"),
        (["--grid", "sgd:lr=1|2", "--steps", "3", "--epochs", "3"], "are both given"),
    ],
)
def test_what_means_nothing_is_one_sentence(pullback: Pullback, own: str, arguments: list[str], part: str) -> None:
    result = pullback("sweep", own, *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_ctrl_c_keeps_what_was_reached(pullback: Pullback, own: str, tmp_path: Path) -> None:
    # Each run computes 12 losses and a warm-up's: the 20th is in the middle of the second of four runs.
    result = pullback("sweep", f"{own}:stop=20", "--grid", "sgd:lr=0.1|0.2", *SHORT, "--json", "--out", str(tmp_path))
    assert result.exit_code == 130
    printed = json.loads(result.stdout)
    assert [(run["steps"], run["failure"]) for run in printed["runs"]] == [(12, None), (5, "interrupted")]
    assert [(cell["runs"], cell["failed"]) for cell in printed["cells"]] == [(1, 0), (0, 0)]
    assert (tmp_path / "sweep-sgd.png").exists()


def test_all_failing_is_an_error(pullback: Pullback, own: str) -> None:
    assert pullback("sweep", own, "--grid", "sgd:lr=1e38|2e38", *SHORT).exit_code == 1
