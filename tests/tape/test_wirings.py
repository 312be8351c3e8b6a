"""Oracle 1 over drawn wirings: rows and products of every block against dense Jacobians, in float64 to 1e-10."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pullback
from losses import LOSSES
from oracle import assert_close, columns, dense, jacobian, linearise
from pullback.curvature import Linearisation
from pullback.metric import cell_weights, resolve
from pullback.tape import Tape
from wirings import SIDE, WIDTH, Wired, nodes


def built(plan, skip, head, N, seed):
    torch.manual_seed(seed)
    model = Wired(plan, None if skip is None else skip % (len(plan) + 1), head).double()
    return model, torch.randn(N, WIDTH).double(), torch.randn(N, SIDE).double()


def rows(criterion, z, y, J, N):
    """S^T J with the metric's own factor, (R, n)."""
    metric = resolve(criterion, None)
    weight = cell_weights(criterion, metric, z, y, N) / criterion(z, y).numel()  # `linearise` takes the mean
    S = metric.factor(z, weight, N, y)
    return torch.einsum("anc,ncw->anw", S, J).reshape(-1, J.shape[-1])


def check(model, blocks, U, tolerance):
    """Rows, and the four products of every block, against the dense rows."""
    assert_close(dense(model, blocks).double(), U, tolerance)
    for block in blocks:
        own = U[:, columns(model, [block])]
        v, d = torch.randn(len(own)).double(), torch.randn(own.shape[1]).double()
        dtype = block.params[0].dtype
        # Relative to the block itself: one without influence (behind a dead unit) must be zero.
        scale = float(own.abs().max()) or 1.0
        for ours, true in (
            (block.matvec(d.to(dtype)), own @ d),
            (block.rmatvec(v.to(dtype)), own.T @ v),
            (block.gram() / scale, own @ own.T / scale),
            (block.primal() / scale, own.T @ own / scale),
        ):
            miss = float((ours.double() - true).abs().max())
            assert miss <= 10 * tolerance * max(scale, float(U.abs().max())), (block.name, block.rule, miss)


wirings = st.tuples(nodes(), st.none() | st.integers(0, 5), st.integers(1, 4), st.integers(0, 10**6))
smooth = [loss for loss in LOSSES if loss.name != "nll"]  # it needs log-probabilities


@given(wirings, st.sampled_from(smooth), st.sampled_from(["loop", "loop", "vmap", "fold"]))
def test_rows_of_drawn_wirings(drawn, loss, way):
    plan, skip, N, seed = drawn
    model, x, side = built(plan, skip, False, N, seed)
    z = model(x, side).detach()
    criterion, y = loss.criterion(2).double(), loss.target(z)
    lin = linearise(model, criterion, [((x, side), {}, y)], sweep=way)
    J = jacobian(model, (x, side), {})
    check(model, lin.blocks, rows(criterion, z, y, J, N), 1e-10)
    reached = {id(p) for block in lin.blocks for p in block.params}
    for p in model.parameters():
        assert (id(p) in reached) == (p.grad is not None)


@given(wirings)
def test_rows_in_float32(drawn):
    plan, skip, N, seed = drawn
    model, x, side = built(plan, skip, False, N, seed)
    z = model(x, side).detach()
    y, criterion = torch.randn_like(z), nn.MSELoss()
    U = rows(criterion, z, y, jacobian(model, (x, side), {}), N)
    model.float()
    lin = linearise(model, criterion, [((x.float(), side.float()), {}, y.float())])
    check(model, lin.blocks, U, 1e-4)


@given(wirings)
def test_two_heads_in_a_dict(drawn):
    """One criterion per head, summed: their rows one after the other, zero for what a head does not see."""
    plan, skip, N, seed = drawn
    model, x, side = built(plan, skip, True, N, seed)
    criteria = [nn.MSELoss(), nn.BCEWithLogitsLoss()]
    tape = Tape(model, criteria, None, "loop")
    found = model(x, side)
    zs = [found["z"], found["more"][0]]
    ys = [torch.randn(N, 2).double(), torch.rand(N, 2).double()]
    sum(c(z, y) for c, z, y in zip(criteria, zs, ys, strict=True)).backward()
    lin = Linearisation(tape.terms)
    tape.close()
    heads = [lambda out: out["z"], lambda out: out["more"][0]]
    order = [criteria.index(term.use.criterion) for term in tape.terms or lin.terms]
    parts = [rows(criteria[k], zs[k].detach(), ys[k], jacobian(model, (x, side), {}, heads[k]), N) for k in order]
    check(model, lin.blocks, torch.cat(parts), 1e-10)
    g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in model.parameters()])
    assert_close(dense(model, lin.blocks).T @ lin.e0, g, 1e-9)


@given(wirings)
def test_the_coverage_of_a_drawn_wiring_is_exact(drawn):
    plan, skip, N, seed = drawn
    model, x, side = built(plan, skip, False, N, seed)
    opt = pullback.GaussNewton(model, nn.MSELoss(), sweep="loop")
    z = model(x, side)
    opt.criterion(z, torch.zeros_like(z)).backward()
    opt.step()
    for name, p in model.named_parameters():
        assert opt.coverage[name].status == ("exact" if p.grad is not None else "unused"), str(opt.coverage)
    with pytest.raises(pullback.StepError, match="call"):
        opt.step()
