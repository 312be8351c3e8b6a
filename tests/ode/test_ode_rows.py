"""Rows and the metric against the dense Gauss-Newton matrix of the unrolled map."""

from __future__ import annotations

import pytest
import torch
from fields import MODELS, TIGHT, build, gradient, jacobian, miss
from torch import nn

import pullback
from models import Moving
from oracle import assert_close, dense, linearise
from pullback.ode import ODEBlock
from pullback.ode.adjoint import Solve
from pullback.tape import Tape


def metric(model, x, y, **options):
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)], **options)
    U = dense(model, lin.blocks)
    return U.T @ U


def true_metric(model, x, y):
    J = jacobian(model, x)
    return J.T @ J * (2 / y.numel())


@pytest.mark.parametrize("sweep", ["loop", "vmap"])
@pytest.mark.parametrize("name", MODELS)
def test_the_metric_is_that_of_the_unrolled_map(name, sweep):
    adjoint, x, y = build(name, **TIGHT)
    steps, _, _ = build(name, adjoint=False, **TIGHT)
    assert_close(metric(adjoint, x, y, sweep=sweep), true_metric(steps, x, y), 1e-8)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{"solver": "rk4", "step": 0.5}, {"rtol": 1e-2, "atol": 1e-3}, {"solver": "adaptive_heun", "rtol": 0.1}]
)
def test_unrolled_rows_are_exact(name, options):
    if name == "tied inside" and "step" not in options:
        pytest.skip("used by hand, the whole model is run sample by sample, where adaptive steps are others: refused")
    model, x, y = build(name, adjoint=False, **options)
    assert_close(metric(model, x, y), true_metric(model, x, y))


@pytest.mark.parametrize("name", ["chain", "beside", "pictures"])
def test_rows_and_gradients_agree_at_loose_tolerances(name):
    """Both are sums over nodes of a solve."""
    model, x, y = build(name, n=3, rtol=1e-2, atol=1e-2)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)])
    U, J = dense(model, lin.blocks), jacobian(model, x) * (2 / y.numel()) ** 0.5
    # Columns beside each other change the steps a little.
    assert miss(U.T @ U, J.T @ J) < 1e-2


@pytest.fixture
def solves(monkeypatch):
    """How many columns every solve backwards in time had."""
    found, solved = [], Solve.solved
    monkeypatch.setattr(Solve, "solved", lambda self, S: found.append(len(S)) or solved(self, S))
    return found


def test_rows_and_gradients_come_from_one_solve(solves):
    model, x, y = build("pair")
    criterion = nn.MSELoss()
    tape = Tape(model, criterion, pullback.Gaussian(), "loop")
    for _ in range(2):
        solves.clear()
        tape.clear()
        criterion(model(x), y).backward()
        lin = pullback.curvature.Linearisation(tape.terms)
    # Both columns, of which the costate is a sum: the last block in the sweep, the first in the user's own pass.
    assert solves == [2, 2]
    assert lin.R == 8
    tape.close()


@pytest.mark.parametrize(("metric", "sweep"), [(None, "loop"), (None, "vmap"), (pullback.Sampled(m=1), "vmap")])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_that_share_the_solve(name, metric, sweep):
    """The costate is a sum of the metric's own columns; beside a sketch it has a solve of its own."""
    model, x, y = build(name, rtol=1e-6, atol=1e-7)
    plain = gradient(model, x, y)
    criterion = nn.MSELoss()
    tape = Tape(model, criterion, metric, sweep)
    model.zero_grad()
    criterion(model(x), y).backward()
    assert miss(torch.cat([p.grad.flatten() for p in model.parameters()]), plain) < 1e-5
    tape.close()


@pytest.mark.parametrize("columns", [1, 2])
def test_summands_keep_the_rows_of_their_layers(columns):
    """And are not sent to the whole model, sample by sample."""
    model, x, y = build("summands", rtol=1e-4, atol=1e-5)
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, metric=None if columns == 2 else pullback.Sampled(m=1))
    criterion(model(x), y).backward()
    opt.step()
    assert {treated.rule for treated in opt._treated} == {"linear", "ODE (Summands)"}


