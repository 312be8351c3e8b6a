"""The ladder: each rung is reached by the matrix made for it, and solves it."""

from __future__ import annotations

import pytest
import torch

from oracle import assert_close
from pullback import StepError
from pullback.curvature import cholesky, factorise


def spd(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    a = torch.randn(n, n, dtype=dtype)
    return a @ a.T


def test_plain():
    A, b = spd(6), torch.randn(6, dtype=torch.float64)
    before = A.clone()
    found = factorise(A, 0.3)
    assert found.outcome == "cholesky"
    assert torch.equal(A, before)
    assert_close(found.solve(b), torch.linalg.solve(A + 0.3 * torch.eye(6, dtype=A.dtype), b))


def test_jitter_for_round_off():
    u = torch.randn(40, 1, dtype=torch.float64)
    A = u @ u.T
    A.diagonal().sub_(1e-15)
    assert factorise(A, 1e-18).outcome == "jitter"


def test_float64_where_float32_breaks_down(monkeypatch):
    attempt = cholesky._attempt
    monkeypatch.setattr(cholesky, "_attempt", lambda A, s, *m: None if A.dtype == torch.float32 else attempt(A, s, *m))
    A, b = spd(5, torch.float32), torch.randn(5)
    found = factorise(A, 0.1)
    assert found.outcome == "float64"
    assert found.solve(b).dtype == torch.float32
    assert_close(found.solve(b), torch.linalg.solve(A + 0.1 * torch.eye(5), b), 1e-4)


def test_eigenvalues_for_an_indefinite_matrix():
    A = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    found = factorise(A, 0.25)
    assert found.outcome == "eigh"
    assert_close(found.solve(torch.ones(2, dtype=torch.float64)), torch.tensor([0.8, 4.0], dtype=torch.float64))


def test_not_finite_is_an_error():
    A = torch.eye(3)
    A[1, 2] = float("nan")
    A[2, 2] = float("inf")
    with pytest.raises(StepError, match=r"curvature matrix \(3 x 3\) holds values that are not finite"):
        factorise(A, 1.0)
