from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Pullback = Callable[..., Result]


@pytest.mark.parametrize("command", ["problems", "optimizers", "train", "compare", "sweep"])
def test_help_has_examples(pullback: Pullback, command: str) -> None:
    result = pullback(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"pullback {command}" in result.stdout.partition("Examples")[2]


def test_the_bare_command_says_what_there_is(pullback: Pullback) -> None:
    for result in (pullback(), pullback("-h")):
        assert "Train PyTorch models" in result.output
        assert all(command in result.output for command in ("problems", "optimizers", "train", "compare"))
    assert pullback("--version").stdout.strip()


def test_problems_are_listed_with_options(pullback: Pullback) -> None:
    text = pullback("problems").stdout
    assert "digits\n    Handwritten digits" in text
    assert "depth=none, width=64, batch_size=128, dtype=float32" in text
    assert "--data DIR or PULLBACK_DATA" in text


def test_optimizers_are_listed_with_options(pullback: Pullback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    text = pullback("optimizers").stdout
    for name in (
        "layerwise-metric",
        "gauss-newton",
        "sgd",
        "adam",
        "adamw",
        "lbfgs",
        "muon",
        "soap",
        "rmsprop",
        "e-msa",
        "snopt",
    ):
        assert f"\n{name}\n" in f"\n{text}"
    assert "samples=none" in text
    assert "betas=0.9/0.999" in text
    assert 'pip install "pullback[peers]"' in text


def test_compare_prints_a_table(pullback: Pullback, own: str) -> None:
    result = pullback("compare", own, "--optimizers", "sgd:lr=0.1,momentum=0.9,adam", "--steps", "30", "--seeds", "2")
    assert result.exit_code == 0, result.stderr
    title, *header, sgd, adam = result.stdout.splitlines()
    assert title == "line, 2 seeds, 1 thread"
    assert all(word in " ".join(header) for word in ("loss", "rmse", "steps", "ms/step", "seconds", "0.1", "1e-09"))
    assert sgd.startswith("sgd:lr=0.1,momentum=0.9 ")
    assert adam.startswith("adam ")
    assert "(2/2)" in sgd
    assert adam.rstrip().endswith("- (0/2)")


def test_json_is_one_object_on_stdout_and_what_out_keeps(pullback: Pullback, own: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    arguments = ("--optimizers", "adam,lbfgs", "--steps", "4", "--seeds", "2", "--json", "--out", str(out))
    result = pullback("compare", own, *arguments)
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    assert printed == json.loads((out / "result.json").read_text())
    assert [(run["optimizer"], run["seed"]) for run in printed["runs"]] == [
        ("adam", 0),
        ("lbfgs", 0),
        ("adam", 1),
        ("lbfgs", 1),
    ]
    assert printed["problem"] == "line"
    assert printed["machine"]["threads"] == 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "kept" in result.stderr


def test_targets_and_stop(pullback: Pullback, own: str) -> None:
    arguments = ("compare", own, "--optimizers", "gauss-newton,sgd:lr=0.3", "--steps", "90", "--seeds", "2")
    result = pullback(*arguments, "--target", "1e-2,1e-3", "--stop", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    for run in printed["runs"]:
        assert run["loss"] <= 1e-3
        assert run["steps"] == run["steps_to"]["0.001"] < 90
        assert list(run["reached"]) == list(run["steps_to"]) == ["0.01", "0.001"]
    ours, sgd = printed["summary"]
    assert ours["trials"]["median"] >= 1
    assert sgd["trials"] is None
    assert sgd["reached"]["0.001"]["worst_steps"] == max(run["steps"] for run in printed["runs"][1::2])
    text = pullback(*arguments, "--target", "1e-2,1e-3").stdout
    assert "steps to 0.001" in text
    assert "trials" in text
    assert "worst" in text


@pytest.mark.parametrize("optimizer", ["layerwise-metric", "gauss-newton:samples=1"])
def test_train_with_coverage(pullback: Pullback, own: str, optimizer: str) -> None:
    result = pullback("train", own, "--optimizer", optimizer, "--steps", "5", "--coverage")
    assert result.exit_code == 0, result.stderr
    assert "line, 1 seed, 1 thread" in result.stdout
    assert "weight" in result.stdout
    result = pullback("train", own, "--optimizer", optimizer, "--steps", "5", "--coverage", "--json")
    assert len(json.loads(result.stdout)["runs"]) == 1
    assert "weight" in result.stderr


def test_train_without_a_coverage_report_says_so(pullback: Pullback, own: str) -> None:
    result = pullback("train", own, "--optimizer", "adam:lr=0.1", "--epochs", "2", "--coverage")
    assert "adam:lr=0.1 has no coverage report" in result.stdout


def test_seconds_and_the_default_budget(pullback: Pullback, own: str) -> None:
    result = pullback("train", own, "--optimizer", "sgd", "--seconds", "0.05", "--json")
    assert json.loads(result.stdout)["runs"][0]["seconds"] >= 0.05
    result = pullback("train", own, "--optimizer", "sgd", "--json")
    assert json.loads(result.stdout)["runs"][0]["steps"] == 200


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "digit", "--optimizer", "sgd"], "no problem called 'digit'. Did you mean 'digits'?"),
        (
            ["train", "digits:widht=3", "--optimizer", "sgd"],
            "digits has no option 'widht'. Did you mean 'width'?",
        ),
        (["train", "digits", "--optimizer", "adma"], "no optimizer called 'adma'. Did you mean 'adam'?"),
        (["train", "digits", "--optimizer", "adam:lrate=1"], "adam has no option 'lrate'. Did you mean"),
        (["train", "digits", "--optimizer", "adam,sgd"], "names 2 optimizers where one is wanted"),
        (["compare", "digits", "--steps", "3", "--epochs", "3"], "--steps and --epochs are both given"),
        (["compare", "digits", "--seconds", "0"], "a budget must be positive"),
        (["compare", "digits", "--target", "1e-3,low"], "--target is '1e-3,low'; write training losses"),
        (["compare", "digits", "--target", "true"], "--target is 'true'; write training losses"),
        (["compare", "digits", "--target-validation", "0.9"], "targets on validation data and no such data"),
        (["compare", "digits", "--target-validation", "good"], "--target-validation is 'good'; write levels"),
        (["compare", "digits", "--target-validation", "lass=1"], "--target-validation is 'lass=1'; write levels"),
        (["train", "fashion-mnist"], "--data DIR or in PULLBACK_DATA"),
        (["train", "fashion-mnist", "--data", "nowhere"], "no data folder nowhere"),
        (["train", "nowhere/mine.py:f"], "there is no file nowhere/mine.py"),
    ],
)
def test_what_means_nothing_is_one_sentence(pullback: Pullback, arguments: list[str], part: str) -> None:
    result = pullback(*arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stderr.startswith("pullback: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_wrong_command_or_flag_is_a_usage_error(pullback: Pullback) -> None:
    assert pullback("compere").exit_code == 2
    assert pullback("compare", "digits", "--seeds", "0").exit_code == 2


def test_an_unusable_out_is_heard_of_first(pullback: Pullback, own: str, tmp_path: Path) -> None:
    result = pullback("train", own, "--optimizer", "sgd", "--out", str(tmp_path / "mine.py"))
    assert result.exit_code == 2
    assert "choose another --out" in result.stderr
    (tmp_path / "result.json").mkdir()
    result = pullback("train", own, "--optimizer", "sgd", "--steps", "2", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "cannot be written to" in result.stderr


def test_failures_are_reported_and_all_failing_is_an_error(pullback: Pullback, own: str) -> None:
    arguments = ("--steps", "9", "--seeds", "1")
    result = pullback("compare", own, "--optimizers", "sgd:lr=1e38,adam", *arguments)
    assert result.exit_code == 0
    assert "1 of 1 failed" in result.stdout
    assert "sgd:lr=1e+38, seed 0, step 1: the training loss is inf" in result.stdout
    assert pullback("compare", own, "--optimizers", "sgd:lr=1e38", *arguments).exit_code == 1


def test_ctrl_c_prints_and_keeps_what_was_reached(pullback: Pullback, own: str, tmp_path: Path) -> None:
    # Each run computes 10 losses and a warm-up's: the 16th is in the middle of the second run.
    arguments = ("compare", f"{own}:stop=16", "--optimizers", "sgd,adam", "--steps", "10", "--seeds", "2")
    result = pullback(*arguments, "--out", str(tmp_path / "kept"), "--json")
    assert result.exit_code == 130
    runs = json.loads(result.stdout)["runs"]
    assert [(run["optimizer"], run["steps"], run["failure"]) for run in runs] == [
        ("sgd", 10, None),
        ("adam", 3, "interrupted"),
    ]
    assert json.loads((tmp_path / "kept" / "result.json").read_text())["runs"] == runs
    assert (tmp_path / "kept" / "loss.png").exists()
    assert "interrupted" in result.stderr
