"""The arc: what is tried from the same factors when a sweep raises the loss, and how to do without."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import pullback
from pullback import Damping

OPTIMIZERS = {
    "feedback": pullback.FeedbackGaussNewton,
    "geodesic": lambda *args, **kwargs: pullback.GaussNewton(*args, geodesic=True, **kwargs),
}


def steps(Opt, arc, number=25):
    """Steps that begin with too little damping, so that many sweeps raise the loss."""
    torch.manual_seed(0)
    widths = (2, 12, 12, 1)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    model, criterion = nn.Sequential(*layers).double(), nn.MSELoss()
    x = torch.rand(64, 2, dtype=torch.float64)
    y = torch.sin(9 * x[:, :1]) * torch.cos(7 * x[:, 1:])
    opt = Opt(model, criterion, damping=Damping(initial=1e-5, arc=arc))
    records = []
    for _ in range(number):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        records.append(opt.last)
    return records


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_it_every_attempt_is_one_sweep(name):
    records = steps(OPTIMIZERS[name], arc=False)
    # One run looks ahead, one sweeps.
    assert all(r.runs == 2 * r.trials for r in records)
    assert all(r.scale == 1 for r in records)
    assert any(r.trials > 1 for r in records)
    assert all(r.actual >= 0 for r in records if r.accepted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_saves_factorisations(name):
    plain, default = (steps(OPTIMIZERS[name], arc) for arc in (False, True))
    assert any(r.runs > 2 * r.trials for r in default)
    assert sum(r.trials for r in default) < sum(r.trials for r in plain)
    assert all(r.actual >= 0 for r in default if r.accepted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_from_down_the_arc_raises_the_damping_a_little(name):
    records = steps(OPTIMIZERS[name], arc=True)
    down = [(r, after) for r, after in pairwise(records) if r.scale < 1]
    assert down
    for record, after in down:
        tried = after.mu if after.trials == 1 else None
        assert tried is None or tried == pytest.approx(record.mu * record.scale**-0.5)


def test_by_default_only_on_one_batch():
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double(), nn.MSELoss()
    opt = pullback.FeedbackGaussNewton(model, criterion)
    batches = [torch.rand(32, 2, dtype=torch.float64) for _ in range(2)]
    found = []
    for x in (batches[0], batches[0], batches[1], batches[0], batches[0]):
        opt.zero_grad()
        criterion(model(x), torch.sin(5 * x.sum(1, keepdim=True))).backward()
        opt.step()
        found.append(opt._control.arc)
    assert found == [True, True, False, False, True]
