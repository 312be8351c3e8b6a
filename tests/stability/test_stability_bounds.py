"""Bounds beside quadrature and simulation, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.stability import (
    FixedMetric,
    StabilityError,
    along_intervals,
    along_steps,
    data_factor,
    replace_one,
    stated_scaling,
)
from pullback.stability.bounds import reach

f64 = torch.float64


def test_the_formulas_of_the_theory_page() -> None:
    bound = replace_one(kappa=3.0, n=50, mu=0.5, rate=0.2, source="given")
    assert bound.distance == pytest.approx(2 * 3 / (50 * 0.5 * 0.2))
    assert bound.loss == pytest.approx(2 * 9 / (50 * 0.5 * 0.2))
    assert bound.derived
    with_data = replace_one(kappa=3.0, n=50, mu=0.5, rate=0.2, B2=4.0, source="given")
    assert with_data.loss == pytest.approx(bound.loss * (1 + 4 / 0.5))
    stated = stated_scaling(kappa=3.0, lipschitz=2.0, xi=0.1, mu=0.5, n=100)
    assert stated.loss == pytest.approx(9 * 2 / (0.1 * 0.5 * 10))
    assert not stated.derived
    assert stated.distance is None
    assert "not a bound here" in str(stated)
    assert "given" in str(bound)
    assert bound.to_dict()["constants"]["rate"] == 0.2


@given(st.floats(-2, 2), st.floats(0.01, 5))
def test_finite_time_is_the_integral(rate: float, time: float) -> None:
    """2 kappa / (n mu) times the integral of e^(-rate (T - t)), by the midpoint rule."""
    t = (torch.arange(20_000, dtype=f64) + 0.5) * time / 20_000
    integral = float(torch.exp(-rate * (time - t)).mean()) * time
    bound = replace_one(kappa=1.0, n=2, mu=1.0, rate=rate, time=time, source="given")
    assert bound.distance == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, 5e-324, -5e-324, 1e-300, 1e-12, -1e-12])
def test_reach_of_rates_that_vanish(rate: float) -> None:
    assert reach(rate, 2.0) == pytest.approx(2.0, rel=1e-11)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_intervals_are_the_solution_of_their_equation(rates: list[float], random) -> None:
    """d' = -rate d + 2 kappa / (n mu), piecewise; equal rates give the bound with one rate."""
    lengths = [random.uniform(0.1, 1) for _ in rates]
    kappas = [random.uniform(0, 2) for _ in rates]
    d = 0.0
    for h, rate, kappa in zip(lengths, rates, kappas, strict=True):
        push, small = 2 * kappa / (10 * 0.5), h / 400
        for _ in range(400):  # classical Runge-Kutta
            k1 = push - rate * d
            k2 = push - rate * (d + small / 2 * k1)
            k3 = push - rate * (d + small / 2 * k2)
            d += small * (k1 + 2 * k2 + 2 * k3 + (push - rate * (d + small * k3))) / 6
    assert along_intervals(lengths, rates, kappas, n=10, mu=0.5, source="given").distance == pytest.approx(d, rel=1e-9)
    same = along_intervals(lengths, [0.3] * len(rates), [2.0] * len(rates), n=10, mu=0.5, source="given")
    one = replace_one(kappa=2.0, n=10, mu=0.5, rate=0.3, time=sum(lengths), source="given")
    assert same.distance == pytest.approx(one.distance)
    assert same.loss == pytest.approx(one.loss)


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1.5), st.floats(0, 2)), min_size=1, max_size=6))
def test_steps_are_the_sum_of_products(steps: list[tuple[float, float, float]]) -> None:
    lengths, factors, kappas = (list(column) for column in zip(*steps, strict=True))
    expected = sum(math.prod(factors[k + 1 :]) * lengths[k] * 2 * kappas[k] / (7 * 0.3) for k in range(len(steps)))
    bound = along_steps(lengths, factors, kappas, n=7, mu=0.3, source="given")
    assert bound.distance == pytest.approx(expected)
    assert bound.loss == pytest.approx(max(kappas) * expected)
    with_data = along_steps(lengths, factors, kappas, n=7, mu=0.3, B2=0.6, source="given")
    assert with_data.distance == pytest.approx(3 * expected)


