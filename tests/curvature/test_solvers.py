"""Solvers: conjugate gradients to their tolerance, memory said before it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from cases import by_name
from oracle import assert_close, linearise
from pullback.curvature import MatrixFree, solver_for


@pytest.mark.parametrize("case", ["mlp", "conv", "tied", "attention", "residual"])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8, 1e-12])
def test_cg_agrees_with_the_dual_to_its_tolerance(case, tolerance):
    model, args, kwargs = by_name[case].build(n=6)
    blocks = linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin)]).blocks
    lin = linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin)])
    g = [block.rmatvec(lin.e0) for block in lin.blocks]
    exact, free = solver_for(blocks, "dual"), MatrixFree(blocks, tolerance=tolerance)
    mu = 0.1 * float(exact.trace()) / lin.R
    assert float(free.trace()) == pytest.approx(float(exact.trace()))
    results = []
    for solver in (exact, free):
        solver.factorise(mu)
        results.append(torch.cat(solver.direction(lin.e0, g, None, mu)[0]))
    assert_close(results[1], results[0], 100 * tolerance)
    assert free.outcome.endswith("iterations")


def test_cg_says_when_it_stops_early():
    model, args, kwargs = by_name["mlp"].build(n=30)
    lin = linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin)])
    free = MatrixFree(lin.blocks, tolerance=1e-12, iterations=2)
    free.factorise(1e-9)
    free.direction(lin.e0, [], None, 1e-9)
    assert free.outcome == "2 iterations (stopped early)"


def test_auto_goes_matrix_free_when_nothing_fits_and_still_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.randn(60, 3, dtype=torch.float64)
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, memory=60_000.0)
    for _ in range(15):
        opt.zero_grad()
        loss = criterion(model(x), torch.tanh(x[:, :1]))
        loss.backward()
        opt.step()
    assert opt.last.spaces[0].startswith("cg ")
    assert loss.item() < 1e-3


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_too_large_is_said_before_it_is_tried(solver):
    model, args, kwargs = by_name["mlp"].build(n=30)
    lin = linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin)])
    with pytest.raises(pullback.StepError, match=rf"solver='{solver}' for 0, 2 needs .* kB .* use solver='auto'"):
        solver_for(lin.blocks, solver, budget=1000.0)
