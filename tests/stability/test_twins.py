"""Twins in closed form and by steps: below the bound in every draw, and not without the factor of the data."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pullback
from oracle import assert_close
from pullback.stability import (
    Descent,
    FixedMetric,
    KernelRidge,
    Objective,
    Pair,
    Ridge,
    StabilityError,
    Training,
    compare,
    fit_power,
    scaling,
    twins,
)
from pullback.stability.descent import PATHWISE
from pullback.stability.ridge import NAIVE
from pullback.stability.scaling import student
from pullback.stability.twins import replaced

f64 = torch.float64


def drawn(seed: int, n: int, d: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """n rows of a regression, 50 to replace them with, 50 held out."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 100, d, generator=g, dtype=f64)
    y = x @ torch.randn(d, generator=g, dtype=f64) + 0.5 * torch.randn(n + 100, generator=g, dtype=f64)
    return (x[:n], y[:n]), (x[n : n + 50], y[n : n + 50]), (x[n + 50 :], y[n + 50 :])


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(a, b).square() / 4)


def test_ridge_stays_below_in_every_draw() -> None:
    ratios = []
    for seed in range(200):
        d, n, decay = 1 + seed % 9, 5 + 3 * (seed % 40), 10.0 ** (seed % 4 - 2)
        data, spare, held_out = drawn(seed, n, d)
        report = twins(Ridge(decay), data, 1, spare=spare, held_out=held_out, seed=seed)
        assert report.held, str(report)
        ratios += report.ratios("one rate")
    assert 0.02 < sorted(ratios)[100] < 0.5  # not vacuous


def test_kernel_ridge_stays_below_in_every_draw() -> None:
    for seed in range(100):
        data, spare, held_out = drawn(seed, 5 + seed % 40, 1 + seed % 4)
        report = twins(
            KernelRidge(gaussian, 10.0 ** (seed % 4 - 3)), data, 1, spare=spare, held_out=held_out, seed=seed
        )
        assert report.held, str(report)


@pytest.mark.parametrize("time", [0.1, 1.0, 10.0, math.inf])
def test_other_metrics_and_finite_time(time: float) -> None:
    for seed in range(25):
        d = 1 + seed % 5
        data, spare, held_out = drawn(seed, 20, d)
        A = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=f64)
        metric = FixedMetric(A @ A.T + 0.2 * torch.eye(d, dtype=f64))
        for learner in (Ridge(0.2, metric=metric, time=time), Ridge(0.2, data_scale=float(1 + seed), time=time)):
            report = twins(learner, data, 1, spare=spare, held_out=held_out, seed=seed)
            assert report.held, str(report)


def test_the_flow_in_closed_form_beside_small_steps() -> None:
    data, _, _ = drawn(0, 12, 3)
    for learner in (
        Ridge(0.3, data_scale=2.0, time=0.7),
        Ridge(0.3, metric=FixedMetric(torch.arange(1.0, 4.0)), time=0.7),
    ):
        M, theta = learner._matrix(data), torch.zeros(3, dtype=f64)
        H, b = learner.hessian(data), data[0].T @ data[1] / 12
        for _ in range(20_000):
            theta = theta - 0.7 / 20_000 * torch.linalg.solve(M, H @ theta - b)
        assert_close(learner.train(data), theta, 1e-4)
        eigenvalues = torch.linalg.eigvals(torch.linalg.solve(M, H)).real
        assert learner.rate(data) == pytest.approx(float(eigenvalues.min()), rel=1e-10)
    assert float((H @ learner.at(data, math.inf) - b).norm()) < 1e-12


def test_without_its_factor_the_bound_is_false() -> None:
    """The twin's new sample has all the weight in the metric; ridge regression in one dimension."""
    n, small = 50, 1e-3
    x, y = torch.full((n, 1), small, dtype=f64), torch.full((n,), 1 / small, dtype=f64)
    x2, y2 = replaced((x, y), 0, (torch.ones(1, dtype=f64), torch.ones((), dtype=f64)))
    for time in (0.05, 0.3, 1.0, 2.0):
        twin = compare(Ridge(1.0, data_scale=20.0, time=time), (x, y), (x2, y2))
        right, naive = twin.bounds
        assert naive.name == NAIVE
        assert not naive.derived
        assert twin.ratio(naive) > 2
        assert twin.ratio(right) < 0.5


