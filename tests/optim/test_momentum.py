"""Momentum: the plane of two directions, SPRING's recursion, and weight decay, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close, jacobian
from pullback import Damping, Momentum

FIXED = Damping(control="fixed", initial=0.5)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def run(steps, check=None, **options):
    model, x, y = problem()
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, **options)
    previous = torch.zeros_like(weights(model))
    for k in range(steps):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        before = weights(model)
        J = jacobian(model, (x,), {}).reshape(12, -1)
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        opt.step()
        moved = weights(model) - before
        if check is not None:
            check(k, J.T @ J * (2 / 12), g, previous, moved, opt.last)
        previous = moved
    return model, opt, loss.item()


@pytest.mark.parametrize("partition", ["global", "layerwise"])
def test_model_momentum_minimises_in_the_plane(partition):
    owner = torch.tensor([0] * 20 + [1] * 12)

    def check(k, H, g, p, moved, last):
        mask = (owner[:, None] == owner[None]) if partition == "layerwise" else torch.ones_like(H, dtype=torch.bool)
        eye = torch.eye(len(g), dtype=g.dtype)
        d = -torch.linalg.solve(H * mask + last.mu * eye, g)
        V = torch.stack([d, p], 1) if k else d[:, None]
        M = H + last.mu * eye
        assert_close(moved, V @ -torch.linalg.lstsq(V.T @ M @ V, V.T @ g[:, None]).solution[:, 0], 1e-7)

    run(4, check, momentum=Momentum(), damping=FIXED, partition=partition)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_spring_damps_towards_the_previous_step(solver):
    def check(k, H, g, p, moved, last):
        M = H + last.mu * torch.eye(len(g), dtype=g.dtype)
        shift = 0.7 * p
        d = shift - torch.linalg.solve(M, g + H @ shift)
        alpha = -(g @ d) / (d @ M @ d)
        assert_close(moved, alpha * d, 1e-8)
        assert last.scale == pytest.approx(float(alpha), rel=1e-8)

    run(4, check, momentum=Momentum(kind="spring", decay=0.7), damping=FIXED, solver=solver)


@pytest.mark.parametrize("kind", ["model", "spring"])
def test_momentum_trains_and_resumes_bit_for_bit(kind):
    model, opt, loss = run(8, momentum=Momentum(kind=kind))
    assert loss < 0.2
    _, x, y = problem()
    twin, _, _ = problem()
    again = pullback.GaussNewton(twin, nn.MSELoss(), momentum=Momentum(kind=kind))
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, again)):
        o.zero_grad()
        o.criterion(m(x), y).backward()
        o.step()
    assert torch.equal(weights(model), weights(twin))


def test_weight_decay_is_decoupled():
    plain, _, _ = run(1, damping=FIXED, lr=0.5)
    decayed, _, _ = run(1, damping=FIXED, lr=0.5, weight_decay=0.1)
    assert_close(weights(decayed), weights(plain) * (1 - 0.5 * 0.1), 1e-12)


def test_weight_decay_is_not_applied_to_a_step_that_was_undone():
    class Cliff(nn.Linear):
        def forward(self, x):
            here = torch.equal(self.weight.detach(), self.start)
            return super().forward(x) + (0.0 if here else 1e6)

    model = Cliff(3, 1)
    model.start = model.weight.detach().clone()
    opt = pullback.GaussNewton(model, nn.MSELoss(), weight_decay=0.5, momentum=Momentum())
    opt.criterion(model(torch.randn(4, 3)), torch.randn(4, 1)).backward()
    opt.step()
    assert not opt.last.accepted
    assert torch.equal(model.weight, model.start)
