"""Kronecker factors over time, and the amortised optimizer on models with blocks."""

from __future__ import annotations

import pytest
import torch
from fields import TIGHT, build, gradient, miss
from torch import nn

import pullback
from models import Moving
from oracle import assert_close, dense, linearise
from pullback.ode import ODEBlock


def integrals(model, x, S, steps=400):
    """A_n and B_n by the trapezoidal rule of Gauss's points on fine intervals, from the definition: x and s by RK4."""
    block = model[1]
    field, h = block.func, 1.0 / steps
    N, r = x.shape[0], S.shape[0]

    def layers(t, state):
        seen = {}
        hooks = [m.register_forward_hook(lambda m, a, y: seen.__setitem__(m, (a[0], y))) for m in (field.a, field.b)]
        state = state.detach().requires_grad_()
        f = field(torch.tensor(t).double(), state)
        for hook in hooks:
            hook.remove()
        return state, f, seen

    def slopes(t, y):
        state, f, _ = layers(t, y[0])
        back = [torch.autograd.grad(f, state, s, retain_graph=True)[0] for s in y[1:]]
        return torch.stack([f.detach(), *(-g for g in back)])

    y = torch.cat([block(x).detach()[None], S])
    A = dict.fromkeys((field.a, field.b), 0.0)
    B = dict(A)
    for k in range(steps, -1, -1):
        t, w = k * h, h * (0.5 if k in (0, steps) else 1.0)
        _, f, seen = layers(t, y[0])
        for m, (given, out) in seen.items():
            v = torch.cat([given.detach(), torch.ones(N, 1).double()], 1)
            A[m] = A[m] + w * v.T @ v / N
            s = torch.cat([torch.autograd.grad(f, out, a, retain_graph=True)[0] for a in y[1:]])
            B[m] = B[m] + w * s.T @ s
        if k:
            k1 = slopes(t, y)
            k2 = slopes(t - h / 2, y - h / 2 * k1)
            k3 = slopes(t - h / 2, y - h / 2 * k2)
            k4 = slopes(t - h, y - h * k3)
            y = y - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert r == len(S)
    return A, B


def test_the_factors_are_integrals_over_time():
    model, x, y = build("chain", n=5, **TIGHT)
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion, columns="exact")
    criterion(model(x), y).backward()
    S = opt._tape.terms[0].factors[id(model[1].flow)][0].factor()
    A, B = integrals(model, model[0](x).detach(), S)
    opt.step()
    for layer in (model[1].func.a, model[1].func.b):
        block = next(b for b in opt.blocks if b.params[0] is layer.weight)
        assert_close(block.right.dense()[0], A[layer], 1e-5)  # the trapezoidal rule's own error
        assert_close(block.left.dense()[0], B[layer], 1e-5)


def test_factors_do_not_depend_on_the_number_of_nodes():
    found = []
    for nodes in (8, 32):
        model, x, y = build("pictures", n=3, **TIGHT)
        model[0].flow.nodes = nodes
        criterion = nn.MSELoss()
        opt = pullback.Kronecker(model, criterion, columns="exact")
        criterion(model(x), y).backward()
        opt.step()
        blocks = [b for b in opt.blocks if b.params[0].ndim > 1]
        found.append([side.dense() for b in blocks for side in (b.left, b.right)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-6)


def test_a_constant_layer_has_its_exact_metric():
    """With x and s constant in time, A times B is U^T U itself, whatever the length of the interval."""

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, t, x):
            return self.layer(torch.ones(len(x), 1, dtype=x.dtype))

    torch.manual_seed(0)
    model = nn.Sequential(ODEBlock(Drift(), t1=3.0)).double()
    x, y = torch.randn(1, 2).double(), torch.randn(1, 2).double()
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion, columns="exact")
    criterion(model(x), y).backward()
    opt.step()
    (block,) = opt.blocks
    U = dense(model, linearise(model, criterion, [((x,), {}, y)]).blocks)
    product = torch.kron(block.left.dense()[0], block.right.dense()[0])
    order = [0, 2, 1, 3]  # weight and bias of each output side by side
    assert_close(product, (U.T @ U)[order][:, order], 1e-8)


@pytest.mark.parametrize(("form", "shared"), [("kfac", "expand"), ("ekfac", "reduce"), ("ekfac", "expand")])
@pytest.mark.parametrize("adjoint", [True, False])
def test_it_trains(form, shared, adjoint):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 4), ODEBlock(Moving(4, 8), adjoint=adjoint, rtol=1e-3, atol=1e-3), nn.Linear(4, 2)
    )
    x = torch.randn(64, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    criterion = nn.CrossEntropyLoss()
    opt = pullback.Kronecker(model, criterion, form=form, shared=shared)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert any("over time" in entry.why for entry in opt.coverage.parameters) == adjoint


def test_every_step_has_the_gradient_of_no_optimizer():
    """With a look or without: beside a sketch the costate has a solve of its own. (The first pass finds the nodes.)"""
    model, x, y = build("chain")
    plain = gradient(model, x, y)
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion, lr=1e-30, refresh=pullback.Refresh(every=10, growth=1.0))
    found = []
    for _ in range(3):  # the first two look
        opt.zero_grad()
        criterion(model(x), y).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        opt.step()
    assert miss(found[0], plain) < 1e-5
    assert torch.equal(found[1], plain)
    assert torch.equal(found[2], plain)
    opt.close()
