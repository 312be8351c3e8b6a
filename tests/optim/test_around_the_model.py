"""What happens around the model: compiled, edited behind the optimizer's back, groups added, caught exceptions."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close
from pullback import Damping

FIXED = Damping(control="fixed", initial=0.3)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return model, nn.MSELoss(), torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def steps(model, runs, criterion, x, y, opt, count=3):
    for _ in range(count):
        opt.zero_grad()
        criterion(runs(x), y).backward()
        opt.step()
    return weights(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, at a graph break
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["original", "compiled"])
def test_compiled_models_take_the_same_steps(backend, given):
    model, criterion, x, y = problem()
    expected = steps(model, model, criterion, x, y, pullback.GaussNewton(model, criterion, sweep="loop"))
    model, criterion, x, y = problem()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    opt = pullback.GaussNewton(model if given == "original" else compiled, criterion, sweep="loop")
    assert_close(steps(model, compiled, criterion, x, y, opt), expected, 1e-9)
    torch._dynamo.reset()


def test_a_layer_replaced_behind_the_optimizer_is_left_alone_and_reported():
    model, criterion, x, y = problem()
    opt = pullback.GaussNewton(model, criterion)
    steps(model, model, criterion, x, y, opt, 1)
    model[2] = nn.Linear(6, 2).double()
    new = model[2].weight.detach().clone()
    steps(model, model, criterion, x, y, opt, 2)
    assert torch.equal(new, model[2].weight)
    assert opt.coverage["2.weight"].status == "frozen"
    assert opt.coverage["0.weight"].status == "exact"
    assert opt.last.accepted


def test_weights_changed_between_steps_are_simply_the_new_start():
    model, criterion, x, y = problem()
    opt = pullback.GaussNewton(model, criterion)
    steps(model, model, criterion, x, y, opt, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    steps(model, model, criterion, x, y, opt, 20)
    assert opt.last.accepted
    assert opt.last.loss < 0.2


def test_groups_may_be_added_later():
    model, criterion, x, y = problem()
    opt = pullback.GaussNewton(model, criterion, params=model[0].parameters())
    before = model[2].weight.detach().clone()
    steps(model, model, criterion, x, y, opt, 2)
    assert torch.equal(before, model[2].weight)
    opt.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    steps(model, model, criterion, x, y, opt, 1)
    assert not torch.equal(before, model[2].weight)
    assert opt.coverage["2.weight"].status == "exact"


@pytest.mark.parametrize("where", ["model", "criterion"])
def test_an_exception_in_forward_leaves_everything_usable(where):
    class Fails(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.fail = inner, False

        def forward(self, *args):
            if self.fail:
                raise KeyError("sensor lost")
            return self.inner(*args)

    model, criterion, x, y = problem()
    body = Fails(model)
    opt = pullback.GaussNewton(body, criterion)
    before = weights(model)
    if where == "model":
        body.fail = True
        with pytest.raises(KeyError):
            criterion(body(x), y).backward()
    else:
        with pytest.raises(RuntimeError), warnings.catch_warnings(action="ignore"):
            criterion(body(x), y[:5]).backward()
    body.fail = False
    opt.zero_grad()
    assert torch.equal(before, weights(model))
    steps(model, body, criterion, x, y, opt, 2)
    assert opt.last.accepted


def test_a_deep_copy_trains_with_an_optimizer_of_its_own():
    model, criterion, x, y = problem()
    first = pullback.GaussNewton(model, criterion, damping=FIXED)
    twin = copy.deepcopy(model)
    second = pullback.GaussNewton(twin, criterion, damping=FIXED)
    a = steps(model, model, criterion, x, y, first, 2)
    b = steps(twin, twin, criterion, x, y, second, 2)
    assert_close(a, b, 1e-12)


def test_a_batch_of_one_says_nothing_about_mixing():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2).double()

        def forward(self, x):
            h = self.a(x)
            return h + h.mean(0)

    model, criterion = Centred(), nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    criterion(model(x[:1]), y[:1]).backward()
    opt.step()
    opt.zero_grad()
    with pytest.raises(pullback.CoverageError):
        criterion(model(x), y).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_takes_the_same_steps():
    model, criterion, x, y = problem()
    expected = steps(model, model, criterion, x, y, pullback.GaussNewton(model, criterion, sweep="loop"))
    model, criterion, x, y = problem()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    moved = steps(model, model, criterion, x, y, pullback.GaussNewton(model, criterion, sweep="loop"))
    assert_close(moved.cpu(), expected, 1e-8)
