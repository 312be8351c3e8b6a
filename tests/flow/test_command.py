"""The command, in this process; and what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from pullback.cli.app import app
from pullback.flow import flow
from pullback.flow.problems import FLOW_PROBLEMS, first_of_each, load_flow_problem, smallest_width
from pullback.plotting import plot_flow
from pullback.problems import DataError, SpecError


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def pullback(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="pullback")


def test_json_and_what_out_keeps(tmp_path: Path) -> None:
    out = tmp_path / "a"
    result = pullback("flow", "diabetes:rows=20", "--eps", "1e-4", "--seed", "3", "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout, parse_constant=pytest.fail)
    assert record == json.loads((out / "result.json").read_text())
    assert record["regime"] == "over-parametrised"
    assert record["rank"] == 20
    assert record["cost"] <= 1e-4 * 1.01
    assert record["history"][-1]["s"] == record["stopping_time"]
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_with_the_loss_of_rank() -> None:
    result = pullback("flow", "rank-loss:rows=2,features=3", "--eps", "1e-3", "--tol", "1e-6")
    assert result.exit_code == 0, result.stderr
    assert "rank lost" in result.stdout
    assert "rank-deficient critical point, critical submanifold of dimension 1" in result.stdout
    assert "promise               not kept" in result.stdout


def test_what_means_nothing_is_refused() -> None:
    for arguments, said in (
        (("diabetes:rows=9999",), "rows of diabetes is 9999"),
        (("diabetes:rows=20",), "Give eps"),
        (("diabetes:rows=20", "--eps", "1e-40"), "below what torch.float64 resolves"),
        (("diabetes:rows=20", "--eps", "1e-3", "--method", "euler"), "method must be one of"),
        (("diabetes:rows=20", "--eps", "1e-3", "--regime", "under-parametrised"), "that is the over-parametrised one"),
        (("concrete", "--eps", "1e-3"), "PULLBACK_DATA"),
    ):
        result = pullback("flow", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr, result.stderr


def test_problems() -> None:
    x = torch.tensor([[1.0, 2], [3, 4], [1, 2], [0, 0]])
    assert first_of_each(x).tolist() == [0, 1, 3]
    assert 10 * smallest_width(8, 1, 1024) + 1 >= 1024 > 10 * (smallest_width(8, 1, 1024) - 1) + 1
    digits = load_flow_problem("digits-regression:rows=50,width=2,pool=1")
    assert digits.inputs.dtype == torch.float64
    assert "pixels" in digits.notes[0]
    assert load_flow_problem("digits-regression:rows=50").inputs.shape == (50, 16)
    with pytest.raises(SpecError, match="pool must be 1, 2 or 4, got 3"):
        load_flow_problem("digits-regression:pool=3")
    with pytest.raises(SpecError, match=r"called 'rank-los'\. Did you mean 'rank-loss'"):
        load_flow_problem("rank-los")
    with pytest.raises(SpecError, match="no option 'row'"):
        load_flow_problem("concrete:row=3")
    with pytest.raises(DataError):
        load_flow_problem("concrete")
    assert "concrete" in FLOW_PROBLEMS
    wine = load_flow_problem("wine:width=3")
    run = flow(wine.make_model(0), wine.inputs, wine.targets, until=5.0, evaluations=60, tol=1e-2)
    assert run.shape[0] == 142 * 2


def test_the_picture_has_what_was_promised_and_measured() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    run = flow(nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)).double(), x, y, 1e-4)
    cost, values, outputs = plot_flow(run, "test").axes
    predicted, measured = cost.get_lines()[:2]
    assert list(predicted.get_ydata()) == pytest.approx(list(measured.get_ydata()), rel=1e-3)
    assert len(values.get_lines()) == 4
    assert [text.get_text() for text in values.get_legend().get_texts()] == ["largest", "smallest"]
    assert len(outputs.get_lines()) == 10


def test_help_has_examples() -> None:
    result = pullback("flow", "--help")
    assert result.exit_code == 0
    assert "pullback flow" in result.stdout.partition("Examples")[2]
