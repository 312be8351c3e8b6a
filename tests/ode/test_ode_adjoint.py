"""Gradients of the adjoint against those through the solver's own steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fields import MODELS, TIGHT, build, gradient, miss
from torch import nn

import pullback
from models import Moving
from pullback.errors import CoverageError
from pullback.ode import ODEBlock
from pullback.ode.quadrature import gauss_legendre


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_steps(name):
    adjoint, x, y = build(name, **TIGHT)
    steps, _, _ = build(name, adjoint=False, **TIGHT)
    assert miss(gradient(adjoint, x, y), gradient(steps, x, y)) < 2e-9


@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun", "bosh3", "fehlberg2", "dopri8"])
def test_errors_fall_with_the_tolerance(solver):
    true = gradient(*build("chain", adjoint=False, solver="dopri8", rtol=1e-12, atol=1e-13))
    errors = []
    for tol in (1e-3, 1e-7):
        found = gradient(*build("chain", solver=solver, rtol=tol, atol=tol))
        own = gradient(*build("chain", solver=solver, rtol=tol, atol=tol, adjoint=False))
        errors.append(miss(found, true))
        assert miss(found, own) < 4 * max(miss(own, true), 1e-8)
    assert errors[1] < 1e-5
    assert errors[1] < errors[0] / 20 or errors[0] < 1e-8


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)])
def test_errors_fall_with_the_order(solver, order):
    true = gradient(*build("chain", adjoint=False, solver="dopri8", rtol=1e-12, atol=1e-13))
    coarse, fine = (
        miss(gradient(*build("chain", solver=solver, step=step, rtol=1e-11, atol=1e-11)), true) for step in (0.1, 0.05)
    )
    assert coarse / fine > 0.75 * 2 ** min(order, 4)


def test_the_quadrature_is_exact_for_polynomials():
    for count in (1, 2, 5, 12, 40):
        nodes, weights = (torch.tensor(v, dtype=torch.float64) for v in gauss_legendre(count))
        for degree in (0, 1, 2 * count - 1):
            assert abs(float(weights @ nodes**degree) - 1 / (degree + 1)) < 1e-13


def test_more_nodes_are_taken_where_the_field_asks_for_them():
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, t, x):
            return self.w * torch.cos(12 * t) * (1 + x)

    found = []
    for adjoint in (True, False):
        block = ODEBlock(Fast(), rtol=1e-9, atol=1e-10, adjoint=adjoint).double()
        block(torch.ones(3, 1).double()).sum().backward()
        found.append(block.func.w.grad)
    assert block.flow.nodes == 4  # nobody asked
    assert miss(*found) < 1e-7


class Fast(nn.Module):
    """Oscillates in time, so that a few nodes see nothing of what is going on."""

    def __init__(self, pace: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64))
        self.pace = pace

    def forward(self, t, x):
        return 3 * torch.tanh(x @ self.w) * torch.cos(self.pace * t) + torch.sin(self.pace * t) * x @ self.w


@pytest.mark.parametrize("options", [{"rtol": 1e-8, "atol": 1e-9}, {"solver": "rk4", "step": 0.005}])
def test_oscillations_between_the_nodes_are_not_passed_over(options):
    torch.manual_seed(0)
    x, found = torch.randn(5, 2, dtype=torch.float64), []
    for adjoint in (True, False):
        block = ODEBlock(Fast(60), adjoint=adjoint, **options)
        block(x).square().sum().backward()
        found.append(block.func.w.grad)
        assert block.missed < 1e-3
    assert miss(*found) < 1e-3


def test_what_varies_too_fast_is_refused(monkeypatch):
    monkeypatch.setattr("pullback.ode.adjoint.MOST_NODES", 16)
    block = ODEBlock(Fast(60))
    with pytest.raises(pullback.SolverError, match="varies too fast for its adjoint: with 16 nodes"):
        block(torch.randn(5, 2, dtype=torch.float64)).square().sum().backward()
    assert block.func.w.grad is None


def test_memory_does_not_grow_with_the_steps():
    def saved(step: float, adjoint: bool) -> int:
        model, x, _ = build("chain", solver="rk4", step=step, adjoint=adjoint)
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t):
            model(x)
        return sum(total)

    assert saved(0.2, True) == saved(0.01, True)
    assert saved(0.01, False) > 10 * saved(0.2, False)


def test_evaluations_are_counted():
    calls = []

    class Counted(Moving):
        def forward(self, t, x):
            calls.append(1)
            return super().forward(t, x)

    block = ODEBlock(Counted(), rtol=1e-4, atol=1e-4).double()
    x = torch.randn(3, 2).double().requires_grad_()
    out = block(x)
    assert block.nfe == len(calls) > 0
    calls.clear()
    out.sum().backward()
    assert block.nfe_backward == len(calls) > 0


def test_without_gradients_nothing_is_kept():
    block = ODEBlock(Moving()).double()
    with torch.no_grad():
        assert not block(torch.randn(3, 2).double()).requires_grad
    assert "_gate" not in block.flow.__dict__


def test_copies_and_pickles_go_on_alone():
    model, x, y = build("chain")
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(gradient(other, x, y), gradient(model, x, y))


def test_an_output_overwritten_in_place_is_refused():
    model, x, _ = build("chain")
    z = model[1](model[0](x))
    gate = model[1].flow.__dict__["_gate"]()
    with torch.no_grad():
        z.mul_(2.0)
    with pytest.raises(CoverageError, match="in place"):
        gate.pull(torch.ones(1, 4, 2).double())


def test_lent_parameters_get_the_gradient():
    """torch.func.functional_call takes them back before the backward pass."""
    torch.manual_seed(0)
    block = ODEBlock(Moving(), rtol=1e-8, atol=1e-9).double()
    x = torch.randn(5, 2).double()
    (block(x).square().sum()).backward()
    own = {name: p.grad for name, p in block.named_parameters()}
    lent = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(3)  # the module's own are no matter
    torch.func.functional_call(block, {name: 1.0 * p for name, p in lent.items()}, (x,)).square().sum().backward()
    for name, p in lent.items():
        torch.testing.assert_close(p.grad, own[name], rtol=1e-12, atol=1e-12)
