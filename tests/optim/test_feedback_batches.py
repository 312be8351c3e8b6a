"""Feedback on mini-batches of digits: every batch is an episode of its own, with momentum and with a schedule."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

import pullback
from pullback import Damping, Momentum
from pullback.problems import load_problem
from pullback.problems.runner import batches

pytest.importorskip("sklearn")


def trained(epochs=2, schedule=None, seed=0, **options):
    """The loss on all training rows before and after, and the optimizer."""
    problem = load_problem("digits:width=16,batch_size=64")
    model, criterion = problem.build_model(seed), nn.CrossEntropyLoss()
    opt = pullback.FeedbackGaussNewton(model, criterion, **options)
    scheduler = None if schedule is None else schedule(opt)
    x, y = problem.train

    @torch.no_grad()
    def whole():
        return float(nn.functional.cross_entropy(model(x), y))

    before = whole()
    source = batches(problem, seed)
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


def test_spring_carries_over_from_batch_to_batch():
    """Beside the same fixed damping and decaying step without it: no accept or reject to amplify round-off."""

    def decay(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 - k / 46)

    options = {"schedule": decay, "damping": Damping(control="fixed"), "lr": 0.2}
    ratios = []
    for seed in range(3):
        _, without, _, _ = trained(seed=seed, **options)
        before, after, opt, _ = trained(seed=seed, momentum=Momentum(kind="spring"), **options)
        assert all("step" in opt.state[p] for p in opt.model.parameters())
        assert opt.param_groups[0]["lr"] < 1e-6
        assert after < 0.15 * before
        ratios.append(after / without)
    assert statistics.median(ratios) < 0.97
