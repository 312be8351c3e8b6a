"""Runs of models that are called several times, or whose weights are computed by hooks, and of rewired ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import pullback
from closed import CLOSED, chain, train, weights
from oracle import assert_close
from pullback import Damping

FIXED = Damping(control="fixed", initial=3.0)
every = pytest.mark.parametrize("Opt", CLOSED.values(), ids=list(CLOSED))
stages = pytest.mark.parametrize("Opt", [CLOSED["feedback"], CLOSED["plain feedback"]], ids=["feedback", "plain"])


def loss_now(model, criterion, x, y):
    with torch.no_grad():
        return float(criterion(model(x), y))


@every
@pytest.mark.parametrize("order", ["forward", "reverse", "summed"])
def test_micro_batches_in_any_order_of_backward(Opt, order):
    """The loss that is judged is that of the weights that are left."""
    model, x, y = chain()
    opt = Opt(model, nn.MSELoss())
    found = []
    for _ in range(4):
        opt.zero_grad()
        parts = [opt.criterion(model(a), b) / 3 for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
        if order == "summed":
            sum(parts).backward()
        else:
            for part in parts if order == "forward" else parts[::-1]:
                part.backward()
        opt.step()
        assert opt.last.accepted
        found.append(loss_now(model, opt.criterion, x, y))
        assert found[-1] == pytest.approx(opt.last.loss - opt.last.actual, rel=1e-10)
    assert found[-1] < 0.7 * found[0]


@every
def test_a_model_fed_by_itself_asks_for_a_closure(Opt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    opt = Opt(model, nn.MSELoss())
    opt.criterion(model(torch.tanh(model(x))), y).backward()
    with pytest.raises(pullback.StepError, match=r"pass step\(\) a closure"):
        opt.step()
    for _ in range(4):
        opt.step(lambda: opt.criterion(model(torch.tanh(model(x))), y))
        assert opt.last.accepted
        now = loss_now(lambda x: model(torch.tanh(model(x))), opt.criterion, x, y)
        assert now == pytest.approx(opt.last.loss - opt.last.actual, rel=1e-10)


@every
def test_calls_that_do_not_reach_the_loss_are_passed_over(Opt):
    model, x, y = chain()
    twin, _, _ = chain()
    plain = Opt(twin, nn.MSELoss(), damping=FIXED, sweep="loop")
    opt = Opt(model, nn.MSELoss(), damping=FIXED, sweep="loop")

    def closure():
        with torch.no_grad():
            model(x[:2])
        model(x[:3])
        return opt.criterion(model(x), y)

    for _ in range(2):
        opt.step(closure)
        plain.step(lambda: plain.criterion(twin(x), y))
    assert_close(weights(model), weights(twin), 1e-10)


def with_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@every
@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        with_weight_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
    ],
    ids=["pruned", "weight norm hook", "weight norm", "orthogonal"],
)
def test_weights_computed_on_entry_are_those_of_the_moved_parameters(Opt, wrap):
    model, x, y = chain()
    model[2] = wrap(model[2])
    opt = Opt(model, nn.MSELoss())
    for _ in range(3):
        train(opt, lambda: opt.criterion(model(x), y), 1)
        assert opt.last.accepted
        assert loss_now(model, opt.criterion, x, y) == pytest.approx(opt.last.loss - opt.last.actual, rel=1e-9)


@stages
def test_modules_joined_in_another_way_get_wires_of_their_own(Opt):
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.skip = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x):
            h = torch.tanh(self.a(x))
            t = torch.tanh(self.b(h))
            return self.c(torch.sigmoid(t + 2 * h if self.skip else t * 2))

    def step(first):
        _, x, y = chain()
        torch.manual_seed(0)
        model = Switched().double()
        opt = Opt(model, nn.MSELoss(), damping=FIXED, sweep="loop")
        if first:
            state = {k: v.clone() for k, v in model.state_dict().items()}
            train(opt, lambda: opt.criterion(model(x), y), 1)
            model.load_state_dict(state)
        model.skip = True
        train(opt, lambda: opt.criterion(model(x), y), 1)
        return weights(model)

    assert torch.equal(step(True), step(False))
