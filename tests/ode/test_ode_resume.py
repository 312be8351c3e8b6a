"""Learned times in other hands: schedules with Kronecker, copies, state and resumption; float32."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from fields import build
from torch import nn

import pullback
from models import Moving
from pullback.errors import SolverError
from pullback.ode import ODEBlock

LOOSE = {"rtol": 1e-4, "atol": 1e-5}


def one_step(model, opt, criterion, x, y):
    opt.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    opt.step()
    return loss.item()


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("refresh", [1, 10])
def test_kronecker_moves_times_as_often_as_they_take_part(every, refresh):
    model, x, y = build("chain", n=16, learn=("t0", "t1"), every=every, penalty=1e-2, **LOOSE)
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion, refresh=pullback.Refresh(every=refresh))
    times, losses = [(model[1].t0, model[1].t1)], []
    for _ in range(13):
        losses.append(one_step(model, opt, criterion, x, y))
        times.append((model[1].t0, model[1].t1))
    for k in (0, 1):
        moved = [a[k] != b[k] for a, b in itertools.pairwise(times)]
        assert moved == [step % every == 0 for step in range(13)]
    assert losses[-1] < losses[0]
    assert {id(model[1].start.t), id(model[1].end.t)} <= {id(p) for block in opt.blocks for p in block.params}


OPTIMIZERS = {
    "kronecker": pullback.Kronecker,
    "ekfac": lambda m, c: pullback.Kronecker(m, c, form="ekfac"),
    "gauss-newton": lambda m, c: pullback.GaussNewton(m, c, sweep="loop"),
    "feedback": lambda m, c: pullback.FeedbackGaussNewton(m, c, sweep="loop"),
    "layerwise": lambda m, c: pullback.LayerwiseMetric(m, c, sweep="loop", momentum=pullback.Momentum()),
}


@pytest.mark.parametrize(("name", "way"), [("kronecker", "deepcopy"), *((name, "state_dict") for name in OPTIMIZERS)])
def test_training_goes_on_bit_for_bit(name, way):
    """From a copy of the model, and of its state in a model made anew."""
    options = {"learn": "t1", "every": 2, "penalty": 1e-2, **LOOSE}
    model, x, y = build("chain", n=8, **options)
    criterion = nn.MSELoss()
    opt = OPTIMIZERS[name](model, criterion)
    for _ in range(3):  # in the middle of the schedule
        one_step(model, opt, criterion, x, y)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        other, _, _ = build("chain", n=8, seed=3, **options)
        other.load_state_dict(model.state_dict())
    assert other[1].t1 == model[1].t1 != 1.0
    own = nn.MSELoss()
    resumed = OPTIMIZERS[name](other, own)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        one_step(model, opt, criterion, x, y)
        one_step(other, resumed, own, x, y)
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_a_bad_step_after_loading_is_put_back_to_what_was_good():
    model, x, y = build("chain", n=8, learn="t1", every=2, penalty=1e-2, **LOOSE)
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion)
    for _ in range(3):
        one_step(model, opt, criterion, x, y)
    good = model[1].end.kept
    other, _, _ = build("chain", learn="t1", every=2)
    other.load_state_dict(model.state_dict())
    assert (other[1].end.kept, other[1].end.passes) == (good, 3)
    assert good != 1.0
    with torch.no_grad():
        other[1].end.t.fill_(-1.0)
    with pytest.raises(SolverError, match="put back to 0 and"):
        other(x)
    assert other[1].t1 == good


def test_an_evaluation_leaves_a_bad_time_alone():
    model, x, _ = build("chain", learn="t1")
    with torch.no_grad():
        model[1].end.t.fill_(-1.0)
    for grad, mode in ((False, True), (True, False)):
        model.train(mode)
        with torch.set_grad_enabled(grad), pytest.raises(SolverError, match=r"shorter than 0\.01") as caught:
            model(x)
        assert "put back" not in str(caught.value)
        assert model[1].t1 == -1.0


@pytest.mark.parametrize("optimizer", [pullback.Kronecker, pullback.GaussNewton, pullback.OCNOpt])
def test_float32_with_tolerances_that_cannot_be_met(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), ODEBlock(Moving(), rtol=1e-7, atol=1e-7), nn.Linear(2, 2))
    criterion = nn.MSELoss()
    opt = optimizer(model, criterion)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        opt.zero_grad()
        with pytest.raises(SolverError, match=r"rtol = 1.0e-07 cannot be met in torch.float32.*rtol >= 9.5e-07") as e:
            criterion(model(torch.randn(4, 3)), torch.randn(4, 2)).backward()
        assert not e.value.undone
        assert e.value.time == 0
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("atol", [1e-7, 1e-30])
def test_float32_with_tolerances_that_can_just_be_met(atol):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), ODEBlock(Moving(), rtol=1e-6, atol=atol), nn.Linear(2, 2))
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    losses = [one_step(model, opt, criterion, x, y) for _ in range(10)]
    assert losses[-1] < losses[0]
