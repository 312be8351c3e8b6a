"""What the tape cannot own goes to an explicit fallback, or is an error; BatchNorm held constant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pullback
from models import Spare
from oracle import assert_close, dense, linearise
from pullback import Damping


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def test_penalised_parameters_go_to_the_fallback_and_resume():
    model, criterion = Spare(), nn.MSELoss()
    opt = pullback.LayerwiseMetric(model, criterion, fallback=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    x, y = torch.randn(6, 3), torch.randn(6, 2)

    def step(model, opt):
        opt.zero_grad()
        (opt.criterion(model(x), y) + model.extra.weight.square().sum()).backward()
        opt.step()

    before = model.extra.weight.item()
    step(model, opt)
    assert model.extra.weight.item() == pytest.approx(before * 0.8)
    assert opt.coverage["extra.weight"].status == "fallback"
    assert opt.coverage["extra.weight"].why == "SGD: not on the tape"
    assert opt.coverage["core.weight"].status == "exact"
    twin = Spare()
    again = pullback.LayerwiseMetric(twin, nn.MSELoss(), fallback=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(model, opt)
    step(twin, again)
    assert torch.equal(model.extra.weight, twin.extra.weight)
    assert torch.equal(model.core.weight, twin.core.weight)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("sweep", ["loop", "vmap"])
def test_frozen_batch_norm_is_the_metric_with_constant_statistics(sweep):
    """Rows equal those of the same net whose BatchNorm runs on the batch's statistics as constants."""
    model, x = net(), torch.randn(8, 3, dtype=torch.float64)
    y = torch.randint(0, 2, (8,))
    criterion = nn.CrossEntropyLoss()
    opt = pullback.GaussNewton(
        model, criterion, batch_norm="frozen", sweep=sweep, damping=Damping(control="fixed", initial=0.3)
    )
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    criterion(model(x), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    plain = net()
    criterion(plain(x), y).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    opt.step()
    held = net()
    h = held[0](x).detach()
    held[1].running_mean.copy_(h.mean(0))
    held[1].running_var.copy_(h.var(0, correction=0))
    held.eval()
    U = dense(held, linearise(held, criterion, [((x,), {}, y)]).blocks)
    d = -torch.linalg.solve(U.T @ U + opt.last.mu * torch.eye(len(g), dtype=g.dtype), g)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert_close(after - before, d, 1e-8)
    assert "batch statistics of 1" in str(opt.coverage)


def test_frozen_batch_norm_trains_a_small_net_and_counts_batches_once():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    criterion = nn.CrossEntropyLoss()
    opt = pullback.LayerwiseMetric(model, criterion, batch_norm="frozen")
    x = torch.randn(32, 1, 6, 6)
    y = (x[:, 0, 2, 2] > 0).long()
    for _ in range(15):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    assert loss.item() < 0.1
    assert int(model[1].num_batches_tracked) == 15
