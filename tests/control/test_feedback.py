"""Oracle 3: linearised feedback is dense damped Gauss-Newton; measured deviations are right to first order."""

from __future__ import annotations

import pytest
import torch
from loops import looped
from torch import nn

import pullback
from cases import CASES, LOSSES, by_name
from oracle import assert_close, dense
from pullback.control import Course, Loop


def linearly(self, passage, cut, moved):
    return torch.cat([self.linear(t, moved) for t in range(len(self.terms))])


def gauss_newton(found, model, mu):
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])
    U = dense(model, found.lin.blocks)
    return -torch.linalg.solve(U.T @ U + mu * torch.eye(len(g), dtype=U.dtype), g)


def in_order(found, steps, model):
    by_id = found.flat(steps)
    return torch.cat([by_id[id(p)].reshape(-1) for p in model.parameters() if p.requires_grad])


def sweep_linearly(found, patch):
    patch.setattr(Course, "deviation", linearly)
    before = [p.detach().clone() for p in found.model.parameters()]
    with torch.no_grad():
        steps = found.loop.sweep().steps
        for p, old in zip(found.model.parameters(), before, strict=True):
            p.copy_(old)
    return steps


@pytest.mark.parametrize("space", ["dual", "primal", "auto"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_linearised_feedback_is_gauss_newton(case, space, monkeypatch):
    model, args, kwargs = case.build()
    found = looped(model, nn.MSELoss(), [(args, kwargs, torch.randn_like)], space=space)
    mu = found.loop.tails._mu
    steps = sweep_linearly(found, monkeypatch)
    true = gauss_newton(found, model, mu)
    assert_close(in_order(found, steps, model), true, 1e-9)
    assert_close(in_order(found, found.loop.joint(), model), true, 1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_for_every_loss(loss, monkeypatch):
    model, args, kwargs = by_name["mlp"].build()
    whole = nn.Sequential(model, Head(loss.head))
    found = looped(whole, loss.criterion(2), [(args, kwargs, loss.target)])
    steps = sweep_linearly(found, monkeypatch)
    assert_close(in_order(found, steps, whole), gauss_newton(found, whole, found.loop.tails._mu), 1e-8)


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, z):
        return self.head(z)


@pytest.mark.parametrize("space", ["dual", "primal"])
@pytest.mark.parametrize("partition", ["global", [["0.*", "4.*"]], [["0.*"], ["2.*", "4.*"]]])
def test_sampled_metrics_and_coalitions(partition, space, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    metric = pullback.Sampled(m=2, seed=3)
    found = looped(model, nn.CrossEntropyLoss(), [((x,), {}, y)], metric=metric, partition=partition, space=space)
    steps = sweep_linearly(found, monkeypatch)
    assert_close(in_order(found, steps, model), gauss_newton(found, model, found.loop.tails._mu), 1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_measured_deviation_is_right_to_first_order(case, monkeypatch):
    model, args, kwargs = case.build()
    found = looped(model, nn.MSELoss(), [(args, kwargs, torch.randn_like)])
    true = Course.deviation
    errors: dict[int, list[float]] = {}
    scale = 0.0

    def compared(self, passage, cut, moved):
        measured = true(self, passage, cut, moved)
        linear = linearly(self, passage, cut, moved)
        if float(linear.norm()) > 1e-12:
            errors.setdefault(cut, []).append(float((measured - linear).norm() / linear.norm()))
        return measured

    monkeypatch.setattr(Course, "deviation", compared)
    before = [p.detach().clone() for p in model.parameters()]
    for scale in (1e-2, 1e-3, 1e-4, 1e-5):
        with torch.no_grad():
            found.loop.sweep(alpha=scale)
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
    for cut, found_errors in errors.items():
        assert len(found_errors) == 4
        first, *_, last = found_errors
        assert last < 1e-8 or last < 5e-3 * first, (cut, found_errors)


#: wirings with a stage whose deviation cannot be measured, and the word that says why
BROKEN = {"woven glue"}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_deviations_are_measured_wherever_they_can_be(case):
    model, args, kwargs = case.build()
    found = looped(model, nn.MSELoss(), [(args, kwargs, torch.randn_like)])
    broken = list(found.route.broken.values())
    assert bool(broken) == (case.name in BROKEN), broken


def test_a_shifted_sweep_is_the_open_loop_recursion(monkeypatch):
    """SPRING: with linearised deviations the minimiser damped towards p, as all modules jointly would find it."""
    model, args, kwargs = by_name["mlp"].build()
    found = looped(model, nn.MSELoss(), [(args, kwargs, torch.randn_like)])
    tails, lin = found.loop.tails, found.lin
    shift = [[torch.randn(block.n, dtype=torch.float64) for block in blocks] for blocks in found.loop.course.stages]
    loop = Loop(found.loop.course, tails, found.loop.e0, None, scales=None, rates=[1.0] * len(shift),
                roots=found.loop.roots, run=found.loop._run, shift=shift)  # fmt: skip
    found.loop = loop
    steps = sweep_linearly(found, monkeypatch)
    p, mu = in_order(found, shift, model), tails._mu
    U = dense(model, lin.blocks)
    g = torch.cat([q.grad.reshape(-1) for q in model.parameters()])
    true = torch.linalg.solve(U.T @ U + mu * torch.eye(len(g), dtype=U.dtype), mu * p - g)
    assert_close(in_order(found, steps, model), true, 1e-9)
    assert_close(in_order(found, loop.joint(), model), true, 1e-9)