def test_short_steps_become_the_flow() -> None:
    h = 1e-4
    steps = along_steps([h] * 10_000, [1 - 0.7 * h] * 10_000, [1.0] * 10_000, n=4, mu=1.0, source="given")
    flow = replace_one(kappa=1.0, n=4, mu=1.0, rate=0.7, time=1.0, source="given")
    assert steps.distance == pytest.approx(flow.distance, rel=1e-4)


@given(st.integers(0, 10_000))
def test_a_drawn_field_stays_within_the_factor(seed: int) -> None:
    """The lemma behind the factor: |M^-1 g - M'^-1 g'| in M^(1/2) units, one u_i and one gradient replaced."""
    torch.manual_seed(seed)
    n, K, mu = 7, 4, float(10 ** (2 * torch.rand(()) - 1))
    u, grads = torch.randn(n + 1, K, dtype=f64), torch.randn(n + 1, K, dtype=f64)
    u *= 3 * torch.rand(n + 1, 1, dtype=f64)
    eye = torch.eye(K, dtype=f64)
    M, N = (mu * eye + v.T @ v / n for v in (u[:n], u[1:]))
    g, gn = grads[:n].mean(0), grads[1:].mean(0)
    kappa = float(grads.norm(dim=1).max())
    off = torch.linalg.solve(M, g) - torch.linalg.solve(N, gn)
    size = float(off @ M @ off) ** 0.5
    B2 = float(u.square().sum(1).max())
    assert size <= 2 * kappa / (n * mu**0.5) * data_factor(B2, mu) * (1 + 1e-12)
    assert size <= 2 * kappa / (n * mu**0.5) * (1 + B2 / (2 * mu)) * (1 + 1e-12)  # what the proof really gives


def test_bounds_refuse_what_bounds_nothing() -> None:
    good = {"kappa": 1.0, "n": 10, "mu": 1.0, "rate": 1.0, "source": "given"}
    for change, words in (
        ({"n": 1}, "n = 1 samples"),
        ({"mu": -0.5}, "-0.5: the metric is not positive definite"),
        ({"rate": -0.1}, "infinite time"),
        ({"rate": math.nan}, "all is finite"),
        ({"kappa": math.nan}, "all is finite"),
        ({"time": 0.0}, "positive one"),
        ({"B2": math.nan}, "B\\^2 is nan"),
    ):
        with pytest.raises(StabilityError, match=words):
            replace_one(**{**good, **change})
    with pytest.raises(StabilityError, match="one of each"):
        along_intervals([1.0], [1.0, 2.0], [1.0], n=3, mu=1.0, source="given")
    with pytest.raises(StabilityError, match="positive ones"):
        along_intervals([0.0], [1.0], [1.0], n=3, mu=1.0, source="given")
    with pytest.raises(StabilityError, match="not negative"):
        along_steps([1.0], [-1.0], [1.0], n=3, mu=1.0, source="given")
    with pytest.raises(StabilityError, match="at least one"):
        along_steps([], [], [], n=3, mu=1.0, source="given")
    with pytest.raises(StabilityError, match="xi"):
        stated_scaling(kappa=1.0, lipschitz=1.0, xi=2.0, mu=1.0, n=10)


def test_fixed_metrics() -> None:
    A = torch.randn(5, 5, dtype=f64)
    M = A @ A.T + torch.eye(5, dtype=f64)
    metric, v = FixedMetric(M), torch.randn(5, dtype=f64)
    values = torch.linalg.eigvalsh(M)
    assert metric.mu == pytest.approx(float(values[0]))
    assert metric.xi == pytest.approx(float(values[0] / values[-1]))
    assert torch.allclose(metric.solve(metric.apply(v)), v, atol=1e-10)
    assert metric.norm(v) == pytest.approx(float(v @ M @ v) ** 0.5)
    diagonal = FixedMetric(M.diagonal())
    assert torch.allclose(diagonal.solve(v), v / M.diagonal())
    assert torch.equal(FixedMetric(2.0).apply(v), 2 * v)
    bad = torch.diag(torch.tensor([1.0, -0.25, 2.0], dtype=f64))
    for value, words in (
        (bad, "eigenvalue is -0.25"),
        (torch.tensor([1.0, 0.0]), "eigenvalue is 0"),
        (torch.ones(3, 3, dtype=f64), "not positive definite"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (torch.ones(2, 3), "shape \\(2, 3\\)"),
        (torch.tensor([1.0, math.nan]), "not finite"),
    ):
        with pytest.raises(StabilityError, match=words):
            FixedMetric(value)
