"""A step that overshoots into numbers that are not finite is made shorter; what truly blows up is refused, quickly."""

from __future__ import annotations

import pytest
import torch
from fields import jacobian
from torch import nn

from oracle import assert_close
from pullback.errors import SolverError
from pullback.ode import ODEBlock


class Steep(nn.Module):
    """x' = w x exp(x^2): for w < 0 it falls fast at first, and steps that go below zero overflow."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.count = self.overflowed = 0

    def forward(self, t, x):
        out = self.w * x * torch.exp(x.square())
        self.count += 1
        self.overflowed += not bool(torch.isfinite(out).all())
        return out


class Undefined(nn.Module):
    """No number since some time, or for a state below a bound."""

    def __init__(self, since: float, floor: float = -torch.inf) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-1.0))
        self.since, self.floor, self.count = since, floor, 0

    def forward(self, t, x):
        self.count += 1
        return self.w * torch.where((t > self.since) | (x < self.floor), torch.nan, 1.0) * x / 5


def at(x: float, n: int = 2) -> torch.Tensor:
    return torch.full((n, 1), x, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun", "bosh3", "dopri8"])
@pytest.mark.parametrize("x", [2.5, 6.0])
def test_a_first_step_that_is_too_long_is_made_shorter(solver, x):
    field = Steep(-1.0).double()
    block = ODEBlock(field, solver=solver, rtol=1e-3, atol=1e-4, t1=0.25)
    with torch.no_grad():
        out = block(at(x))
        assert block.nfe == field.count < 700  # what was tried in vain is counted
        assert field.overflowed or solver != "dopri5"
        # Far from zero x is of no account: int_x^oo exp(-x^2) / x dx is 2e-4 at 2.5 and nothing at 6.
        twin = ODEBlock(field, solver="rk4", step=1e-4, t1=0.25 + (2.6e-4 if x > 3 else 0.0))
        assert_close(out, twin(at(2.5)), 2e-2 if solver == "adaptive_heun" else 1e-2)


def test_gradients_are_those_of_the_steps_that_were_taken():
    """Through the unrolled solver, NaN of a step that was not taken does not come back."""
    found = []
    for options in ({"rtol": 1e-3, "atol": 1e-4}, {"solver": "rk4", "step": 2e-4}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 1), ODEBlock(Steep(-1.0), t1=0.25, adjoint=False, **options)).double()
        with torch.no_grad():
            model[0].weight.fill_(1.5)
            model[0].bias.fill_(1.0)
        found.append(jacobian(model, at(1.0)))
        assert model[1].func.overflowed or "step" in options
    loose, tight = found
    assert_close(loose, tight, 2e-2)


@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun", "bosh3", "dopri8"])
def test_what_truly_blows_up_is_refused_quickly(solver):
    field = Steep(1.0).double()
    with pytest.raises(SolverError, match="t = ") as caught:
        ODEBlock(field, solver=solver, rtol=1e-3, atol=1e-4)(at(1.5))
    assert 0 < caught.value.time < 0.1  # int_1.5^oo exp(-x^2) / x dx = 0.0243
    assert field.count < 2000


@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun"])
def test_a_field_without_numbers_is_refused_quickly(solver):
    late = Undefined(0.4).double()
    with pytest.raises(SolverError, match=r"not finite at t = 0\.(39|4)") as caught:
        ODEBlock(late, solver=solver)(at(5.0))
    assert 0.39 < caught.value.time <= 0.4
    assert late.count < 500
    never = Undefined(-1.0).double()
    with pytest.raises(SolverError, match="not finite at t = 0 "):
        ODEBlock(never, solver=solver)(at(5.0))
    assert never.count == 1
    edge = Undefined(9.0, floor=5.0).double()  # finite where it begins, and nowhere it goes to
    with pytest.raises(SolverError, match="not finite at t = 0 "):
        ODEBlock(edge, solver=solver)(at(5.0))
    assert edge.count < 200


def test_a_field_whose_square_overflows(monkeypatch):
    """In float32 the norms for the first step are infinite while the field is not."""

    class Huge(nn.Module):
        def forward(self, t, x):
            return -1e22 * x

    monkeypatch.setattr("pullback.ode.solver.MOST_STEPS", 100)
    with pytest.raises(SolverError, match=r"100 steps"):
        ODEBlock(Huge(), rtol=1e-3, atol=1e-4)(torch.ones(2, 1))
    out = ODEBlock(Huge(), t1=1e-21, rtol=1e-3, atol=1e-4)(torch.ones(2, 1))
    assert float(out[0]) == pytest.approx(4.54e-5, abs=1e-4)
