"""Integration times as parameters: their gradient and curvature, penalties, bounds, schedules and rules."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from fields import TIGHT, build, jacobian, miss
from torch import nn

import pullback
from oracle import assert_close, dense, linearise
from pullback.errors import SolverError, StepError
from pullback.ode import ODEBlock

C = 0.3


def learned(adjoint=True, penalty=C, learn=("t0", "t1"), n=5, name="chain", **options):
    return build(name, n=n, adjoint=adjoint, learn=learn, penalty=penalty, **{**TIGHT, **options})


def cost(model, x, y):
    """The loss with the penalties, as a function of nothing but the weights."""
    times = [time for time in (model[1].start, model[1].end) if time is not None]
    return nn.MSELoss()(model(x), y) + sum(0.5 * time.penalty * time.t**2 for time in times)


def at(time, value):
    with torch.no_grad():
        time.t.fill_(value)


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("which", ["start", "end"])
def test_the_gradient_against_differences(which, adjoint):
    model, x, y = learned(adjoint)
    time = getattr(model[1], which)
    nn.MSELoss()(model(x), y).backward()
    t, h = time.value, 1e-4
    ends = []
    for side in (h, -h):
        at(time, t + side)
        ends.append(cost(model, x, y).item())
    assert abs(float(time.t.grad) - (ends[0] - ends[1]) / (2 * h)) < 1e-6 * abs(float(time.t.grad))


@pytest.mark.parametrize("adjoint", [True, False])
def test_the_curvature_against_differences(adjoint):
    """At zero residual Q_TT is the whole second derivative."""
    model, x, _ = learned(adjoint, learn="t1")
    y = model(x).detach()
    time = model[1].end
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)])
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    Q = float(dense(model, lin.blocks).square().sum(0)[names.index("1.end.t")])
    t, h = time.value, 1e-4
    slopes = []
    for side in (h, -h):
        at(time, t + side)
        model.zero_grad()
        nn.MSELoss()(model(x), y).backward()
        slopes.append(float(time.t.grad))
    assert abs(Q - (slopes[0] - slopes[1]) / (2 * h)) < 1e-6 * Q


@pytest.mark.parametrize("adjoint", [True, False])
def test_the_metric_holds_the_penalty(adjoint):
    model, x, y = learned(adjoint)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)])
    U = dense(model, lin.blocks)
    J = jacobian(model, x)
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    true = J.T @ J * (2 / y.numel())
    for name in ("1.start.t", "1.end.t"):
        true[names.index(name), names.index(name)] += C
    assert_close(U.T @ U, true, 1e-8)
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert miss(U.T @ lin.e0, g) < 1e-8
    assert lin.gradient(lin.blocks).rest is None


def test_any_optimizer_sees_the_gradient_of_the_penalty_also_in_a_copy():
    model, x, y = learned()
    plain, _, _ = learned(penalty=0.0)
    for m in (model, copy.deepcopy(model), plain):
        m.zero_grad()
        nn.MSELoss()(m(x), y).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    nn.MSELoss()(twin(x), y).backward()
    assert abs(float(twin[1].end.t.grad - plain[1].end.t.grad) - C * 1.0) < 1e-9
    assert abs(float(model[1].end.t.grad - plain[1].end.t.grad) - C * 1.0) < 1e-9


@pytest.mark.parametrize("rule", ["fixed", "open loop", "joint", "feedback"])
@pytest.mark.parametrize("penalty", [0.0, C])
def test_the_rules_train(rule, penalty):
    model, x, y = build("chain", n=6, learn="t1", penalty=penalty, rtol=1e-4, atol=1e-5)
    if rule == "fixed":
        model[1].end.requires_grad_(False)
    made = {"open loop": pullback.LayerwiseMetric, "feedback": pullback.FeedbackGaussNewton}
    criterion = nn.MSELoss()
    opt = made.get(rule, pullback.GaussNewton)(model, criterion, sweep="loop")
    values = []
    for _ in range(6):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        values.append(cost(model, x, y).item())
        opt.step()
        assert abs(opt.last.loss - (values[-1] if rule != "fixed" else loss.item())) < 1e-3
    assert values[-1] < values[0]
    assert (model[1].t1 == 1.0) == (rule == "fixed")


def test_joint_time_is_the_dense_solve_and_not_its_own_diagonal():
    model, x, y = learned(learn="t1")
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)])
    U = dense(model, lin.blocks)
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    mu = 0.01
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    k = names.index("1.end.t")
    joint = -torch.linalg.solve(U.T @ U + mu * torch.eye(len(g)).double(), g)[k]
    alone = -g[k] / (U[:, k].square().sum() + mu)
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=pullback.Damping(control="fixed", initial=mu))
    opt.close()
    solved = pullback.curvature.Linearisation(lin.terms)
    w = torch.linalg.solve(mu * torch.eye(solved.R).double() + sum(b.gram() for b in solved.blocks), solved.e0)
    ours = next(-b.rmatvec(w) for b in solved.blocks if b.params[0] is model[1].end.t)
    assert abs(float(ours - joint)) < 1e-8 * abs(float(joint))
    assert abs(float(alone - joint)) > 1e-2 * abs(float(joint))


def test_a_schedule():
    model, x, y = build("chain", learn="t1", every=3)
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion)
    times = [model[1].t1]
    for _ in range(7):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        times.append(model[1].t1)
    moved = [a != b for a, b in itertools.pairwise(times)]
    assert moved == [True, False, False, True, False, False, True]


def test_a_time_driven_to_the_start_is_put_back():
    model, x, y = build("chain", learn="t1")
    criterion = nn.MSELoss()
    criterion(model(x), y).backward()
    at(model[1].end, -3.0)
    with pytest.raises(SolverError, match="put back to 0 and 1"):
        model(x)
    assert model[1].t1 == 1.0
    at(model[1].end, float("nan"))
    with pytest.raises(SolverError, match="put back"):
        model(x)
    assert model[1].t1 == 1.0


@pytest.mark.parametrize("optimizer", [pullback.GaussNewton, pullback.FeedbackGaussNewton])
def test_a_step_over_the_bounds_is_undone_and_damped(optimizer):
    """A penalty that wants t1 at 0 while the interval must stay 0.9 long."""
    model, x, y = build("chain", n=6, learn="t1", penalty=50.0, shortest=0.9)
    criterion = nn.MSELoss()
    opt = optimizer(model, criterion, sweep="loop")
    for _ in range(5):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        assert model[1].t1 >= 0.9
    assert opt.last.trials > 1 or model[1].t1 < 1.0


def test_kronecker_has_the_curvature_of_the_penalty():
    model, x, y = learned(learn="t1")
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion, columns="exact")
    criterion(model(x), y).backward()
    opt.step()
    block = next(b for b in opt.blocks if b.params[0] is model[1].end.t)
    free, _, _ = learned(learn="t1", penalty=0.0)
    other = pullback.Kronecker(free, criterion, columns="exact")
    criterion(free(x), y).backward()
    other.step()
    plain = next(b for b in other.blocks if b.params[0] is free[1].end.t)
    assert abs(float(block.side.C - plain.side.C) - C) < 1e-9


def test_ocnopt_refuses_penalties():
    model, x, y = learned(learn="t1")
    criterion = nn.MSELoss()
    opt = pullback.OCNOpt(model, criterion)
    criterion(model(x), y).backward()
    with pytest.raises(StepError, match="penalty"):
        opt.step()


@pytest.mark.parametrize("which", ["t0", "t1"])
@pytest.mark.parametrize("Opt", [pullback.GaussNewton, pullback.Kronecker, pullback.FeedbackGaussNewton])
def test_a_time_that_wants_to_be_longer_stays_at_its_bound(Opt, which):
    """Growth by a rate that is given, to more than the longest interval allows."""

    class Growth(nn.Module):
        def forward(self, t, x):
            return x

    torch.manual_seed(0)
    block = ODEBlock(Growth(), learn=which, longest=1.5, rtol=1e-6, atol=1e-7)
    model = nn.Sequential(block, nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
        model[1].bias.zero_()
    for p in model[1].parameters():
        p.requires_grad_(False)
    x = torch.randn(8, 2).double()
    criterion, y = nn.MSELoss(), 20.0 * x  # exp(3) and no less
    opt = Opt(model, criterion, **({"lr": 50.0} if Opt is pullback.Kronecker else {}))
    for _ in range(30):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
    out = model(x)
    assert block.t1 - block.t0 == pytest.approx(1.5, abs=1e-6)
    torch.testing.assert_close(out, torch.exp(torch.tensor(1.5)).double() * x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="longest"):
        ODEBlock(Growth(), learn=which, longest=0.5)
