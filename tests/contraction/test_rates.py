"""Rates beside analytic ones and dense twins: linear flows, metrics that vary, maps; what Lanczos says of itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pullback.contraction import Blocks, Factor, discrete_rate, rate_along, rate_at
from pullback.contraction.lanczos import lanczos, missing

f64 = torch.float64


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix and a metric."""
    torch.manual_seed(seed)
    theta = torch.randn(n, n, dtype=f64) / n**0.5 + 1.5 * torch.eye(n, dtype=f64)
    if float(torch.linalg.cond(theta)) > 100:
        theta = theta + 2 * torch.eye(n, dtype=f64)
    return torch.randn(n, n, dtype=f64) - 2 * torch.eye(n, dtype=f64), theta.T @ theta


def twin(A: Tensor, M: Tensor) -> float:
    """The largest lambda with A^T M + M A <= -2 lambda M, as a generalised eigenvalue problem by inv(M)."""
    return -float(torch.linalg.eigvals(torch.linalg.solve(M, (A.T @ M + M @ A) / 2)).real.max())


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@settings(max_examples=15)
@given(n=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_linear_flows_have_the_analytic_rate(method: str, n: int, seed: int) -> None:
    A, M = drawn(n, seed)
    x = torch.randn(n, dtype=f64)
    for metric, dense in ((None, torch.eye(n, dtype=f64)), (M, M), (Factor(torch.linalg.cholesky(M).T), M)):
        rate = rate_at(lambda z: A @ z, x, metric=metric, method=method, tol=1e-11)
        assert rate.value == pytest.approx(twin(A, dense), rel=1e-9, abs=1e-8)
        assert rate.lower <= rate.value <= rate.upper
        assert rate.converged


def test_known_rates() -> None:
    # Damped oscillator x'' = -x - 2 z x': no rate in the identity, z - something in a fitted one; a rotation has none.
    assert rate_at(lambda x: torch.stack([x[1], -x[0]]), torch.zeros(2, dtype=f64)).value == pytest.approx(0, abs=1e-14)
    decay = torch.tensor([1.0, 2.0, 5.0], dtype=f64)
    assert rate_at(lambda x: -decay * x, torch.ones(3, dtype=f64)).value == pytest.approx(1, abs=1e-14)
    late = rate_at(lambda t, x: -t * decay * x, torch.ones(3, dtype=f64), t=3.0)
    assert late.value == pytest.approx(3, abs=1e-14)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_a_metric_that_varies_is_a_change_of_coordinates(method: str, seed: int) -> None:
    """y = phi(x) obeys y' = A y: the x-flow has, in M = phi_x^T phi_x, everywhere the rate of A."""
    A, _ = drawn(3, seed)
    C = 0.3 * torch.randn(3, 3, dtype=f64)

    def phi(x: Tensor) -> Tensor:
        return x + C @ torch.sin(x)

    def jacobian(x: Tensor) -> Tensor:
        return torch.eye(3, dtype=f64) + C * torch.cos(x)

    def field(x: Tensor) -> Tensor:
        return torch.linalg.solve(jacobian(x), A @ phi(x))

    x = torch.randn(3, dtype=f64)
    if float(torch.linalg.cond(jacobian(x))) > 1e3:
        return
    rate = rate_at(field, x, metric=lambda z: jacobian(z).T @ jacobian(z), method=method)
    assert rate.value == pytest.approx(twin(A, torch.eye(3, dtype=f64)), abs=1e-8)


def test_blocks_are_the_block_diagonal_metric() -> None:
    A, M = drawn(5, 1)
    M1, x = M[:2, :2], torch.randn(5, dtype=f64)
    metric = Blocks([(2, M1), (3, None)], [2.0, 0.5])
    whole = torch.block_diag(2 * M1, 0.5 * torch.eye(3, dtype=f64))
    assert rate_at(lambda z: A @ z, x, metric=metric).value == pytest.approx(twin(A, whole), abs=1e-10)

    def bent(z: Tensor) -> Tensor:
        return torch.eye(2, dtype=f64) * (2 + torch.sin(z[0]))

    varying = Blocks([(2, bent), (3, None)])
    change = torch.zeros(5, 5, dtype=f64)
    change[:2, :2] = torch.eye(2, dtype=f64) * torch.cos(x[0]) * (A @ x)[0]
    M = torch.block_diag(bent(x), torch.eye(3, dtype=f64))
    dense = -float(torch.linalg.eigvals(torch.linalg.solve(M, (A.T @ M + M @ A + change) / 2)).real.max())
    for method in ("dense", "lanczos"):
        assert rate_at(lambda z: A @ z, x, metric=varying, method=method).value == pytest.approx(dense, abs=1e-8)


def test_large_fields_by_products() -> None:
    """Lanczos beside all eigenvalues, with one product a step where the Jacobian is known to be symmetric."""
    torch.manual_seed(3)
    n = 200
    W = torch.randn(n, n, dtype=f64) / n**0.5

    def field(x: Tensor) -> Tensor:
        return -x + 0.5 * W @ torch.tanh(x)

    def gradient(x: Tensor) -> Tensor:
        return -x - W.T @ torch.tanh(W @ x)

    x = torch.randn(n, dtype=f64)
    for h, symmetric in ((field, False), (gradient, True)):
        dense = rate_at(h, x, method="dense")
        found = rate_at(h, x, tol=1e-10, symmetric=symmetric)
        assert found.method == "lanczos"
        assert found.converged
        assert not found.proved
        assert dense.proved
        assert found.value == pytest.approx(dense.value, abs=1e-8)
        # Never rounded up, and inside of what is said of it.
        assert found.value <= dense.value + 1e-12
        assert found.lower <= dense.value <= found.upper + 1e-12
    steps = found.products
    assert rate_at(gradient, x, tol=1e-10).products == 2 * steps


def test_too_few_steps_are_unproved() -> None:
    A, _ = drawn(80, 0)
    x = torch.zeros(80, dtype=f64)
    dense = rate_at(lambda z: A @ z, x, method="dense").value
    short = rate_at(lambda z: A @ z, x, steps=12)
    assert not short.converged
    assert not short.proved
    assert short.lower <= dense <= short.upper
    assert "UNPROVED" in str(short)
    # Nothing at all can be said with probability from three products.
    assert rate_at(lambda z: A @ z, x, steps=3).lower == -math.inf
    assert not short.contracting


def test_the_probable_bound_holds() -> None:
    """Over 300 starts the largest eigenvalue is never above what holds with probability 0.99."""
    torch.manual_seed(0)
    values = torch.cat([torch.linspace(0, 1, 300, dtype=f64) ** 0.5, torch.tensor([1.005], dtype=f64)])
    missed = []
    for seed in range(300):
        found = lanczos(
            lambda v: values * v, 301, tol=0.0, steps=30, generator=torch.Generator().manual_seed(seed)
        )  # fmt: skip
        assert found.value <= 1.005 + 1e-12
        missed.append(found.above(0.01) < 1.005)
    assert sum(missed) == 0


def test_what_is_missing() -> None:
    # Well apart: the square over the gap. A neighbour nearby: its distance is added, the next gap counts.
    assert missing(torch.tensor([1.0, 3.0]), 0.01) == pytest.approx(1e-4)
    assert missing(torch.tensor([1.0, 1.0 + 1e-6, 3.0]).double(), 0.01) == pytest.approx(1e-6 + 1e-4, rel=1e-3)
    assert missing(torch.tensor([1.0]), 0.01) == 0.01


@settings(max_examples=15)
@given(n=st.integers(1, 10), seed=st.integers(0, 10_000))
def test_maps(n: int, seed: int) -> None:
    A, M = drawn(n, seed)
    x, theta = torch.randn(n, dtype=f64), torch.linalg.cholesky(M).T
    norm = float(torch.linalg.matrix_norm(theta @ A @ torch.linalg.inv(theta), 2))
    for method in ("dense", "lanczos"):
        found = discrete_rate(lambda z: A @ z, x, metric=M, method=method)
        assert found.factor == pytest.approx(norm, rel=1e-8)
        assert found.value == pytest.approx(-math.log(norm), abs=1e-8)
        plain = discrete_rate(lambda z: A @ z, x, method=method)
        assert plain.factor == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-8)


