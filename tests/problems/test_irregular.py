from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pullback.ode import ODEBlock
from pullback.problems import load_problem
from pullback.problems.irregular import ODERNN, PairRNN, ends, forecasts, interleaved, kept
from pullback.problems.odes import Observed, OwnClock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "series").mkdir()
    lines = ["YEAR,SUNACTIVITY", *(f"{1860 + k},{50 + 45 * math.sin(k / 1.75):.1f}" for k in range(100))]
    (tmp_path / "series" / "sunspots_yearly.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_rows_hold_observations_and_the_times_between_them() -> None:
    values = 10 * torch.arange(12, dtype=torch.float64)
    seen, asked = torch.tensor([0, 1, 4, 9]), torch.tensor([4, 6, 9, 11])
    assert interleaved(values, seen).tolist() == [0, 1, 10, 3, 40, 5, 90]
    inputs, targets = forecasts(values, seen, asked, window=2, ahead=5)
    assert inputs.tolist() == [
        [0, 1, 10, 3],
        [0, 1, 10, 5],
        [10, 3, 40, 2],
        [10, 3, 40, 5],
        [40, 5, 90, 2],
    ]
    assert targets.flatten().tolist() == [40, 60, 60, 90, 110]


def test_windows_whose_forecasts_follow_each_other() -> None:
    assert ends(torch.tensor([0, 1, 2, 3, 5, 6, 9]), window=2, ahead=3) == [2, 5, 7]


def test_the_seed_says_which_are_kept() -> None:
    first, again, other = (kept(50, 0.3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 35
    assert bool((first.diff() > 0).all())
    assert kept(4, 0.0, torch.Generator()).tolist() == [0, 1, 2, 3]


def test_an_ode_rnn_flows_and_is_updated() -> None:
    """Row by row, the flow of a linear field as a matrix exponential."""
    torch.manual_seed(0)
    field, cell, seen = nn.Linear(2, 2, bias=False).double(), nn.GRUCell(1, 2).double(), nn.Linear(2, 1).double()
    block = ODEBlock(OwnClock(field), rtol=1e-10, atol=1e-11)
    model = Observed(ODERNN(cell, block), block, seen)
    rows = torch.tensor([[0.5, 1.0, -0.2, 2.5, 0.3, 0.7], [0.1, 0.3, 0.9, 1.1, -0.4, 4.0]], dtype=torch.float64)
    expected = []
    for row in rows:
        h = cell(row[:1], torch.zeros(2).double())
        for gap, x in ((row[1], row[2:3]), (row[3], row[4:5])):
            h = cell(x, torch.linalg.matrix_exp(gap * field.weight) @ h)
        expected.append(seen(torch.linalg.matrix_exp(row[5] * field.weight) @ h))
    torch.testing.assert_close(model(rows), torch.stack(expected), rtol=0, atol=1e-8)


def test_the_recurrent_encoder_is_told_of_the_times() -> None:
    torch.manual_seed(0)
    encoder = PairRNN(nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)).double()
    row = torch.tensor([[0.5, 1.0, -0.2, 2.5, 0.3]], dtype=torch.float64)
    pairs = torch.tensor([[[0.5, 0.0], [-0.2, 1.0], [0.3, 2.5]]], dtype=torch.float64)
    torch.testing.assert_close(encoder(row), encoder.out(encoder.rnn(pairs)[1][0]))


@pytest.mark.parametrize("model", ["latent", "ode-rnn"])
def test_missing_years_are_seen_nowhere_in_training(model: str, folder: Path) -> None:
    problem = load_problem(f"sunspots:model={model},missing=0.5,window=3,ahead=4", folder)
    first, second = problem.for_seed(0), problem.for_seed(1)
    assert first.train[0].shape[1] == 6
    assert first.train[0].shape != second.train[0].shape or not torch.equal(first.train[0], second.train[0])
    seen = kept(100, 0.5, torch.Generator().manual_seed(2**31))
    early = seen[seen < 1929 - 1860]
    assert first.trajectories is not None
    assert first.trajectories.times.tolist() == (1860 + seen).tolist()
    values = first.trajectories.observed[: len(early), 0]
    assert values.mean().item() == pytest.approx(0, abs=1e-12)
    inputs, targets = first.train
    assert set(torch.cat([inputs[:, :5:2].flatten(), targets.flatten()]).tolist()) <= set(values.tolist())
    assert bool((inputs[:, 1::2] >= 1).all())
    assert float(inputs[:, 5].max()) == 4.0
    # The test asks for every later year.
    assert first.test is not None
    assert len({*first.test[1].flatten().tolist()}) > len(seen) - len(early)


def test_trajectories_continue_the_rows(folder: Path) -> None:
    for options in ("window=4", "window=4,missing=0.3", "window=4,model=ode-rnn"):
        problem = load_problem(f"sunspots:{options}", folder).for_seed(0)
        shown = problem.trajectories
        assert shown is not None
        assert shown.pieces.shape[1] + 1 == problem.train[0].shape[1]
        assert any(torch.equal(shown.pieces[0], row) for row in problem.train[0][:, :-1])
        assert bool((shown.begins.diff() >= 8).all())
        fitted = shown.fitted(problem.build_model(0))
        assert fitted.shape == (len(shown.fine), 1)
