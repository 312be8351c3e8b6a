"""The command `certify`: what it prints, keeps, draws and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from pullback.certification import Settings, certify
from pullback.plotting import plot_pairs, plot_rates
from pullback.problems import load_problem

Run = Callable[..., Result]
QUICK = ("--steps", "4", "--pairs", "2", "--points", "3")


def test_json_and_what_out_keeps(pullback: Run, tmp_path: Path) -> None:
    out = tmp_path / "a"
    result = pullback("certify", "wine:width=2", *QUICK, "--sizes", "12,30,60", "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout, parse_constant=pytest.fail)
    assert record == json.loads((out / "result.json").read_text())
    assert record["problem"] == "wine:width=2"
    assert record["optimizer"] == "descent:lr=0.3,decay=0.01"
    assert [report["n"] for report in record["twins"]] == [12, 30, 60]
    assert record["exponents"]["distance"]["level"] == 0.95
    assert record["machine"]["threads"] == 1
    text = (out / "certificate.txt").read_text()
    assert all(row["text"].split()[0] in text for row in record["certificate"])
    for name in ("rates.png", "twins.png", "action.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "kept certificate.txt, result.json, rates.png, twins.png, action.png" in result.stderr


def test_text_and_pairs_of_one_n(pullback: Run, own: str, tmp_path: Path) -> None:
    out = tmp_path / "b"
    result = pullback("certify", own, *QUICK, "--optimizer", "adam:lr=1e-2", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    for title in ("PROVED", "MEASURED", "NOT CLAIMED", "rates along the path", "action by module"):
        assert title in result.stdout
    assert "A bound for twins of adam." in result.stdout
    assert (out / "twins.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_prints_and_keeps_what_was_reached(pullback: Run, own: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    result = pullback("certify", f"{own}:stop=20", "--steps", "50", "--optimizer", "sgd:lr=0.1", "--out", str(out))
    assert result.exit_code == 130, result.stderr
    assert "Anything beyond what was reached: nothing." in result.stdout
    assert json.loads((out / "result.json").read_text())["ended"] == "interrupted"


def test_what_means_nothing_is_refused(pullback: Run) -> None:
    for arguments, said in (
        (("wnie",), "Did you mean 'wine'?"),
        (("wine", "--optimizer", "kroneker"), "Did you mean 'kronecker'?"),
        (("wine", "--sizes", "10,x"), "--sizes is '10,x'; write whole numbers"),
        (("wine", "--sizes", "143"), "142 training samples here, twins were asked for n = 143"),
        (("wine", "--sizes", "1"), "at least 2"),
        (("digits", "--optimizer", "adam", "--sizes", "100"), "sees 128 samples, twins were asked for n = 100"),
        (("wine", "--pairs", "0"), "Invalid value for '--pairs'"),
        (("fashion-mnist",), "PULLBACK_DATA"),
    ):
        result = pullback("certify", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr, result.stderr


def test_help_has_examples(pullback: Run) -> None:
    result = pullback("certify", "--help")
    assert result.exit_code == 0
    assert "pullback certify" in result.stdout.partition("Examples")[2]


def test_the_pictures_have_what_was_measured() -> None:
    found = certify(load_problem("wine:width=2"), Settings(steps=4, pairs=2, points=3, sizes=(20,)))
    figure = plot_rates(found, "test")
    left, right, factors = figure.axes
    assert list(left.get_lines()[0].get_ydata()) == [end.rate.value for end in found.ends]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["proved there: all eigenvalues"]
    assert list(right.get_lines()[0].get_ydata()) == [loss for _, loss in found.path.losses]
    assert len(factors.get_lines()[0].get_ydata()) == 3
    distance = plot_pairs(found.reports[0], "test").axes[0]
    assert list(distance.get_lines()[0].get_ydata()) == [twin.distance for twin in found.reports[0].pairs]
    assert len(distance.get_lines()) == 3  # measured, along the pair, sampled spectrum
