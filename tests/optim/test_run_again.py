"""The model is run again with weights that move on the way: what must be the same then, and what is said if not."""

from __future__ import annotations

import itertools
import random
import re
import warnings

import pytest
import torch
from torch import nn

import pullback
from closed import CLOSED, chain, train, weights
from pullback import Damping

every = pytest.mark.parametrize("Opt", CLOSED.values(), ids=list(CLOSED))
stages = pytest.mark.parametrize("Opt", [CLOSED["feedback"], CLOSED["plain feedback"]], ids=["feedback", "plain"])


# -- what must be the same -----------------------------------------------------------------------------------


class Masks(nn.Module):
    """Remembers the dropout masks of its calls."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(3, 30), nn.Dropout(0.5), nn.Linear(30, 2)
        self.seen = []

    def forward(self, x):
        mask = self.drop(torch.ones(len(x), 30, dtype=x.dtype))
        self.seen.append(mask)
        return self.last(torch.tanh(self.first(x)) * mask)


@every
def test_the_dropout_mask_is_repeated_in_every_pass(Opt):
    _, x, y = chain()
    model = Masks().double()
    opt = Opt(model, nn.MSELoss())
    for _ in range(4):
        model.seen.clear()
        (loss,) = train(opt, lambda: opt.criterion(model(x), y), 1)
        assert len(model.seen) >= 2
        assert all(torch.equal(model.seen[0], mask) for mask in model.seen)
    assert loss == loss
    first = model.seen[0]
    train(opt, lambda: opt.criterion(model(x), y), 1)
    assert not torch.equal(first, model.seen[-1])


@every
def test_batch_norm_in_training_is_refused_with_a_remedy_that_is_to_be_had(Opt):
    _, x, y = chain()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"eval mode or use GroupNorm instead of batch_norm='frozen'"):
        Opt(model, nn.MSELoss(), batch_norm="frozen")
    opt = Opt(model, nn.MSELoss())
    before = weights(model)
    with pytest.raises(pullback.MixingError, match=r"no rows; call .eval\(\) on it, or use GroupNorm"):
        opt.criterion(model(x), y).backward()
    assert torch.equal(before, weights(model))
    model[1].eval()
    losses = train(opt, lambda: opt.criterion(model(x), y), 3)
    assert losses[-1] < losses[0]


@every
@pytest.mark.parametrize("what", ["inputs", "targets", "rows"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_closure_with_new_data_each_time_is_detected(Opt, what, backward):
    model, x, y = chain()
    opt = Opt(model, nn.MSELoss())
    count = itertools.count()

    def closure():
        opt.zero_grad()
        k = next(count)
        a, b = {"inputs": (x + k, y), "targets": (x, y + k), "rows": (x[k:], y[k:])}[what]
        loss = opt.criterion(model(a), b)
        if backward:
            loss.backward()
        return loss

    before = weights(model)
    for _ in range(2):
        with pytest.raises(pullback.StepError, match=r"Run again"):
            opt.step(closure)
    assert torch.equal(before, weights(model))
    assert opt._tape.recorder.listener is None


@every
def test_random_numbers_of_torch_repeat_in_a_closure_and_others_are_detected(Opt):
    model, x, y = chain()
    opt = Opt(model, nn.MSELoss())
    opt.step(lambda: opt.criterion(model(x + 0.1 * torch.randn_like(x)), y + 0.1 * torch.randn_like(y)))
    assert opt.last.accepted
    with pytest.raises(pullback.StepError, match="draw no random numbers in the closure"):
        CLOSED["feedback"](model, opt.criterion).step(lambda: opt.criterion(model(x + random.random()), y))


class Wanders(nn.Module):
    """Takes another way at one of its calls."""

    def __init__(self, way, at):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.way, self.at, self.calls = way, at, 0

    def forward(self, x):
        self.calls += 1
        first, second = self.a, self.b
        if self.calls == self.at:
            if self.way == "skipped":
                return self.c(torch.tanh(first(x)))
            if self.way == "fewer rows":
                x = x[1:]
            first, second = second, first
        return self.c(torch.tanh(second(torch.tanh(first(x)))))


@stages
@pytest.mark.parametrize("way", ["exchanged", "skipped", "fewer rows"])
@pytest.mark.parametrize("at", [2, 3, 4, 6, 7])
def test_a_model_that_takes_another_way_is_refused(Opt, way, at):
    _, x, y = chain()
    torch.manual_seed(0)
    model = Wanders(way, at).double()
    opt = Opt(model, nn.MSELoss(reduction="sum"))
    before = weights(model)
    said = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at targets of another size
        while said is None and model.calls < at + 4:
            before = weights(model)
            try:
                train(opt, lambda: opt.criterion(model(x), y), 1)
            except (pullback.StepError, RuntimeError) as error:
                said = str(error)
    assert re.search(r"Run again|must match the size", said or "")
    assert torch.equal(before, weights(model))
    assert opt._tape.recorder.listener is None
    assert train(opt, lambda: opt.criterion(model(x), y), 3)[-1] < 1e3


@every
def test_too_large_for_memory_is_said_before_it_is_tried(Opt, monkeypatch):
    model, x, y = chain(N=300)
    opt = Opt(model, nn.MSELoss(), memory=4e6, solver="dual")
    before = weights(model)
    opt.criterion(model(x), y).backward()
    asked = []
    monkeypatch.setattr("pullback.curvature.workspace.Workspace.square", lambda *a: asked.append(a))
    with pytest.raises(pullback.StepError, match=r"at R = 600 .* smaller batch, metric=Sampled\(m=1\), .*memory=") as e:
        opt.step()
    assert not asked
    assert ("fewer stages" in str(e.value)) == (not isinstance(opt, pullback.GaussNewton))
    assert torch.equal(before, weights(model))


# -- exceptions ----------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Raises at a given call of a layer inside."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.calls, self.at, self.error = 0, 0, KeyError

    def forward(self, x):
        h = torch.tanh(self.inner(torch.tanh(self.first(x))))
        self.calls += 1
        if self.calls == self.at:
            raise self.error("lost")
        return self.last(h)


@every
@pytest.mark.parametrize("closure", [None, True, False])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_exception_at_any_call_leaves_no_trace(Opt, closure, error, at):
    _, x, y = chain()
    torch.manual_seed(0)
    model = Breaks().double()
    opt = Opt(model, nn.MSELoss(), damping=Damping(initial=1e-6, trials=2))
    if at > 1:
        model.at = at
    else:
        train(opt, lambda: opt.criterion(model(x), y), 2)
        model.at = model.calls + 2  # a step whose structure is known: in the look, or in the sweep
    model.error = error
    before, hooks = weights(model), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    mu = opt.state_dict()["pullback"]["damping"]["mu"]

    def evaluate():
        opt.zero_grad()
        loss = opt.criterion(model(x), y)
        if closure is not False:
            loss.backward()
        return loss

    try:
        if closure is None:
            evaluate()
            opt.step()
        else:
            opt.step(evaluate)
    except error:
        assert torch.equal(before, weights(model))
        assert opt.state_dict()["pullback"]["damping"]["mu"] == mu
    else:
        assert model.calls < at  # as few runs as that
    assert opt._tape.recorder.listener is None
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert torch.is_grad_enabled()
    model.at = 0
    assert train(opt, lambda: opt.criterion(model(x), y), 5)[-1] < 1.0
    assert opt.last.accepted