def test_kernel_ridge_beside_ridge_in_features() -> None:
    """With Cholesky's rows as features both are the same regression, and so are distance, losses and gradients."""
    (x, y), (x2, y2), _ = drawn(3, 15, 2)
    points, targets = torch.cat([x, x2[:1]]), torch.cat([y, y2[:1]])
    features = torch.linalg.cholesky(gaussian(points, points) + 1e-13 * torch.eye(16, dtype=f64))
    swap = [15, *range(1, 15)]
    kernel, plain = KernelRidge(gaussian, 0.05), Ridge(0.05)
    a, b = kernel.train((x, y)), kernel.train((points[swap], targets[swap]))
    u, v = plain.train((features[:15], y)), plain.train((features[swap], targets[swap]))
    assert kernel.distance(a, b) == pytest.approx(plain.distance(u, v), rel=1e-8)
    assert_close(kernel.losses(a, (points, targets)), plain.losses(u, (features, targets)), 1e-8)
    assert_close(kernel.gradient_norms(a, (points, targets)), plain.gradient_norms(u, (features, targets)), 1e-8)
    assert kernel.distance(a, kernel.train((x[:9], y[:9]))) > 0


def net(n: int = 30) -> tuple[Objective, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(n + 10, 2, dtype=f64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()
    return Objective(model, nn.CrossEntropyLoss(), decay=0.05), (x[:n], y[:n]), (x[n:], y[n:])


def spectrum_of(objective: Objective, metric: FixedMetric):
    def spectrum(theta: Tensor, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
        H = torch.autograd.functional.hessian(lambda t: objective._loss(t, data), theta)
        M = metric.M if metric.M.ndim == 2 else metric.M * torch.eye(len(theta), dtype=f64)
        factor = torch.linalg.cholesky(M)
        half = torch.linalg.solve_triangular(factor, H, upper=False)
        values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))
        return float(values[0]), float(values[-1])

    return spectrum


@pytest.mark.parametrize("kind", ["identity", "matrix"])
def test_steps_of_a_net_stay_below_along_the_pair(kind: str) -> None:
    objective, data, spare = net()
    A = torch.randn(objective.size, objective.size, dtype=f64) / 5
    metric = FixedMetric() if kind == "identity" else FixedMetric(A @ A.T + torch.eye(objective.size, dtype=f64))
    learner = Descent(objective, steps=30, h=0.5, metric=metric, spectrum=spectrum_of(objective, metric), every=5)
    report = twins(learner, data, 4, spare=spare, held_out=spare)
    assert report.held, str(report)
    assert max(report.ratios(PATHWISE)) > 0.05
    for twin in report.pairs:
        along, sampled, stated = twin.bounds
        assert twin.distance <= along.distance <= sampled.distance * 1.01
        assert not stated.derived
    assert report.to_dict()["held"] is True
    assert "broken 0 times" in str(report)


def test_factors_are_those_of_the_averaged_hessian() -> None:
    """q |delta|_M = |(I - h M^-1 H) delta|_M with H averaged over the segment, dense."""
    objective, data, spare = net()
    learner = Descent(objective, steps=4, h=0.5, scaling=False)
    twin = replaced(data, 3, (spare[0][0], spare[1][0]))
    pair = Pair(data, twin, 3, learner.train(data), learner.train(twin), data)
    factors = learner.factors(pair)
    assert factors[0] == 1.0  # still together
    for k in range(1, 4):
        a, b = pair.state.thetas[k], pair.other.thetas[k]
        middle = torch.zeros(objective.size, objective.size, dtype=f64)
        for s in (torch.arange(20, dtype=f64) + 0.5) / 20:
            middle += torch.autograd.functional.hessian(lambda t: objective._loss(t, data), b + s * (a - b)) / 20
        moved = (a - b) - 0.5 * (middle @ (a - b))
        assert factors[k] == pytest.approx(float(moved.norm() / (a - b).norm()), rel=1e-6)


def test_any_training_can_be_measured() -> None:
    objective, data, spare = net()

    def train(own: tuple[Tensor, Tensor]) -> Tensor:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        criterion = nn.CrossEntropyLoss()
        opt = pullback.LayerwiseMetric(model, criterion)
        for _ in range(5):
            opt.zero_grad()
            criterion(model(own[0]), own[1]).backward()
            opt.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    report = twins(Training(objective, train), data, 2, spare=spare)
    assert all(twin.distance > 0 and twin.gap is None and not twin.bounds for twin in report.pairs)
    noisy = Training(objective, lambda own: objective.get() + torch.rand(()))
    with pytest.raises(StabilityError, match="ends elsewhere"):
        twins(noisy, data, 1, spare=spare)
    with pytest.raises(StabilityError, match="not finite"):
        twins(Training(objective, lambda own: objective.get() / 0), data, 1, spare=spare)


def test_scaling_finds_the_exponent_of_ridge() -> None:
    data, spare, held_out = drawn(0, 800, 4)
    found = scaling(Ridge(0.5), data, [50, 100, 200, 400, 800], 20, spare=spare, held_out=held_out)
    assert found.held
    assert found.distance.low < -1 < found.distance.high or abs(found.distance.exponent + 1) < 0.15
    assert "95%" in str(found)
    assert [report["n"] for report in found.to_dict()["reports"]] == [50, 100, 200, 400, 800]


def test_the_fit_beside_scipy() -> None:
    torch.manual_seed(0)
    ns = [10, 30, 60, 120, 500]
    values = [3.0 * n**-0.7 * math.exp(0.2 * float(torch.randn(()))) for n in ns]
    fit = fit_power(ns, values, level=0.9)
    other = stats.linregress([math.log(n) for n in ns], [math.log(v) for v in values])
    half = stats.t.ppf(0.95, 3) * other.stderr
    assert fit.exponent == pytest.approx(other.slope, rel=1e-12)
    assert (fit.low, fit.high) == pytest.approx((other.slope - half, other.slope + half), rel=1e-10)
    for freedom in (1, 2, 3, 4, 7, 12, 31):
        for level in (0.5, 0.9, 0.95, 0.999):
            assert student(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_what_twins_refuse() -> None:
    data, spare, _ = drawn(0, 6, 2)
    x, y = data
    both = y.clone()
    both[[0, 2]] += 1
    with pytest.raises(StabilityError, match="in 2 \\(0, 2\\)"):
        compare(Ridge(1.0), data, (x, both))
    with pytest.raises(StabilityError, match="in 0 \\(none\\)"):
        compare(Ridge(1.0), data, data)
    with pytest.raises(StabilityError, match="same shapes"):
        compare(Ridge(1.0), data, (x[:5], y[:5]))
    with pytest.raises(StabilityError, match="n = 1"):
        twins(Ridge(1.0), (x[:1], y[:1]), 1, spare=spare)
    with pytest.raises(StabilityError, match="targets hold numbers"):
        twins(Ridge(1.0), (x, y * float("nan")), 1, spare=spare)
    with pytest.raises(StabilityError, match="n_pairs is 0"):
        twins(Ridge(1.0), data, 0, spare=spare)
    with pytest.raises(StabilityError, match="three or more"):
        scaling(Ridge(1.0), data, [3, 6], 1, spare=spare)
    with pytest.raises(StabilityError, match="logarithms"):
        fit_power([1, 2, 3], [1.0, 0.0, 1.0])
    with pytest.raises(StabilityError, match="three of both"):
        fit_power([1, 2, 2], [1.0, 1.0, 1.0])
    with pytest.raises(StabilityError, match="level"):
        fit_power([1, 2, 3], [1.0, 2.0, 1.0], level=1.0)
    with pytest.raises(StabilityError, match="positive numbers"):
        Ridge(0.0)
    with pytest.raises(StabilityError, match="decay is -1"):
        KernelRidge(gaussian, -1.0)
    with pytest.raises(StabilityError, match="PSD"):
        KernelRidge(lambda a, b: -gaussian(a, b), 1.0).train(data)
    with pytest.raises(StabilityError, match="positive length"):
        Descent(net()[0], steps=0, h=0.1)