def test_a_map_in_a_metric_that_varies() -> None:
    """In y = phi(x) the map is linear; the factor is the norm of that, wherever it is measured."""
    A = 0.3 * torch.randn(3, 3, dtype=f64)

    def step(x: Tensor) -> Tensor:
        return torch.asinh(A @ torch.sinh(x))

    def metric(x: Tensor) -> Tensor:
        return torch.diag(torch.cosh(x) ** 2)

    x = torch.randn(3, dtype=f64)
    for method in ("dense", "lanczos"):
        assert discrete_rate(step, x, metric=metric, method=method).factor == pytest.approx(
            float(torch.linalg.matrix_norm(A, 2)), rel=1e-9
        )


def test_along_a_trajectory() -> None:
    def field(x: Tensor) -> Tensor:
        return -x - x**3

    points = torch.tensor([[2.0], [1.0], [0.1]], dtype=f64)
    found = rate_along(field, points, times=[0, 1, 2])
    assert [r.value for r in found.rates] == pytest.approx([13, 4, 1.03])
    assert found.worst.value == pytest.approx(1.03)
    assert "worst rate 1.03 at 3 points" in str(found)
    timed = rate_along(lambda t, x: -(1 + t) * x, points, times=[0, 1, 2], timed=True)
    assert [r.value for r in timed.rates] == pytest.approx([1, 2, 3])
