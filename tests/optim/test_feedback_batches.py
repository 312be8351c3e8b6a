"""Feedback on mini-batches of digits: every batch is an episode of its own, with momentum and with a schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from pullback import Damping, Momentum
from pullback.problems import load_problem
from pullback.problems.runner import batches

pytest.importorskip("sklearn")


def trained(epochs=2, schedule=None, **options):
    """The loss on all training rows before and after, and the optimizer."""
    problem = load_problem("digits:width=16,batch_size=64")
    model, criterion = problem.build_model(0), nn.CrossEntropyLoss()
    opt = pullback.FeedbackGaussNewton(model, criterion, **options)
    scheduler = None if schedule is None else schedule(opt)
    x, y = problem.train

    @torch.no_grad()
    def whole():
        return float(nn.functional.cross_entropy(model(x), y))

    before = whole()
    source = batches(problem, 0)
    records = []
    for _ in range(epochs * problem.steps_per_epoch):
        a, b = next(source)
        opt.zero_grad()
        criterion(model(a), b).backward()
        opt.step()
        records.append(opt.last)
        if scheduler is not None:
            scheduler.step()
    return before, whole(), opt, records


def test_no_batch_ends_above_where_it_began():
    before, after, _, records = trained()
    assert all(record.actual >= -1e-6 * record.loss for record in records if record.accepted)
    assert after < 0.5 * before


def test_spring_with_a_decaying_step_does_better():
    def decay(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 - k / 46)

    _, plain, _, _ = trained()
    fixed = Damping(control="fixed")
    before, after, opt, _ = trained(schedule=decay, momentum=Momentum(kind="spring"), damping=fixed, lr=0.2)
    assert all("step" in opt.state[p] for p in opt.model.parameters())
    assert opt.param_groups[0]["lr"] < 1e-6
    assert after < 0.15 * before
    assert after < plain
