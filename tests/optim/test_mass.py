"""A diagonal mass D: the dense step of mu D + U^T U, in every space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pullback
from oracle import assert_close, dense, linearise
from pullback import Damping


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def masses(kind, model, H):
    """(option, dense diagonal)"""
    if kind == "named":
        table = {"0.weight": torch.rand(5, 3, dtype=torch.float64) + 0.5, "2.bias": 3.0}
        diagonal = [
            torch.as_tensor(table.get(n, 1.0), dtype=torch.float64).expand(p.shape).reshape(-1)
            for n, p in model.named_parameters()
        ]
        return table, torch.cat(diagonal)
    if kind == "marquardt":
        return kind, H.diagonal()
    sizes = [20, 12]
    return kind, torch.cat([d.mean().expand(len(d)) for d in H.diagonal().split(sizes)])


@pytest.mark.parametrize("kind", ["module", "marquardt", "named"])
@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
@pytest.mark.parametrize("partition", ["layerwise", "global"])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_step_with_a_mass_is_the_dense_step(kind, solver, partition, penalty):
    model, x, y = problem()
    criterion = nn.MSELoss()
    U = dense(model, linearise(model, criterion, [((x,), {}, y)]).blocks)
    H = U.T @ U
    option, D = masses(kind, model, H)
    model.zero_grad()
    opt = pullback.GaussNewton(
        model, criterion, mass=option, solver=solver, partition=partition, damping=Damping(control="fixed", initial=0.2)
    )
    before = weights(model)
    loss = criterion(model(x), y) + penalty * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    owner = torch.tensor([0] * 20 + [1] * 12)
    mask = (owner[:, None] == owner[None]) if partition == "layerwise" else torch.ones_like(H, dtype=torch.bool)
    mu = opt.last.mu
    d = -torch.linalg.solve(H * mask + mu * torch.diag(D), g)
    alpha = -(g @ d) / (d @ H @ d + mu * d @ (D * d)) if partition == "layerwise" else 1.0
    assert_close(weights(model) - before, alpha * d, 1e-5 if solver == "cg" else 1e-9)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
def test_marquardt_does_not_see_the_units_of_the_inputs(scale, seed):
    """Scaling a feature and unscaling its weights changes nothing."""
    moved = []
    for factor in (1.0, scale):
        model, x, y = problem(seed)
        with torch.no_grad():
            x[:, 0] *= factor
            model[0].weight[:, 0] /= factor
        opt = pullback.GaussNewton(model, nn.MSELoss(), mass="marquardt")
        for _ in range(3):
            opt.zero_grad()
            loss = opt.criterion(model(x), y)
            loss.backward()
            opt.step()
        moved.append(loss.item())
    assert moved[0] == pytest.approx(moved[1], rel=1e-6)


def test_marquardt_keeps_the_largest_and_resumes():
    model, x, y = problem()
    opt = pullback.GaussNewton(model, nn.MSELoss(), mass="marquardt")
    for _ in range(4):
        opt.zero_grad()
        opt.criterion(model(x), y).backward()
        opt.step()
    kept = opt.state[model[0].weight]["mass"]
    twin, _, _ = problem()
    lin = linearise(twin, nn.MSELoss(), [((x,), {}, y)])
    first = lin.blocks[0].diagonal()[:15]
    assert (kept.reshape(-1) >= first * (1 - 1e-12)).all()
    assert (kept.reshape(-1) > first * (1 + 1e-6)).any()
    again = pullback.GaussNewton(twin, nn.MSELoss(), mass="marquardt")
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state[twin[0].weight]["mass"], kept)


def test_named_mass_must_fit():
    model, x, y = problem()
    opt = pullback.GaussNewton(model, nn.MSELoss(), mass={"0.weight": torch.ones(2)})
    opt.criterion(model(x), y).backward()
    with pytest.raises(ValueError, match=r"has shape \(2,\), the parameter \(5, 3\)"):
        opt.step()
