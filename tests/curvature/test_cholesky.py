"""The ladder: each rung is reached by the matrix made for it, and solves it."""

from __future__ import annotations

import pytest
import torch

from oracle import assert_close
from pullback import StepError
from pullback.curvature import Workspace, cholesky, factorise


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_border_leaves_the_factor_as_it_is(dtype):
    A, b = spd(128, dtype), torch.randn(128, dtype=dtype)
    border = cholesky.border_of(128, A.device)
    assert border > 0
    assert cholesky.border_of(127, A.device) == 0
    memory = Workspace().square("factor", 128, A, border)
    assert memory.shape == (128 + border, 128 + border)
    found = factorise(A, 0.3, memory)
    A64, b64 = A.double(), b.double()
    expected = torch.linalg.solve(A64 + 0.3 * torch.eye(128, dtype=torch.float64), b64)
    assert_close(found.solve(b).double(), expected, 1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("case", ["cholesky", "jitter", "float64", "eigh"])
def test_nothing_below_the_diagonal_is_read(case, monkeypatch):
    if case == "float64":
        attempt = cholesky._attempt
        monkeypatch.setattr(
            cholesky, "_attempt", lambda A, s, *m: None if A.dtype == torch.float32 else attempt(A, s, *m)
        )
    A = {
        "cholesky": spd(7),
        "jitter": torch.ones(40, 40, dtype=torch.float64),
        "float64": spd(5, torch.float32),
        "eigh": torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)),
    }[case]
    if case == "jitter":
        A.diagonal().sub_(1e-15)
    shift = {"jitter": 1e-18, "eigh": 0.25}.get(case, 0.1)
    b = torch.ones(len(A), dtype=A.dtype)
    below = torch.ones_like(A).tril(-1).bool()
    garbage = torch.where(below, torch.full_like(A, float("nan")), A)
    found = factorise(garbage, shift)
    assert found.outcome == factorise(A, shift).outcome == case
    assert torch.equal(found.solve(b), factorise(A, shift).solve(b))


def test_a_border_is_whole_again_after_a_refusal():
    A = spd(128)
    memory = Workspace().square("factor", 128, A, 8)
    bad = A.clone()
    bad[3, 5] = bad[5, 3] = float("nan")
    with pytest.raises(StepError, match="not finite"):
        factorise(bad, 0.3, memory)
    again, alone = factorise(A, 0.3, memory), factorise(A, 0.3)
    assert again.outcome == alone.outcome == "cholesky"
    assert again.L is not None
    assert alone.L is not None
    assert_close(again.L.tril(), alone.L.tril())


def test_a_matrix_of_the_workspace_is_made_anew_for_another_size():
    workspace, like = Workspace(), torch.empty(0)
    bordered = workspace.square("a", 4, like, 2).fill_(7.0)
    assert workspace.square("a", 4, like, 2) is bordered
    for n, border in ((6, 0), (5, 1)):
        fresh = workspace.square("a", n, like, border)
        assert fresh is not bordered
        assert fresh.shape == (6, 6)
        assert torch.equal(fresh[n:], torch.eye(6)[n:])
        assert torch.equal(fresh[:, n:], torch.eye(6)[:, n:])
