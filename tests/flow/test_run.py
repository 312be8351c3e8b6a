"""Runs: the law of the cost, the stopping time, the certificate, bounds, dense output, the rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import pullback.flow.adapted as adapted
from oracle import assert_close
from pullback.flow import AdaptedFlow, FlowRun, Squared, flow
from pullback.flow.aims import stacked
from pullback.flow.nets import FoldNet, fold_time
from pullback.flow.problems import load_flow_problem

f64 = torch.float64


def regression(rows: int = 12, width: int = 20, outputs: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    return model, torch.randn(rows, 4, dtype=f64), torch.randn(rows, outputs, dtype=f64)


@torch.no_grad()
def square(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x) - y).square().sum())


@pytest.mark.parametrize(("method", "tol"), [("dopri5", None), ("dopri8", None), ("discrete", 1e-4)])
def test_the_cost_follows_its_law_to_the_stopping_time(method: str, tol: float | None) -> None:
    model, x, y = regression()
    prepared = AdaptedFlow(model, x, y)
    x0, first = stacked(model(x).detach()), prepared.initial
    eps = 1e-10 * first
    T = prepared.stopping_time(eps)
    assert math.log(first / eps) * 12 / 2 == pytest.approx(T, rel=1e-12)
    run = prepared.run(eps, method=method, tol=tol, keep_path=True)
    prepared.close()
    certificate = run.certificate
    assert (run.ended, run.s, run.regime) == ("time", T, "over-parametrised")
    assert eps * 0.9 < run.cost <= eps * 1.01
    assert certificate.held is True
    assert certificate.expected == -4 / 24
    assert certificate.slope == pytest.approx(-4 / 24, rel=1e-3)
    assert run.end is not None
    assert run.end.kind == "global minimum"
    # The weights of the model are those of the end, and dense output follows the line in output space.
    assert square(model, x, y) / 24 == pytest.approx(run.cost, rel=1e-9)
    assert run.path is not None
    s = 0.37 * T
    parts = run.path.at(s).split([p.numel() for p in prepared.system.params])
    with torch.no_grad():
        for p, part in zip(prepared.system.params, parts, strict=True):
            p.copy_(part.view_as(p))
    line = stacked(y) + math.exp(-2 / 24 * s) * (x0 - stacked(y))
    close = 2e-3 if method != "discrete" else 0.05
    assert float((stacked(model(x).detach()) - line).norm() / (line - stacked(y)).norm()) < close
    with pytest.raises(ValueError, match="covers s from 0"):
        run.path.at(2 * T)


def test_the_step_of_the_discrete_scheme_is_gauss_newton() -> None:
    """One step of time h: theta + eta D^+ (y - x), eta = 1 - e^{-2ch}."""
    model, x, y = regression(outputs=2)
    prepared = AdaptedFlow(model, x, y, c=0.4)
    before = prepared.system.get()
    D = prepared.system.linearise().dense()
    residual = stacked(y) - stacked(prepared.system.outputs())
    prepared.run(until=0.01, method="discrete", tol=1.0)
    eta = 1 - math.exp(-0.8 * 0.01)
    assert_close(prepared.system.get(), before + eta * torch.linalg.pinv(D) @ residual)
    prepared.close()


def test_a_target_may_move() -> None:
    model, x, y = regression(rows=6)
    way = torch.randn(6, 1, dtype=f64)

    def path(s: Tensor) -> Tensor:
        return y + torch.sin(s / 10) * way

    first = AdaptedFlow(model, x, path).initial
    run = flow(model, x, path, 1e-6 * first)
    assert run.certificate.slope == pytest.approx(-4 / 12, rel=1e-3)
    assert run.cost == pytest.approx(1e-6 * first, rel=1e-2)
    assert square(model, x, path(torch.tensor(run.s, dtype=f64))) / 12 == pytest.approx(run.cost, rel=1e-6)


def test_cross_entropy_ends_at_its_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    x, labels = torch.randn(8, 4, dtype=f64), torch.randint(0, 3, (8,))
    run = flow(model, x, labels, 0.05)
    assert run.shape[0] == 16
    assert run.cost == pytest.approx(0.05, rel=1e-3)
    assert nn.functional.cross_entropy(model(x), labels).item() == pytest.approx(run.cost, rel=1e-12)
    assert run.certificate.held is True


def test_matrix_free_agrees_with_cholesky() -> None:
    ends = []
    for solver in ("cholesky", "lsmr"):
        model, x, y = regression(rows=5)
        run = flow(model, x, y, 1e-3, solver=solver)
        assert run.certificate.held is True
        assert run.solver == solver
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert_close(*ends, tolerance=1e-4)


def test_the_under_parametrised_flow_promises_nothing_and_ends_in_an_equilibrium() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=f64)
    model = nn.Linear(3, 2).double()
    y = torch.randn(40, 2, dtype=f64)
    run = flow(model, x, y)
    assert (run.regime, run.stopping_time, run.ended) == ("under-parametrised", None, "equilibrium")
    assert run.end is not None
    assert run.end.kind == "full-rank equilibrium"
    assert run.certificate.missed is not None
    wide = torch.cat([x, torch.ones(40, 1, dtype=f64)], 1)
    least = torch.linalg.lstsq(wide, y).solution
    assert run.cost == pytest.approx(float((wide @ least - y).square().sum()) / 80, rel=1e-9)


def test_a_run_cut_short_of_an_equilibrium_says_how_fast_the_cost_still_falls() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=f64)
    y = torch.randn(40, 2, dtype=f64)
    model = nn.Linear(3, 2).double()
    unit = 40.0  # 1 / (2c), c = 1 / (2N)
    run = flow(model, x, y, until=0.25 * unit)
    with torch.no_grad():
        r = (model(x) - y).T.reshape(-1)
    D = torch.kron(torch.eye(2, dtype=f64), torch.cat([x, torch.ones(40, 1, dtype=f64)], 1))
    Q = torch.linalg.qr(D)[0]
    share = 2 * float((Q.T @ r).square().sum() / r.square().sum())
    assert f"the cost still falls by {share:.1e} of itself in a time of {unit:g}." in run.notes[-1]


def fold(seed: int = 0) -> tuple[FoldNet, Tensor, Tensor, float]:
    problem = load_flow_problem("rank-loss:rows=3,features=5")
    model = problem.make_model(seed)
    assert isinstance(model, FoldNet)
    assert isinstance(problem.targets, Tensor)
    assert problem.loss_time is not None
    assert problem.loss_time(seed) == fold_time(model, problem.inputs, problem.targets)
    return model, problem.inputs, problem.targets, problem.loss_time(seed)


@pytest.mark.parametrize(
    ("seed", "method", "tol", "off"), [(1, "dopri5", 1e-8, 1e-6), (0, "dopri8", 1e-8, 1e-5), (1, "discrete", 1e-3, 0.2)]
)
def test_the_rank_is_lost_at_its_time_and_the_constrained_system_goes_on(
    seed: int, method: str, tol: float, off: float
) -> None:
    model, x, y, when = fold(seed)
    run = flow(model, x, y, 1e-8, method=method, tol=tol)
    (loss,) = run.losses
    assert abs(loss.s - when) < off
    assert loss.rank == 2
    assert run.s > loss.s
    assert run.certificate.held is False
    assert "constrained system" in " ".join(run.notes)
    # What cannot be reached stays at zero, the rest arrives: the least cost there is.
    assert run.cost == pytest.approx(float(y[0] ** 2) / 6, rel=1e-3 if method != "discrete" else 0.05)
    assert run.end is not None
    assert run.end.rank == 2
    if method != "discrete":
        assert run.ended == "equilibrium"
        assert run.end.kind == "rank-deficient critical point"
        # Five weights; three outputs are pinned, each by one condition on them.
        assert run.end.dimension == 2


def test_constrained_outputs_move_as_the_projected_gradient() -> None:
    model, x, y, when = fold()
    run = flow(model, x, y, until=when + 3, tol=1e-7, keep_path=True)
    c, path = 1 / 6, run.path
    assert path is not None
    k = next(i for i, s in enumerate(path.times) if s > when + 1)
    with torch.no_grad():
        model.unit.weight.copy_(path.thetas[k].view(1, -1))
    z = model(x).detach()[:, 0]
    D = 2 * (x @ model.unit.weight.detach().T) * x
    moved = D @ path.slopes[k]
    assert_close(moved[1:], -2 * c * (z - y[:, 0])[1:], 1e-3)
    assert abs(float(moved[0])) < 1e-5


def test_bounds_end_a_run_in_words() -> None:
    model, x, y = regression()
    run = flow(model, x, y, 1e-9, evaluations=30)
    assert run.ended.startswith("stopped after 30 evaluations")
    assert 0 < run.s < run.stopping_time
    assert "seconds=..." in flow(*regression(), 1e-9, seconds=0.01).ended


def test_a_badly_conditioned_start_is_reported_and_makes_progress() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    x = torch.linspace(-1, 1, 12, dtype=f64)[:, None]
    y = torch.sin(3 * x)
    prepared = AdaptedFlow(model, x, y, rank_tol=1e-12)
    assert prepared.condition is not None
    assert prepared.condition >= 5e6
    assert any("badly conditioned" in note and "regime='any-rank'" in note for note in prepared.notes)
    run = prepared.run(1e-3 * prepared.initial, evaluations=1500, seconds=20)
    prepared.close()
    assert run.cost < 0.999 * prepared.initial
    assert run.ended == "time" or run.ended.startswith("stopped") or run.losses


def test_ctrl_c_keeps_what_was_reached() -> None:
    model, x, y = regression()

    def stop(share: float, smallest: float | None) -> None:
        assert smallest is not None
        if share > 0.3:
            raise KeyboardInterrupt

    run = flow(model, x, y, 1e-8, progress=stop)
    assert run.ended == "interrupted"
    assert 0.3 * run.stopping_time < run.s < run.stopping_time
    assert square(model, x, y) / 24 == pytest.approx(run.cost, rel=1e-12)
    assert not model._forward_hooks


def test_the_record_is_json() -> None:
    run: FlowRun = flow(*regression(rows=5), 1e-3)
    record = json.loads(json.dumps(run.to_json(), allow_nan=False))
    assert {"stopping_time", "cost", "regime", "rank", "history", "certificate", "end_point"} <= set(record)
    assert record["history"][0]["s"] == 0
    assert record["history"][-1]["cost"] == record["cost"]


def test_the_standard_flow_and_the_way_to_it() -> None:
    """Plain gradient flow on the same solver; every alpha descends."""
    costs = []
    for alpha in (0.0, 0.5, 1.0):
        model, x, y = regression(rows=6)
        run = flow(model, x, y, until=6.0, alpha=alpha)
        energies = [m.cost for m in run.history]
        assert all(a >= b for a, b in pairwise(energies))
        costs.append(run.cost)
    first = AdaptedFlow(*regression(rows=6)).initial
    assert costs[2] == pytest.approx(math.exp(-4 / 12 * 6) * first, rel=1e-4)
    model, x, y = regression(rows=6)
    theta, h = [p.detach().clone() for p in model.parameters()], 1e-3
    for _ in range(1000):  # Euler, by autograd alone
        loss = (model(x) - y).square().sum() / 12
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data -= h * g
    euler = square(model, x, y) / 12
    for p, start in zip(model.parameters(), theta, strict=True):
        p.data.copy_(start)
    assert flow(model, x, y, until=1.0, alpha=0.0).cost == pytest.approx(euler, rel=1e-3)


@pytest.mark.parametrize("make", [Squared])
def test_torchdiffeq_is_asked_for_by_name(make: Callable[..., Squared], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    model, x, y = regression(rows=4)
    assert 'pip install "pullback[flow]"' in flow(model, x, make(y), 1e-2).ended
    assert adapted.flow(model, x, make(y), 1e-2, method="discrete").ended == "time"
