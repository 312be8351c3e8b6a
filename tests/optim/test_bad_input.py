"""Every fault ends in one clear error or a documented behaviour, weights and state intact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from closed import CLOSED
from models import Spare
from pullback import Damping

OPTS = [pullback.LayerwiseMetric, pullback.GaussNewton, CLOSED["feedback"], CLOSED["geodesic"]]


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 2)


def snapshot(model, opt):
    return [p.detach().clone() for p in model.parameters()], opt.state_dict()["pullback"]["damping"]["mu"]


@pytest.mark.parametrize("Opt", OPTS)
@pytest.mark.parametrize("fault", ["nan input", "inf input", "nan target", "nan weight", "nan grad", "inf grad"])
def test_values_that_are_not_finite(Opt, fault):
    model, criterion, x, y = problem()
    opt = Opt(model, criterion)
    criterion(model(x), y).backward()
    opt.step()
    bad = float(fault.split()[0])
    x, y = x.clone(), y.clone()
    if "input" in fault:
        x[1, 1] = bad
    elif "target" in fault:
        y[1, 1] = bad
    elif "weight" in fault:
        with torch.no_grad():
            model[0].weight[0, 0] = bad
    opt.zero_grad()
    criterion(model(x), y).backward()
    if "grad" in fault:
        model[2].weight.grad[0, 0] = bad
    before, mu = snapshot(model, opt)
    with pytest.raises(pullback.StepError, match=r"(The loss is|not finite)"):
        opt.step()
    after, mu2 = snapshot(model, opt)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, after, strict=True))
    assert mu == mu2


@pytest.mark.parametrize("Opt", OPTS)
def test_recovers_after_a_bad_batch(Opt):
    model, criterion, x, y = problem()
    opt = Opt(model, criterion)
    criterion(model(x * float("nan")), y).backward()
    with pytest.raises(pullback.StepError):
        opt.step()
    for _ in range(20):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("Opt", OPTS)
def test_one_sample_and_empty_batch(Opt):
    model, criterion, x, y = problem()
    opt = Opt(model, criterion)
    for _ in range(10):
        opt.zero_grad()
        loss = criterion(model(x[:1]), y[:1])
        loss.backward()
        opt.step()
    assert loss.item() < 1e-3
    opt.zero_grad()
    with pytest.raises(pullback.PullbackError, match=r"(predictions of shape \(0, 2\)|finite)"):
        criterion(model(x[:0]), y[:0]).backward()


def test_all_targets_ignored():
    model = nn.Linear(3, 4)
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    opt = pullback.GaussNewton(model, criterion)
    criterion(model(torch.randn(2, 3)), torch.zeros(2, dtype=torch.long)).backward()
    before = model.weight.detach().clone()
    with pytest.raises(pullback.StepError, match="The loss is nan"):
        opt.step()
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize("Opt", OPTS)
def test_frozen_and_unused_parameters(Opt):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model = Spare()
    model.a.bias.requires_grad_(False)
    criterion = nn.MSELoss()
    opt = Opt(model, criterion)
    frozen, spare = model.a.bias.detach().clone(), model.spare.weight.detach().clone()
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    assert opt.coverage["a.weight"].status == "pending"
    losses = []
    for k in range(8):
        if k == 4:
            model.a.bias.requires_grad_(True)
            model.b.weight.requires_grad_(False)
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if k == 3:
            assert torch.equal(frozen, model.a.bias)
            assert opt.coverage["a.bias"].status == "frozen"
    assert losses[-1] < losses[0]
    assert torch.equal(spare, model.spare.weight)
    status = {e.name: e.status for e in opt.coverage.parameters}
    assert status["a.bias"] == status["a.weight"] == "exact"
    assert status["b.weight"] == "frozen"
    assert status["spare.weight"] == "unused"


def test_a_model_with_nothing_to_train():
    model, criterion, x, y = problem()
    for p in model.parameters():
        p.requires_grad_(False)
    opt = pullback.GaussNewton(model, criterion)
    criterion(model(x), y)
    with pytest.raises(pullback.StepError, match="backward"):
        opt.step()


def test_a_criterion_that_was_not_the_one_called():
    model, criterion, x, y = problem()
    opt = pullback.LayerwiseMetric(model, nn.MSELoss())
    criterion(model(x), y).backward()
    with pytest.raises(pullback.StepError, match="through the MSELoss given to LayerwiseMetric"):
        opt.step()


def test_stale_step():
    model, criterion, x, y = problem()
    opt = pullback.LayerwiseMetric(model, criterion)
    with pytest.raises(pullback.StepError, match=r"call loss\.backward"):
        opt.step()
    criterion(model(x), y).backward()
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(pullback.StepError):
        opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_a_loss_that_is_maximised():
    model, criterion, x, y = problem()
    pullback.LayerwiseMetric(model, criterion)
    opt = pullback.LayerwiseMetric(model, criterion)
    with pytest.raises(pullback.MetricError, match="negative weight"):
        (-criterion(model(x), y)).backward()
    with pytest.raises(pullback.StepError):
        opt.step()


def test_a_part_of_the_model_alone():
    model, criterion, x, y = problem()
    opt = pullback.LayerwiseMetric(model, criterion)
    with pytest.raises(pullback.CoverageError, match=r"no call of the model that was recorded"):
        criterion(model[2](torch.tanh(model[0](x))), y).backward()
    assert opt.last is None


def test_a_target_that_requires_grad():
    model, criterion, x, y = problem()
    opt = pullback.LayerwiseMetric(model, criterion)
    with pytest.raises(pullback.MetricError, match="detach it"):
        criterion(model(x), y.requires_grad_())
    assert opt.last is None


def test_a_gradient_the_tape_has_not_seen():
    _, criterion, x, y = problem()

    body = Spare()
    opt = pullback.LayerwiseMetric(body, criterion)
    (criterion(body(x), y) + body.extra.weight.square().sum()).backward()
    with pytest.raises(pullback.CoverageError, match=r"'extra.weight' has a gradient, but the loss that was taped"):
        opt.step()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: pullback.GaussNewton(m.parameters(), nn.MSELoss()), TypeError, r"takes the model itself"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), damping=0.1), TypeError, r"Damping\(initial=0.1\)"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), lr=-1), ValueError, "lr must be finite"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), partition="rows"), ValueError, "'layerwise', 'global' or"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), partition=["0.*"]), ValueError, "lists of name patterns"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), mass="heavy"), ValueError, "'identity', 'module'"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), mass={"weight": 0.0}), ValueError, "must be positive"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), solver="lu"), ValueError, "dual, primal, cg"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), memory=0), ValueError, "positive number of bytes"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), batch_norm="eval"), ValueError, "'refuse' or 'frozen'"),
        (lambda m: pullback.Momentum(decay=1.0), ValueError, "below 1"),
        (lambda m: pullback.Momentum(kind="heavy"), ValueError, "'model' or 'spring'"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), sweep="fast"), ValueError, "'loop', 'vmap' or 'fold'"),
        (lambda m: pullback.GaussNewton(m, nn.MSELoss(), momentum=0.9), TypeError, r"Momentum\(\.\.\.\)"),
        (lambda m: Damping(initial=0), ValueError, "positive and finite"),
        (lambda m: Damping(control="none"), ValueError, "'gain', 'slope' or 'fixed'"),
        (lambda m: Damping(trials=0), ValueError, "at least 1"),
        (lambda m: Damping(smallest=2.0, largest=1.0), ValueError, "0 < smallest <= largest"),
    ],
)
def test_options_are_checked_when_made(make, error, words):
    with pytest.raises(error, match=words):
        make(nn.Linear(2, 2))
