"""Oracle 1: gram, matvec, rmatvec, primal of every block against its dense rows, shapes drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cases import CASES
from oracle import assert_close, linearise
from pullback.curvature import solver_for
from pullback.tape.rules import outer
from pullback.tape.rules.base import DenseRows
from pullback.tape.rules.linear import LinearRows

CRITERIA = {"mse": (nn.MSELoss(), torch.randn_like), "ce": (nn.CrossEntropyLoss(), lambda z: z.argmax(1))}


def check(block, rows=None):
    U = block.dense() if rows is None else rows
    v = torch.randn(U.shape[0], dtype=U.dtype)
    d = torch.randn(U.shape[1], dtype=U.dtype)
    assert_close(block.gram(), U @ U.T)
    assert_close(block.primal(), U.T @ U)
    assert_close(block.matvec(d), U @ d)
    assert_close(block.rmatvec(v), U.T @ v)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("loss", CRITERIA)
def test_products_of_every_case(case, loss):
    criterion, target = CRITERIA[loss]
    model, args, kwargs = case.build()
    for block in linearise(model, criterion, [(args, kwargs, target)]).blocks:
        check(block)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_products_over_several_terms(case):
    model, args, kwargs = case.build(n=3)
    uses = [(args, kwargs, torch.randn_like), (case.inputs(2), case.side(2), torch.randn_like)]
    for block in linearise(model, nn.MSELoss(), uses).blocks:
        assert len(block.sizes) == 2
        check(block)


@given(
    r=st.integers(1, 3), n=st.integers(1, 5), p=st.integers(1, 4), o=st.integers(1, 4), i=st.integers(1, 4),
    kinds=st.sampled_from([(True, True), (True, False), (False, True)]), seed=st.integers(0, 9),
    chunk=st.sampled_from([1, 7, 1 << 24]), ways=st.sampled_from(["pairwise", "summed", "cheaper"]),
)  # fmt: skip
def test_linear_rows_of_any_shape(r, n, p, o, i, kinds, seed, chunk, ways):
    torch.manual_seed(seed)
    x, s = torch.randn(n, p, i, dtype=torch.float64), torch.randn(r, n, p, o, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(o, i)) if kinds[0] else None
    bias = nn.Parameter(torch.zeros(o)) if kinds[1] else None
    rows = LinearRows(weight, bias, x, s)
    full = torch.cat([x, torch.ones(n, p, 1, dtype=x.dtype)], 2)
    U = torch.einsum("anpo,npi->anoi", s, full)
    pieces = [U[..., :-1].flatten(2)] * kinds[0] + [U[..., -1]] * kinds[1]
    U = torch.cat(pieces, 2).reshape(r * n, -1)
    before = outer.CHUNK_NUMBERS
    outer.CHUNK_NUMBERS = chunk
    try:
        memory = x.new_empty(r * n, r * n)
        gram = {
            "pairwise": lambda: rows._pairwise(rows),
            "summed": lambda: rows._summed(memory),
            "cheaper": rows.gram,
        }[ways]()
        assert_close(gram, U @ U.T)
        assert_close(rows.primal(), U.T @ U)
    finally:
        outer.CHUNK_NUMBERS = before
    assert_close(rows.dense().reshape(r * n, -1), U)
    half = rows.to(torch.float32)
    assert half.dense().dtype == torch.float32


@given(o=st.integers(1, 3), i=st.integers(1, 5), p=st.integers(1, 3), p2=st.integers(1, 3))
def test_cross_terms_by_either_way(o, i, p, p2):
    weight, bias = nn.Parameter(torch.zeros(o, i)), nn.Parameter(torch.zeros(o))
    make = lambda n, p: LinearRows(  # noqa: E731
        weight, bias, torch.randn(n, p, i, dtype=torch.float64), torch.randn(2, n, p, o, dtype=torch.float64)
    )
    a, b = make(3, p), make(2, p2)
    flat = [t.dense().reshape(t.R, -1) for t in (a, b)]
    assert_close(a.cross(b), flat[0] @ flat[1].T)
    dense = DenseRows(b.params, b.dense(), "dense")
    assert_close(a.cross(dense), flat[0] @ flat[1].T)


@pytest.mark.parametrize("space", ["dual", "primal", "cg"])
@pytest.mark.parametrize("rest", [True, False])
@given(mu=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
def test_group_solves_the_dense_system(space, rest, mu, seed):
    """Oracle 2 and 4: both spaces give -(mu I + U^T U)^{-1} g, for any gradient, and U d."""
    case = CASES[0]
    model, args, kwargs = case.build(seed)
    lin = linearise(model, nn.CrossEntropyLoss(), [(args, kwargs, lambda z: z.argmin(1))])
    U = torch.cat([block.dense() for block in lin.blocks], 1)
    extra = [torch.randn(block.n, dtype=U.dtype) for block in lin.blocks] if rest else None
    g = U.T @ lin.e0 + (torch.cat(extra) if extra else 0)
    group = solver_for(lin.blocks, space)
    if space == "cg":
        group.tolerance = 1e-13
    group.factorise(mu)
    d, Ud = group.direction(lin.e0, list(g.split([b.n for b in lin.blocks])), extra, mu)
    expected = -torch.linalg.solve(mu * torch.eye(U.shape[1], dtype=U.dtype) + U.T @ U, g)
    assert_close(torch.cat(d), expected, 1e-10)
    assert_close(Ud, U @ expected, 1e-9)


def test_cheaper_space_is_chosen():
    wide = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    few = linearise(wide, nn.MSELoss(), [((torch.randn(4, 40).double(),), {}, torch.randn_like)])
    many = linearise(wide, nn.MSELoss(), [((torch.randn(3000, 40).double(),), {}, torch.randn_like)])
    assert solver_for(few.blocks[:1]).name == "dual"
    assert solver_for(many.blocks[1:]).name == "primal"


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("n", [6, 301])
def test_half_a_gram_is_right_above_the_diagonal(n, r, biased):
    x, s = torch.randn(n, 1, 8, dtype=torch.float64), torch.randn(r, n, 1, 40, dtype=torch.float64)
    bias = nn.Parameter(torch.zeros(40)) if biased else None
    rows = LinearRows(nn.Parameter(torch.zeros(40, 8)), bias, x, s)
    K = rows.gram_into(x.new_zeros(rows.R, rows.R), half=True)
    assert_close(K.triu(), rows.gram().triu())
