"""Hooks: nothing lingers, nothing is recorded in vain, in-place operations and copies are harmless."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import pullback
from oracle import linearise
from pullback.tape.call import Call, RootCall


def small() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(5, 3), torch.randn(5, 2)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def notes() -> set[int]:
    """Ids of all notes of calls that are alive; other tests may have left a loss behind."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if type(thing) in (Call, RootCall)}


def test_forward_without_backward_leaves_nothing():
    before = notes()
    model, criterion, x, y = small()
    opt = pullback.LayerwiseMetric(model, criterion)
    for _ in range(3):
        criterion(model(x), y)
    assert notes() <= before
    assert opt._tape.terms == []


def test_gradients_are_bit_equal_with_and_without():
    model, criterion, x, y = small()
    criterion(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    opt = pullback.GaussNewton(model, criterion)
    criterion(model(x), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
    assert len(opt._tape.terms) == 1


def test_hooks_go_with_close_and_with_the_optimizer():
    model, criterion, x, y = small()
    opt = pullback.LayerwiseMetric(model, criterion)
    assert hooks_of(model) + hooks_of(criterion) > 0
    opt.close()
    assert hooks_of(model) + hooks_of(criterion) == 0
    opt = pullback.LayerwiseMetric(model, criterion)
    criterion(model(x), y).backward()
    opt.step()
    del opt
    gc.collect()
    assert hooks_of(model) + hooks_of(criterion) == 0


def test_copies_are_inert():
    model, criterion, x, y = small()
    opt = pullback.LayerwiseMetric(model, criterion)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        criterion(other(x), y).backward()
    assert opt._tape.terms == []


def test_two_optimizers_on_one_model():
    model, criterion, x, y = small()
    first, second = pullback.LayerwiseMetric(model, criterion), pullback.GaussNewton(model, criterion)
    for _ in range(3):
        for opt in (first, second):
            opt.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            opt.step()
    assert first.last.accepted
    assert second.last.loss <= first.last.loss


def test_no_grad_and_eval_passes_are_not_recorded():
    model, criterion, x, y = small()
    opt = pullback.LayerwiseMetric(model, criterion)
    with torch.no_grad():
        criterion(model(x), y)
    with pytest.raises(pullback.StepError, match="without a backward pass"):
        opt.step()


def test_an_input_changed_after_the_call_is_refused():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))
            self.inner = Shift()

        def forward(self, x):
            h = x * 1.0
            y = self.inner(h)
            h.mul_(2.0)
            return y + self.shift

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x + self.b

    with pytest.raises(pullback.CoverageError, match="changed in place after the call"):
        linearise(Overwrites(), nn.MSELoss(), [((torch.randn(3, 2),), {}, torch.zeros(3, 2))])
