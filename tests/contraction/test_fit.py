"""Fitted metrics: the spectral abscissa for one Jacobian, a common rate for several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.contraction import ContractionError, fit_metric, rate_at
from pullback.contraction.centre import Centre

f64 = torch.float64


@settings(max_examples=20)
@given(n=st.integers(1, 10), seed=st.integers(0, 10_000))
def test_one_jacobian_gets_its_spectral_abscissa(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    A = torch.randn(n, n, dtype=f64)
    values = torch.linalg.eigvals(A)
    fitted = fit_metric(A, tol=1e-2)
    assert fitted.bound == pytest.approx(-float(values.real.max()))
    assert fitted.rate <= fitted.bound + 1e-9
    if fitted.converged:
        assert fitted.rate >= fitted.bound - 1e-2 * float(values.abs().max())
    assert fitted.condition <= 1e8
    # The rate is one of the flow in that metric, by another way.
    assert rate_at(lambda x: A @ x, torch.zeros(n, dtype=f64), metric=fitted.M).value == pytest.approx(
        fitted.rate, abs=1e-7
    )


def test_a_damped_oscillator() -> None:
    """x'' = -x - 2 z x': eigenvalues -z +- i sqrt(1 - z^2); the identity shows no rate, a fitted metric shows z."""
    z = 0.3
    A = torch.tensor([[0.0, 1.0], [-1.0, -2 * z]], dtype=f64)
    assert rate_at(lambda x: A @ x, torch.zeros(2, dtype=f64)).value == pytest.approx(0, abs=1e-12)
    fitted = fit_metric(A, tol=1e-4)
    assert fitted.converged
    assert fitted.rate == pytest.approx(z, abs=1e-4)


def test_several_share_the_best_rate() -> None:
    """Similar to normal matrices by one map: in that map's metric all have their own abscissa, so the bound is met."""
    torch.manual_seed(0)
    T = torch.randn(4, 4, dtype=f64) + torch.eye(4, dtype=f64)
    normal = []
    for _ in range(3):
        S = torch.randn(4, 4, dtype=f64)
        normal.append(S - S.T - torch.eye(4, dtype=f64))
    J = torch.stack([torch.linalg.solve(T, N @ T) for N in normal])
    fitted = fit_metric(J, tol=1e-4)
    assert fitted.bound == pytest.approx(1)
    assert fitted.rate == pytest.approx(1, abs=1e-2)
    assert fitted.converged
    # Every mean of them has that rate too.
    mean = 0.2 * J[0] + 0.5 * J[1] + 0.3 * J[2]
    assert rate_at(lambda x: mean @ x, torch.zeros(4, dtype=f64), metric=fitted.M).value >= fitted.rate - 1e-9


def test_several_without_a_common_metric() -> None:
    """Each is stable, their mean is not: no metric can show a common positive rate."""
    A = torch.tensor([[-1.0, 10.0], [0.0, -1.0]], dtype=f64)
    fitted = fit_metric([A, A.T])
    assert fitted.bound == pytest.approx(1)
    # The mean has an eigenvalue 4.
    assert fitted.rate <= -4 + 1e-6
    assert fitted.rate == pytest.approx(-4, abs=0.05)


def test_the_centre_is_stationary() -> None:
    """The barrier's derivative by autograd vanishes there."""
    torch.manual_seed(0)
    J = torch.randn(2, 3, 3, dtype=f64) - 2 * torch.eye(3, dtype=f64)
    centre = Centre(J, -3.0, 1e3)
    M = centre.find(torch.eye(3, dtype=f64)).requires_grad_()
    parts = centre.parts((M + M.T) / 2)
    barrier = M.trace() - torch.logdet(parts).sum()
    assert barrier.item() == pytest.approx(centre.value(M.detach()))
    (g,) = torch.autograd.grad(barrier, M)
    # Beside the derivative of the trace, which is one.
    assert float(((g + g.T) / 2).abs().max()) < 2e-3


def test_what_is_refused() -> None:
    with pytest.raises(ContractionError, match=r"got \(2, 3\)"):
        fit_metric(torch.zeros(2, 3))
    with pytest.raises(ContractionError, match=r"got \(3, 3\) beside \(2, 2\)"):
        fit_metric([torch.eye(2), torch.eye(3)])
    with pytest.raises(ContractionError, match="not finite"):
        fit_metric(torch.full((2, 2), torch.nan))
    with pytest.raises(ContractionError, match="at most 30"):
        fit_metric(torch.randn(2, 31, 31))
    with pytest.raises(ContractionError, match="no Jacobians"):
        fit_metric([])
