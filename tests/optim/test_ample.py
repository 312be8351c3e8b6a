"""Where a batch has several rows for every parameter, its own gain ratio steers the damping across batches."""

from __future__ import annotations

import torch
from torch import nn

import pullback


def reached(hidden: int, steps: int = 60) -> tuple[float, bool]:
    """Loss on all of sin(10 x) / (10 x) after steps on batches of 500, and whether batches were told apart."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 4000, dtype=torch.float64)[:, None]
    y = torch.sinc(10 * x / torch.pi)
    model, criterion = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double(), nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, geodesic=True)
    for _ in range(steps):
        rows = torch.randperm(4000)[:500]
        opt.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        opt.step()
    with torch.no_grad():
        return float(criterion(model(x), y)), opt._control.fresh


def test_ample_batches_follow_their_gain_ratio():
    loss, fresh = reached(12)  # 37 parameters
    assert not fresh
    assert loss < 1e-5


def test_scarce_batches_are_asked_about_their_slope(monkeypatch):
    assert reached(60, 5)[1]  # 181 parameters
    quick, _ = reached(12)
    monkeypatch.setattr("pullback.optim.base.AMPLE", 1e9)
    slow, told = reached(12)
    assert told
    assert slow > 2 * quick


def test_without_a_trial_there_is_no_ratio():
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, damping=pullback.Damping(control="slope"))
    for _ in range(3):
        x = torch.randn(100, 2, dtype=torch.float64)
        opt.zero_grad()
        criterion(model(x), x[:, :1] * x[:, 1:]).backward()
        opt.step()
    assert opt._control.fresh
