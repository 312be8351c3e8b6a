"""What cannot be solved is said with its time, and leaves weights and times as they were."""

from __future__ import annotations

import itertools

import pytest
import torch
from fields import build
from torch import nn

import pullback
from models import Moving
from pullback.errors import CoverageError, MixingError, PullbackError, SolverError
from pullback.ode import ODEBlock


class Power(nn.Module):
    """x' = w x^2: infinite at t = 1/(w x)."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, t, x):
        return self.w * x.square()


class Broken(nn.Module):
    def __init__(self, since: float) -> None:
        super().__init__()
        self.since, self.layer = since, nn.Linear(2, 2)

    def forward(self, t, x):
        return torch.where(t > self.since, torch.nan, 1.0) * self.layer(x)


class Stiff(nn.Module):
    """x' = -k (x - cos t)."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k))

    def forward(self, t, x):
        return -self.k * (x - torch.cos(t))


ONES = torch.ones(2, 1).double()


@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun"])
def test_a_blow_up(solver):
    with pytest.raises(SolverError, match="t = ") as caught:
        ODEBlock(Power(2.0), solver=solver, rtol=1e-3, atol=1e-3).double()(ONES)
    assert 0.45 < caught.value.time < 0.51


def test_a_blow_up_in_fixed_steps():
    with pytest.raises(SolverError, match="not finite"):
        ODEBlock(Power(9.0), t1=9.0, solver="rk4", step=0.25).double()(ONES)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_a_field_that_gives_nan(solver):
    with pytest.raises(SolverError, match="not finite at t = "):
        ODEBlock(Broken(0.4), solver=solver).double()(torch.ones(2, 2).double())


def test_nan_in_the_input():
    with pytest.raises(SolverError, match="not finite"):
        ODEBlock(Moving()).double()(torch.full((2, 2), torch.nan).double())


def test_stiffness(monkeypatch):
    monkeypatch.setattr("pullback.ode.solver.MOST_STEPS", 50)
    with pytest.raises(SolverError, match="took 50 steps") as caught:
        ODEBlock(Stiff(1e5)).double()(ONES)
    assert 0 < caught.value.time < 1


def test_tolerances_that_the_dtype_cannot_meet():
    block = ODEBlock(Moving(), rtol=1e-8, atol=1e-9)
    with pytest.raises(SolverError, match="float32"):
        block(torch.ones(2, 2))
    block.double()(torch.ones(2, 2).double())


def test_a_step_below_round_off():
    class Jump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, t, x):
            return self.w * (0.5 - t).abs().reciprocal() * torch.ones_like(x)

    with pytest.raises(SolverError, match=r"t = 0\.(49|5)"):
        ODEBlock(Jump()).double()(ONES)


@pytest.mark.parametrize("k", [3.0, 200.0])
def test_a_contraction_that_cannot_be_gone_back(k):
    """What contracts forwards blows up backwards: x is lost, or overflows."""
    block = ODEBlock(Stiff(k), t1=8.0, rtol=1e-3, atol=1e-3).double()
    out = block(ONES.clone().requires_grad_())
    with pytest.raises(SolverError, match=r"contracts|t = "):
        out.sum().backward()
    block.flow.adjoint = False
    if k < 10:
        block(ONES).sum().backward()


@pytest.mark.parametrize("optimizer", [pullback.GaussNewton, pullback.LayerwiseMetric, pullback.FeedbackGaussNewton])
def test_steps_over_the_edge_are_undone(optimizer):
    """To fit, the solution must come near its pole."""
    model = nn.Sequential(nn.Linear(1, 1), ODEBlock(Power(0.3), rtol=1e-3, atol=1e-3, adjoint=False)).double()
    x = torch.linspace(0.1, 1, 8).double()[:, None]
    y = 30 * x
    criterion = nn.MSELoss()
    opt = optimizer(model, criterion, sweep="loop", damping=pullback.Damping(initial=1e-8))
    losses = []
    for _ in range(3):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        losses.append(loss.item())
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        if not opt.last.accepted:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert losses[-1] < losses[0]
    assert all(b <= a for a, b in itertools.pairwise(losses))


def test_the_record_says_where_a_trial_failed():
    model = nn.Sequential(ODEBlock(Power(0.3))).double()
    x = torch.linspace(0.5, 1, 8).double()[:, None]
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, damping=pullback.Damping(initial=1e-8))
    criterion(model(x), 50 * x).backward()
    opt.step()
    assert "t = " in opt.last.note
    assert opt.last.trials > 1


def test_an_interval_of_no_length():
    for times in ((0.5, 0.5), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="t0 and t1"):
            ODEBlock(Moving(), *times)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "rk5"}, "one of dopri8"),
        ({"rtol": 0.0}, "rtol"),
        ({"solver": "rk4", "step": -1.0}, "step"),
        ({"step": 0.1}, "own steps"),
        ({"learn": "t2"}, "learn"),
        ({"learn": "t1", "t1": 0.001}, "shortest"),
        ({"penalty": -1.0}, "penalty"),
        ({"every": 0}, "every"),
    ],
)
def test_options(options, words):
    with pytest.raises(ValueError, match=words):
        ODEBlock(Moving(), **options)


def test_states():
    with pytest.raises(SolverError, match="floating"):
        ODEBlock(Moving())(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(SolverError, match="shape of x"):
        ODEBlock(Wide(), solver="rk4")(torch.ones(2, 2))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, t, x):
        return self.layer(x)


def test_torchdiffeq_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(PullbackError, match=r"pullback\[ode\]"):
        ODEBlock(Moving())(torch.ones(2, 2))


@pytest.mark.parametrize("adjoint", [True, False])
def test_a_field_that_mixes_samples(adjoint):
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, t, x):
            return self.layer(x - x.mean(0))

    model = nn.Sequential(ODEBlock(Mixing(), adjoint=adjoint), nn.Linear(2, 2)).double()
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion)
    loss = criterion(model(torch.randn(4, 2).double()), torch.randn(4, 2).double())
    with pytest.raises((MixingError, CoverageError)):  # noqa: PT012  # in the one or in the other
        loss.backward()
        opt.step()


def test_fold_is_refused():
    model, x, y = build("chain")
    criterion = nn.MSELoss()
    _ = pullback.GaussNewton(model, criterion, sweep="fold")
    loss = criterion(model(x), y)
    with pytest.raises(CoverageError, match="adjoint"):
        loss.backward()