def test_small_costates_are_as_exact_as_large_ones():
    """A residual of 1e-9 beside columns of size 1: each has its own unit in the solve."""
    model, x, y = build("chain", **TIGHT)
    y = model(x).detach() + 1e-9 * y
    plain = gradient(model, x, y)
    criterion = nn.MSELoss()
    tape = Tape(model, criterion, None, "loop")
    model.zero_grad()
    criterion(model(x), y).backward()
    assert miss(torch.cat([p.grad.flatten() for p in model.parameters()]), plain) < 1e-8
    tape.close()


@pytest.mark.parametrize("weight", [1.0, 1e-9, 0.0])
def test_what_else_reaches_a_block_has_a_solve_of_its_own(weight, solves):
    model, x, y = build("chain", **TIGHT)
    criterion, seen = nn.MSELoss(), []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))

    def found():
        model.zero_grad()
        solves.clear()
        loss = criterion(model(x), y)
        (loss + weight * seen[-1].square().mean()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = found()
    tape = Tape(model, criterion, None, "loop")
    found()  # checks it
    assert miss(found(), plain) < 1e-8
    assert solves == ([2, 1] if weight else [2])
    tape.close()


def test_more_nodes_are_taken_once_for_all(solves):
    class Fast(Moving):
        def forward(self, t, x):
            return super().forward(t, x) * torch.cos(12 * t)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), ODEBlock(Fast(), **TIGHT), nn.Linear(2, 2)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    criterion = nn.MSELoss()
    plain = gradient(model, x, y)
    grown = model[1].flow.nodes
    tape = Tape(model, criterion, None, "loop")
    criterion(model(x), y).backward()  # checks it
    tape.clear()
    model[1].flow.nodes, model[1].flow.reachable = 4, 0.0
    solves.clear()
    model.zero_grad()
    criterion(model(x), y).backward()
    assert miss(torch.cat([p.grad.flatten() for p in model.parameters()]), plain) < 1e-8
    pullback.curvature.Linearisation(tape.terms)
    assert grown > 4
    assert set(solves) == {2}
    assert 4 * 2 ** (len(solves) - 1) in (grown, 2 * grown)
    tape.close()


@pytest.mark.parametrize("part", ["0", "1.flow.func.a", "1"])
def test_frozen_parts(part):
    found = []
    for adjoint in (True, False):
        model, x, y = build("chain", adjoint=adjoint, **TIGHT)
        model.get_submodule(part).requires_grad_(False)
        found.append(metric(model, x, y))
    assert_close(found[0], found[1], 1e-8)


def test_columns_of_several_losses_and_samples_that_are_few():
    model, x, _ = build("chain", n=1, **TIGHT)
    steps, _, _ = build("chain", n=1, adjoint=False, **TIGHT)
    y = torch.tensor([1])
    found = [dense(m, linearise(m, nn.CrossEntropyLoss(), [((x,), {}, y)]).blocks) for m in (model, steps)]
    assert_close(found[0].T @ found[0], found[1].T @ found[1], 1e-8)


@pytest.mark.parametrize("name", ["chain", "beside", "called twice"])
def test_joint_steps_are_those_of_the_unrolled_model(name):
    """Step for step; the metric is looked at in every one of them."""
    ends = []
    for adjoint in (True, False):
        model, x, y = build(name, n=6, adjoint=adjoint, solver="rk4", step=0.05 if adjoint else 0.1, **TIGHT)
        criterion = nn.MSELoss()
        opt = pullback.GaussNewton(model, criterion, sweep="loop")
        for _ in range(3):
            opt.zero_grad()
            criterion(model(x), y).backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert miss(*ends) < 1e-4


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("optimizer", ["LayerwiseMetric", "FeedbackGaussNewton"])
@pytest.mark.parametrize("name", ["chain", "beside", "called twice"])
def test_every_optimizer_takes_steps(name, optimizer, adjoint):
    model, x, y = build(name, n=6, adjoint=adjoint, rtol=1e-3, atol=1e-3)
    criterion = nn.MSELoss()
    opt = getattr(pullback, optimizer)(model, criterion, sweep="loop")
    losses = []
    for _ in range(5):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # Sums between blocks cannot be seen; what was measured is then told by products with U.
    known = {"exact", "linearised"} if name == "beside" and optimizer == "FeedbackGaussNewton" else {"exact"}
    assert {entry.status for entry in opt.coverage.parameters} <= known
