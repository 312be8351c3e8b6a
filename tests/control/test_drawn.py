"""Feedback over drawn wirings: linearised it is dense Gauss-Newton, and what is measured is right to first order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from loops import looped
from torch import nn

from closed import along, linear
from losses import LOSSES
from oracle import assert_close, dense
from pullback.control import Course, Route
from pullback.curvature import Linearisation, divide
from pullback.tape import Tape
from wirings import SIDE, WIDTH, Wired, nodes

wirings = st.tuples(nodes(), st.none() | st.integers(0, 5), st.integers(1, 4), st.integers(0, 10**6))
smooth = [loss for loss in LOSSES if loss.name != "nll"]  # it needs log-probabilities


def recorded(drawn, loss, partition="layerwise", space="auto"):
    plan, skip, N, seed = drawn
    torch.manual_seed(seed)
    model = Wired(plan, None if skip is None else skip % (len(plan) + 1), False).double()
    args = (torch.randn(N, WIDTH).double(), torch.randn(N, SIDE).double())
    z = model(*args).detach()
    if partition == "coalition":
        partition = [["layers.0.*", "out.*"]] if list(model.layers[0].parameters()) else "global"
    y, criterion = loss.target(z), loss.criterion(2).double()
    assume(bool(torch.isfinite(criterion(z, y)).all()))  # every target may be one to ignore
    return looped(model, criterion, [(args, {}, y)], partition=partition, space=space)


@given(wirings, st.sampled_from(smooth), st.sampled_from(["dual", "primal", "auto"]))
def test_linearised_feedback_is_gauss_newton(drawn, loss, space):
    found = recorded(drawn, loss, space=space)
    assume(found.loop.tails._mu > 1e-12)  # a saturated loss has no curvature to be damped beside
    params = [p for block in found.lin.blocks for p in block.params]
    before = [p.detach().clone() for p in params]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Course, "deviation", lambda self, passage, cut, moved: linear(self, moved))
        steps = found.flat(found.loop.sweep().steps)
        torch._foreach_copy_(params, before)
    found.tape.close()
    U = dense(found.model, found.lin.blocks)
    n = U.shape[1]
    g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in found.model.parameters()])
    true = -torch.linalg.solve(U.T @ U + found.loop.tails._mu * torch.eye(n, dtype=U.dtype), g)
    ours = torch.cat([steps.get(id(p), torch.zeros_like(p)).reshape(-1) for p in found.model.parameters()])
    if float(true.abs().max()) > 1e-12:  # else the loss is stationary
        assert_close(ours, true, 1e-8)


@given(wirings, st.sampled_from(["layerwise", "coalition"]))
def test_the_measured_deviation_is_right_to_first_order(drawn, partition):
    try:
        found = recorded(drawn, next(loss for loss in smooth if loss.name == "mse"), partition)
    except ValueError:  # a coalition that would divide a block, or has no member on the way to the loss
        return
    params = [p for block in found.lin.blocks for p in block.params]
    before = [p.detach().clone() for p in params]
    true, misses = Course.deviation, {}

    def compared(self, passage, cut, moved):
        measured, expected = true(self, passage, cut, moved), linear(self, moved)
        if float(expected.norm()) > 1e-9 * scale:
            misses.setdefault(cut, []).append(float((measured - expected).norm() / expected.norm()))
        return measured

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Course, "deviation", compared)
        for scale in (1e-2, 1e-4, 1e-6):
            found.loop.sweep(alpha=scale)
            torch._foreach_copy_(params, before)
    found.tape.close()
    for cut, (first, *_, last) in ((cut, own) for cut, own in misses.items() if len(own) == 3):
        assert last < 1e-6 or last < 2e-3 * first, (cut, first, last)


@given(wirings)
def test_two_heads_measure_at_the_cuts_their_predictions_have(drawn):
    """Modules of one head are decided where the other has no cut of its own."""
    plan, skip, N, seed = drawn
    torch.manual_seed(seed)
    model = Wired(plan, None if skip is None else skip % (len(plan) + 1), True).double()
    args = (torch.randn(N, WIDTH).double(), torch.randn(N, SIDE).double())
    criteria = [nn.MSELoss(), nn.BCEWithLogitsLoss()]
    tape = Tape(model, criteria, None, "loop", wiring="all")
    out = model(*args)
    (
        criteria[0](out["z"], torch.randn(N, 2).double()) + criteria[1](out["more"][0], torch.rand(N, 2).double())
    ).backward()
    lin = Linearisation(tape.terms)
    groups = divide(lin.blocks, "layerwise", tape.names.full)
    route = Route(lin.terms, groups)
    course = Course(route, lin.terms, [groups[k] for k in route.order])
    directions = [[torch.randn(block.n, dtype=torch.float64) for block in own] for own in course.stages]
    misses: dict[int, list[float]] = {}
    for scale in (1e-2, 1e-4, 1e-6):

        def seen(k, measured, expected):
            if float(expected.norm()) > 1e-9 * scale:  # noqa: B023
                misses.setdefault(k, []).append(float((measured - expected).norm() / expected.norm()))

        along(model, tape, course, directions, seen, scale)
    tape.close()
    for k, own in misses.items():
        assert len(own) < 3 or own[-1] < 1e-6 or own[-1] < 2e-3 * own[0], (k, own)
