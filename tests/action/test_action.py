"""The action beside dense quadrature, its identity, and the defects of optimizers' steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pullback
from oracle import assert_close, dense, linearise
from pullback.action import ActionRecorder, PulledBack, VaryingMetric, metric_flow, path_action, steps_action
from pullback.action.path import gauss
from pullback.flow import energy
from pullback.flow.record import Path
from pullback.stability import FixedMetric, Objective, StabilityError

f64 = torch.float64


def small(classes: bool = False) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(9, 3, dtype=f64)
    if classes:
        return model, nn.CrossEntropyLoss(), (x, torch.randint(2, (9,)))
    return model, nn.MSELoss(), (x, torch.randn(9, 2, dtype=f64))


def positive(K: int) -> Tensor:
    A = torch.randn(K, K, dtype=f64)
    return A @ A.T / K + 0.5 * torch.eye(K, dtype=f64)


METRICS = {
    "identity": lambda m, c, d: None,
    "mass": lambda m, c, d: FixedMetric(torch.linspace(0.5, 2, 26, dtype=f64)),
    "matrix": lambda m, c, d: FixedMetric(positive(26)),
    "varying": lambda m, c, d: VaryingMetric(lambda theta: 1 + theta.square()),
    "layerwise": lambda m, c, d: PulledBack(m, c, d, mu=0.2),
    "global": lambda m, c, d: PulledBack(m, c, d, mu=0.2, partition="global"),
}


@pytest.mark.parametrize("name", METRICS)
def test_zero_on_the_flow_positive_beside_it_and_the_identity(name: str) -> None:
    model, criterion, data = small()
    metric = METRICS[name](model, criterion, data)
    path = metric_flow(model, criterion, data, until=1.0, points=16, metric=metric, tol=1e-9)
    on = path_action(model, criterion, data, path, metric=metric, nodes=5)
    assert 0 <= on.total < 1e-7 * on.kinetic  # cubic interpolation between 17 points
    assert abs(on.gap) < 1e-10
    assert on.kinetic == pytest.approx(-on.work / 2, rel=1e-3)
    slow = Path([2 * t for t in path.times], path.thetas, [s / 2 for s in path.slopes])
    off = path_action(model, criterion, data, slow, metric=metric, nodes=5)
    # At half the speed half the force is left over: S is a quarter of the force along the way.
    assert off.total == pytest.approx(off.force / 4, rel=1e-3)
    assert abs(off.gap) < 1e-10
    assert sum(off.modules.values()) == pytest.approx(off.total, rel=1e-12)
    assert off.total > 0.01


def test_zero_to_the_tolerance_of_the_integrator() -> None:
    model, criterion, data = small()
    found = []
    for tol in (1e-3, 1e-5, 1e-8):
        path = metric_flow(model, criterion, data, until=2.0, points=100, tol=tol)
        found.append(path_action(model, criterion, data, path).total)
    assert found[2] <= found[1] <= found[0]
    assert found[2] < 1e-10


@given(st.integers(0, 1000), st.sampled_from(sorted(METRICS)))
@settings(max_examples=15)
def test_the_identity_on_drawn_paths(seed: int, name: str) -> None:
    """Any curve, in any metric, to 1e-10."""
    model, criterion, data = small(classes=seed % 2 == 1)
    torch.manual_seed(seed)
    metric = METRICS[name](model, criterion, data)
    start = Objective(model, criterion).get()
    times = [0.0, 0.4, 1.0]
    path = Path(
        times, [start + 0.1 * torch.randn(26, dtype=f64) for _ in times], [0.1 * torch.randn(26, dtype=f64)] * 3
    )
    own = path_action(model, criterion, data, path, metric=metric, decay=0.1, nodes=14)
    assert own.total >= 0
    assert abs(own.gap) < 1e-10
    if metric is None:
        assert own.kinetic == pytest.approx(energy(path), rel=1e-10)


def matrix_of(name: str, metric, model: nn.Module, criterion: nn.Module, data, theta: Tensor) -> Tensor:
    """M at packed weights, dense."""
    if name in ("layerwise", "global"):
        with torch.no_grad():
            nn.utils.vector_to_parameters(theta, model.parameters())
        U = dense(model, linearise(model, criterion, [((data[0],), {}, data[1])]).blocks)
        M = U.T @ U
        if name == "layerwise":
            M[:16, 16:] = M[16:, :16] = 0
        return M + 0.2 * torch.eye(26, dtype=f64)
    if metric is None:
        return torch.eye(26, dtype=f64)
    M = metric.at(theta).M
    return M if M.ndim == 2 else torch.diag(M.expand(26))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [False, True])
def test_steps_beside_dense_matrices(name: str, classes: bool) -> None:
    model, criterion, data = small(classes)
    metric = METRICS[name](model, criterion, data)
    objective = Objective(model, criterion, decay=0.1)
    thetas = [objective.get() + 0.1 * torch.randn(26, dtype=f64) for _ in range(4)]
    own = steps_action(model, criterion, data, thetas, 0.3, metric=metric, decay=0.1)
    total, shares = 0.0, torch.zeros(2, dtype=f64)
    for a, b in itertools.pairwise(thetas):
        M = matrix_of(name, metric, model, criterion, data, a)
        v = (b - a) / 0.3 + torch.linalg.solve(M, objective.gradient(a, data))
        each = 0.15 * v * (M @ v)
        total += float(each.sum())
        shares += torch.stack([each[:16].sum(), each[16:].sum()])
    assert own.total == pytest.approx(total, rel=1e-10)
    assert_close(torch.tensor([own.modules["0"], own.modules["2"]], dtype=f64), shares)
    assert abs(own.gap) < 1e-10
    assert own.time == pytest.approx(0.9)


def loop(model, criterion, data, opt, recorder, steps: int, batch: int | None = None, h=0.1, used=None) -> None:
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (batch or 0,)) if batch else slice(None)
        opt.zero_grad()
        criterion(model(data[0][rows]), data[1][rows]).backward()
        with recorder.observe(h=h, used=used):
            opt.step()


def test_plain_steps_have_no_action_and_others_have_what_they_are_named() -> None:
    model, criterion, data = small()
    recorder = ActionRecorder(model, criterion, data, decay=0.01)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    loop(model, criterion, data, opt, recorder, 3)
    assert recorder.action.total < 1e-25
    assert abs(recorder.action.gap) < 1e-12

    recorder = ActionRecorder(model, criterion, data)
    loop(model, criterion, data, torch.optim.SGD(model.parameters(), lr=0.1), recorder, 3, batch=4)
    shares = recorder.action.shares()
    assert shares["noise"] == pytest.approx(1.0)

    recorder = ActionRecorder(model, criterion, data)
    loop(model, criterion, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), recorder, 3)
    assert recorder.action.shares()["momentum"] == pytest.approx(1.0)
    assert recorder.steps[0].total < 1e-25 < 1e-6 < recorder.steps[1].total


def test_shares_add_up_and_are_the_dense_products() -> None:
    """All three defects at once: momentum, a mini-batch, and an old metric."""
    model, criterion, data = small()
    M, old = positive(26), positive(26)
    recorder = ActionRecorder(model, criterion, data, metric=FixedMetric(M))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = Objective(model, criterion)
    for _ in range(3):
        rows, theta = torch.randint(9, (4,)), objective.get()
        opt.zero_grad()
        criterion(model(data[0][rows]), data[1][rows]).backward()
        batch, g = objective.pack_gradient(), objective.gradient(theta, data)
        with recorder.observe(h=0.1, used=FixedMetric(old)):
            opt.step()
        v = (objective.get() - theta) / 0.1
        momentum = v + torch.linalg.solve(old, batch)
        noise = torch.linalg.solve(old, g - batch)
        stale = torch.linalg.solve(M, g) - torch.linalg.solve(old, g)
        assert_close(momentum + noise + stale, v + torch.linalg.solve(M, g))
        found = recorder.steps[-1].defects
        assert found["momentum", "momentum"] == pytest.approx(float(0.05 * momentum @ M @ momentum), rel=1e-10)
        assert found["momentum", "stale"] == pytest.approx(float(0.1 * momentum @ M @ stale), rel=1e-9)
        assert found["noise", "stale"] == pytest.approx(float(0.1 * noise @ M @ stale), rel=1e-9)
    whole = recorder.action
    assert sum(whole.defects.values()) == pytest.approx(whole.total, rel=1e-12)
    assert sum(whole.shares().values()) == pytest.approx(1.0)
    assert sum(whole.modules.values()) == pytest.approx(whole.total, rel=1e-12)
    assert abs(whole.gap) < 1e-10
    assert set(whole.to_dict()["shares"]) == {
        "momentum", "momentum x noise", "momentum x stale", "noise", "noise x stale", "stale",
    }  # fmt: skip
    assert "action" in str(whole)


@pytest.mark.parametrize(("kind", "partition"), [("LayerwiseMetric", "layerwise"), ("GaussNewton", "global")])
def test_steps_of_our_optimizers_are_euler_steps_of_their_metric_flow(kind: str, partition: str) -> None:
    model, criterion, data = small(classes=True)
    opt = getattr(pullback, kind)(model, criterion, damping=pullback.Damping(control="fixed", initial=0.5))
    metric = PulledBack(model, criterion, data, mu=lambda: opt.last.mu, partition=partition)
    recorder = ActionRecorder(model, criterion, data, metric=metric)
    loop(model, criterion, data, opt, recorder, 3, h=lambda: opt.last.scale)
    assert recorder.action.total < 1e-18 * recorder.action.kinetic
    plain = ActionRecorder(model, criterion, data)
    loop(model, criterion, data, opt, plain, 2, h=lambda: opt.last.scale)
    assert plain.action.total > 1e-6


def test_without_data_the_batch_is_the_whole() -> None:
    model, criterion, data = small()
    recorder = ActionRecorder(model, criterion)
    loop(model, criterion, data, torch.optim.Adam(model.parameters(), lr=0.01), recorder, 2, batch=4, h=0.01)
    assert recorder.action.work is None
    assert recorder.action.gap is None
    assert recorder.action.shares()["momentum"] == pytest.approx(1.0)
    assert "work" not in str(recorder.action)


def test_gauss_is_exact_for_its_degree() -> None:
    for nodes in (1, 2, 5, 8):
        u, w = gauss(nodes)
        for degree in range(2 * nodes):
            total = sum(b * a**degree for a, b in zip(u, w, strict=True))
            assert total == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_what_is_refused() -> None:
    model, criterion, data = small()
    theta = Objective(model, criterion).get()
    with pytest.raises(StabilityError, match="two points, this one has 1"):
        path_action(model, criterion, data, Path([0.0], [theta], [theta]))
    with pytest.raises(StabilityError, match="two points"):
        steps_action(model, criterion, data, [theta], 0.1)
    with pytest.raises(StabilityError, match="not finite"):
        steps_action(model, criterion, data, [theta, theta / 0], 0.1)
    with pytest.raises(StabilityError, match="do not grow"):
        path_action(model, criterion, data, Path([0.0, 0.0], [theta, theta], [theta, theta]))
    with pytest.raises(StabilityError, match="time step is 0"):
        steps_action(model, criterion, data, [theta, theta], 0.0)
    bad = VaryingMetric(lambda t: torch.cat([t.new_tensor([-0.125]), torch.ones(25, dtype=f64)]))
    with pytest.raises(StabilityError, match=r"eigenvalue is -0\.125"):
        steps_action(model, criterion, data, [theta, theta], 0.1, metric=bad)
    with pytest.raises(StabilityError, match="eigenvalue is 0"):
        PulledBack(model, criterion, data, mu=0.0)
    with pytest.raises(StabilityError, match="inputs hold numbers"):
        ActionRecorder(model, criterion, (data[0] / 0, data[1]))
    recorder = ActionRecorder(model, criterion, data)
    with pytest.raises(StabilityError, match="one point"):
        recorder.action  # noqa: B018
    with pytest.raises(StabilityError, match="call backward"), recorder.observe(h=0.1):
        pass
    criterion(model(data[0]), data[1]).backward()
    with pytest.raises(StabilityError, match="time step"), recorder.observe(h=-1.0):
        pass
    with pytest.raises(StabilityError, match="step is not finite"), recorder.observe(h=1.0), torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert not recorder.steps
    with pytest.raises(StabilityError, match="points is 0"):
        metric_flow(model, criterion, data, until=1.0, points=0)
