"""Runs of problems with neural ODEs go on after a step that was undone."""

from __future__ import annotations

import pytest
import torch
from edges import Bounded, Rooted
from torch import nn

from pullback.ode import ODEBlock
from pullback.optim.undone import Guarded
from pullback.problems import Budget, Problem, run


def problem(field=Rooted, start=0.1, batch_size=None) -> Problem:
    def model(seed: int) -> nn.Module:
        out = nn.Sequential(nn.Linear(3, 2), ODEBlock(field(), rtol=1e-3, atol=1e-4), nn.Linear(2, 1)).double()
        with torch.no_grad():
            out[1].func.w.weight.fill_(start)
        return out

    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double()
    return Problem(
        name="rooted",
        make_model=model,
        train=(x, torch.tanh(x[:, :1])),
        criterion=nn.MSELoss(),
        dtype=torch.float64,
        batch_size=batch_size,
        test_metric="rmse",
        targets=(1e-30,),
    )


@pytest.fixture
def undone(monkeypatch):
    """Errors that optimizers were asked about, and whether the step was undone."""
    found = []
    plain = Guarded.undo

    def undo(self, error):
        out = plain(self, error)
        found.append((str(error), out))
        return out

    monkeypatch.setattr(Guarded, "undo", undo)
    return found


@pytest.mark.parametrize(
    ("optimizer", "batch_size"),
    [
        ("kronecker:lr=10", None),
        ("kronecker:lr=30", 4),
        ("ocnopt:host=sgd,lr=1,feedback=false", 4),
        ("ocnopt:host=adam,lr=1,feedback=false", 4),
    ],
)
def test_a_run_goes_on(optimizer, batch_size, undone):
    # Short budgets are evaluated after every step, so that it is the evaluation that fails.
    result = run(problem(batch_size=batch_size), optimizer, budget=Budget(steps=25))
    assert result.failure is None
    assert result.steps == 25
    assert undone
    assert all(ok for _, ok in undone)
    assert result.history[-1].loss < 0.5 * result.history[0].loss


def test_the_weights_are_evaluated_that_training_goes_on_from(undone):
    """Each evaluation after an undone step repeats the loss before it."""
    result = run(problem(Bounded, 0.5), "kronecker:lr=100000,momentum=0", budget=Budget(steps=3))
    assert result.failure is None
    assert len(undone) == 3
    assert len({evaluation.loss for evaluation in result.history}) == 1


def test_patience_ends_a_run(undone):
    result = run(problem(Bounded, 0.5), "kronecker:lr=1e12,momentum=0", budget=Budget(steps=60))
    assert result.failure is not None
    assert "undone" in result.failure
    assert "in succession" in result.failure
    assert result.steps == len(undone) == 11


def test_other_optimizers_fail_as_before():
    result = run(problem(Bounded, 0.5), "sgd:lr=1e6", budget=Budget(steps=10))
    assert result.failure is not None
    assert "not finite" in result.failure
    assert "undone" not in result.failure
