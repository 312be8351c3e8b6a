"""A quadratic cost of the weights beside the loss: the step is the dense one, trials and records know it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pullback
from closed import CLOSED
from oracle import jacobian
from pullback import Damping, Momentum
from pullback.manifolds import Sphere, constrain

C = 0.3
FIXED = Damping(control="fixed", initial=0.3)


def made(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    return model, x, torch.randn(7, 2, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def stepped(opt, model, x, y):
    criterion = opt.criterion
    opt.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    opt.step()
    return loss.item()


def system(model, x, y):
    """J, gradient and weights; the mean squared error has U = J sqrt(2 / numbers)."""
    J = jacobian(model, (x,), {}).flatten(0, -2)
    e = (model(x) - y).detach().reshape(-1)
    scale = 2 / e.numel()
    return math.sqrt(scale) * J, scale * J.T @ e, weights(model)


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_the_step_is_the_dense_one(solver):
    model, x, y = made()
    U, g, w = system(model, x, y)
    opt = pullback.GaussNewton(model, nn.MSELoss(), solver=solver, damping=FIXED, ridge=C)
    loss = stepped(opt, model, x, y)
    M = U.T @ U + (opt.last.mu + C) * torch.eye(len(w), dtype=w.dtype)
    torch.testing.assert_close(
        weights(model) - w, -torch.linalg.solve(M, g + C * w), rtol=1e-10, atol=1e-6 if solver == "cg" else 1e-10
    )
    assert opt.last.loss == pytest.approx(loss + C / 2 * float(w @ w), rel=1e-12)


def test_feedback_with_one_stage_is_the_same_system():
    model, x, y = made()
    U, g, w = system(model, x, y)
    opt = pullback.FeedbackGaussNewton(
        model, nn.MSELoss(), partition="global", anticipate=False, damping=FIXED, ridge=C
    )
    stepped(opt, model, x, y)
    M = U.T @ U + (opt.last.mu + C) * torch.eye(len(w), dtype=w.dtype)
    torch.testing.assert_close(weights(model) - w, -torch.linalg.solve(M, g + C * w), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("Opt", [pullback.GaussNewton, pullback.LayerwiseMetric, pullback.FeedbackGaussNewton])
def test_gain_is_one_on_a_linear_model(Opt, closure):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    criterion = nn.MSELoss()
    opt = Opt(model, criterion, ridge=C)

    def run():
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        if closure:
            opt.step(run)
        else:
            run()
            opt.step()
        assert opt.last.accepted
        # The quadratic model is exact, so what was promised is what came.
        assert opt.last.actual == pytest.approx(opt.last.predicted, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("name", list(CLOSED)[:4])
def test_the_minimum_is_that_of_the_sum(name):
    model, x, y = made(1)
    criterion = nn.MSELoss()
    opt = CLOSED[name](model, criterion, ridge=0.02)
    for _ in range(400):
        stepped(opt, model, x, y)
    opt.zero_grad()
    (criterion(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())).backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-7


@pytest.mark.parametrize("Opt", [pullback.GaussNewton, pullback.FeedbackGaussNewton])
def test_the_damping_towards_the_last_step_keeps_its_share(Opt):
    model, x, y = made()
    opt = Opt(
        model, nn.MSELoss(), damping=FIXED, ridge=C, momentum=Momentum(kind="spring"), partition="global",
        **({} if Opt is pullback.GaussNewton else {"anticipate": False}),
    )  # fmt: skip
    before = weights(model)
    stepped(opt, model, x, y)
    U, g, w = system(model, x, y)
    stepped(opt, model, x, y)
    mu = opt.last.mu
    M = U.T @ U + (mu + C) * torch.eye(len(w), dtype=w.dtype)
    expected = opt.last.scale * torch.linalg.solve(M, mu * 0.8 * (w - before) - g - C * w)
    torch.testing.assert_close(weights(model) - w, expected, rtol=1e-10, atol=1e-10)


def test_a_sketch_has_the_gradient_of_the_sum():
    model, x, _ = made()
    y = torch.arange(7) % 2
    criterion = nn.CrossEntropyLoss()
    opt = pullback.GaussNewton(model, criterion, metric=pullback.Sampled(m=2, seed=0), ridge=0.05)
    for _ in range(150):
        stepped(opt, model, x, y)
    opt.zero_grad()
    (criterion(model(x), y) + 0.025 * sum(p.square().sum() for p in model.parameters())).backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-4


def test_refusals():
    model, _, _ = made()
    with pytest.raises(ValueError, match="mass='identity'"):
        pullback.GaussNewton(model, nn.MSELoss(), ridge=C, mass="marquardt")
    with pytest.raises(ValueError, match="ridge must be finite"):
        pullback.GaussNewton(model, nn.MSELoss(), ridge=-1.0)
    with pytest.raises(ValueError, match="fallback"):
        pullback.GaussNewton(model, nn.MSELoss(), ridge=C, fallback=torch.optim.SGD)
    constrain(model[0], "weight", Sphere(), project=True)
    with pytest.raises(pullback.errors.ManifoldError, match="ridge"):
        pullback.GaussNewton(model, nn.MSELoss(), ridge=C)
