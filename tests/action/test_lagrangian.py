"""The Lagrangian of a chain beside autograd and the tape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pullback
from oracle import assert_close
from pullback.action import Lagrangian
from pullback.metric import resolve
from pullback.stability import StabilityError
from pullback.tape.costates import CostateTape, CostateTerm

f64 = torch.float64


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_stationary_point_beside_autograd(seed: int, depth: int, classes: bool) -> None:
    torch.manual_seed(seed)
    parts: list = []
    for _ in range(depth):
        parts += [nn.Linear(4, 4), torch.sin, Residual(4)]
    chain = [part.double() if isinstance(part, nn.Module) else part for part in parts]
    criterion = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    x = torch.randn(5, 4, dtype=f64)
    y = torch.randint(4, (5,)) if classes else torch.randn(5, 4, dtype=f64)
    lagrangian = Lagrangian(chain, criterion)
    found = lagrangian.solve(x, y)
    assert found.residuals.largest < 1e-10
    state, states = x, []
    for part in chain:
        state = part(state)
        states.append(state)
    loss = criterion(state, y)
    costates = torch.autograd.grad(loss, states, retain_graph=True)
    gradients = torch.autograd.grad(loss, list(lagrangian.parameters.values()))
    assert found.loss == pytest.approx(loss.item())
    for a, b in zip(found.states, states, strict=True):
        assert_close(a, b.detach())
    for a, b in zip(found.costates, costates, strict=True):
        assert_close(a, b)
    for a, b in zip(found.gradients.values(), gradients, strict=True):
        assert_close(a, b)
    # Off the trajectory the value is another one, and each condition notices its own violation.
    good = (found.states, found.costates, found.gradients)
    assert lagrangian.value(x, y, *good[:2]).item() == pytest.approx(loss.item())
    off_states = [*found.states[:-1], found.states[-1] + 0.1]
    off_costates = [*found.costates[:-1], found.costates[-1] + 0.1]
    name = next(iter(found.gradients))
    off_gradients = found.gradients | {name: found.gradients[name] + 0.1}
    assert lagrangian.residuals(x, y, off_states, *good[1:]).forward == pytest.approx(0.1)
    moved = lagrangian.residuals(x, y, good[0], off_costates, good[2])
    assert moved.forward < 1e-12 < 1e-3 < moved.costate
    assert lagrangian.residuals(x, y, *good[:2], off_gradients).gradient == pytest.approx(0.1)


def test_multipliers_are_the_costates_of_the_tape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    criterion = nn.CrossEntropyLoss()
    x, y = torch.randn(6, 3, dtype=f64), torch.randint(4, (6,))
    found = Lagrangian(model, criterion).solve(x, y)
    tape = CostateTape(model, criterion, resolve(criterion, None), "loop")
    criterion(model(x), y).backward()
    (term,) = tape.terms
    tape.close()
    assert isinstance(term, CostateTerm)
    of_linear = [term.costates[id(factor.call), 0] for calls in term.factors.values() for factor in calls]
    assert len(of_linear) == 2
    assert_close(found.costates[0], of_linear[0].reshape(6, 5))
    assert_close(found.costates[2], of_linear[1].reshape(6, 4))


def test_a_shared_part_adds_up_and_integers_enter() -> None:
    torch.manual_seed(0)
    shared, table = nn.Linear(4, 4).double(), nn.Embedding(7, 4).double()
    x, y = torch.randint(7, (5,)), torch.randn(5, 4, dtype=f64)
    found = Lagrangian([table, shared, torch.tanh, shared], nn.MSELoss()).solve(x, y)
    assert set(found.gradients) == {"0.weight", "1.weight", "1.bias"}
    nn.MSELoss()(shared(torch.tanh(shared(table(x)))), y).backward()
    assert_close(found.gradients["1.weight"], shared.weight.grad)
    assert_close(found.gradients["0.weight"], table.weight.grad)
    assert found.residuals.largest < 1e-10


def test_an_optimizer_on_the_same_modules_is_not_disturbed() -> None:
    model, criterion = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(), nn.MSELoss()
    opt = pullback.LayerwiseMetric(model, criterion)
    x, y = torch.randn(5, 3, dtype=f64), torch.randn(5, 2, dtype=f64)
    criterion(model(x), y).backward()
    found = Lagrangian(model, criterion).solve(x, y)
    assert len(opt._tape.terms) == 1
    assert_close(found.gradients["0.weight"], model[0].weight.grad)
    opt.step()


def test_what_is_refused() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    chain = Lagrangian([nn.Linear(3, 2)], nn.MSELoss())
    found = chain.solve(x, y)
    with pytest.raises(StabilityError, match="at least one part"):
        Lagrangian([], nn.MSELoss())
    with pytest.raises(StabilityError, match="dropout"):
        Lagrangian([nn.Linear(3, 2), nn.Dropout(0.5)], nn.MSELoss()).solve(x, y)
    with pytest.raises(StabilityError, match="shape \\(5, 2\\)"):
        Lagrangian([nn.Linear(3, 2)], nn.MSELoss(reduction="none")).solve(x, y)
    with pytest.raises(StabilityError, match="not finite"):
        chain.solve(x / 0, y)
    with pytest.raises(StabilityError, match="0 states"):
        chain.value(x, y, [], [])
    with pytest.raises(StabilityError, match="Part 0 gives shape"):
        chain.value(x, y, found.states, [torch.zeros(5, 1)])
