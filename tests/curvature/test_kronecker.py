"""Kronecker factors against dense rows: sides, moments, damped inverses, EKFAC's diagonal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cases import CASES
from oracle import assert_close, linearise
from pullback.curvature.averages import Averages, rows_by_weight
from pullback.curvature.eigen import EigenBlock
from pullback.curvature.kronecker import KroneckerBlock, samples, sides_of
from pullback.curvature.moments import DiagonalMoment, LeadingMoment, MatrixMoment, Sample, thinned
from pullback.errors import StepError


def terms_of(case, n=4):
    model, args, kwargs = case.build(n=n)
    return linearise(model, nn.MSELoss(), [(args, kwargs, torch.sin)]).terms


def in_layout(rows, sides):
    """Dense rows (r, N, n) as (r, N, G, left, right), the bias as the last column."""
    G = sides.factor.shape[0]
    U = rows.dense()
    k = sides.weight.numel()
    outer = sides.factor.shape[4]
    shape = (G, outer, -1) if sides.factor_left else (G, k // (G * outer), outer)
    W = U[..., :k].reshape(*U.shape[:2], *shape)
    if sides.bias is None:
        return W
    return torch.cat([W, U[..., k:].reshape(*U.shape[:2], G, outer, 1)], 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sides_give_the_rows(case):
    met = 0
    for rows in rows_by_weight(terms_of(case)).values():
        for own in rows:
            sides = own.sides()
            if sides is None:
                continue
            met += 1
            assert_close(sides.rows(), in_layout(own, sides), 1e-10)
    assert met or not any(isinstance(m, nn.Linear | nn.Conv2d) for m in case.model().children())


def linear(N=5, shape=(3, 2)):
    torch.manual_seed(0)
    model = nn.Linear(*shape).double()
    x = torch.randn(N, shape[0]).double()
    terms = linearise(model, nn.MSELoss(), [((x,), {}, torch.sin)]).terms
    return next(iter(rows_by_weight(terms).values()))


def packed(block, D):
    """The block's layout as a packed vector."""
    return torch.cat([t.reshape(-1) for t in block.parted(D)])


def dense_of(block):
    """The block's undamped metric in packed order, from the definition of its layout."""
    n = sum(p.numel() for p in block.params)
    full = torch.kron(block.left.dense()[0], block.right.dense()[0])
    size = full.shape[0]
    order = packed(block, torch.arange(size, dtype=torch.float64).view(block.left.dense().shape[1], -1)[None]).long()
    assert len(order) == n
    return full[order][:, order]


@pytest.mark.parametrize("N", [1, 6])
def test_one_linear_layer_under_the_gaussian_metric_is_exact(N):
    rows = linear(N)
    block = KroneckerBlock.of(rows, "expand")
    block.follow(rows, 0.0, 1e-3)
    U = rows[0].dense().reshape(-1, rows[0].n)
    assert_close(dense_of(block), U.T @ U, 1e-10)


def test_a_single_sample_is_exact_in_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(1, 3).double()
    averages = Averages("kfac", "expand", 0.1, 0.95, 5)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.sin)])
    averages.follow(lin.terms)
    for block, exact in zip(averages.blocks, lin.blocks, strict=True):
        assert_close(dense_of(block), exact.primal(), 1e-10)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.floats(1e-3, 1.0), st.integers(0, 99))
def test_solve_is_the_dense_solve_of_the_damped_factors(N, i, o, damping, seed):
    torch.manual_seed(seed)
    rows = linear(N, (i, o))
    block = KroneckerBlock.of(rows, "expand")
    block.follow(rows, 0.0, damping)
    L, R = block.left.dense()[0], block.right.dense()[0]
    L = L + damping**0.5 * L.diagonal().mean() * torch.eye(o).double()
    R = R + damping**0.5 * R.diagonal().mean() * torch.eye(i + 1).double()
    G = torch.randn(1, o, i + 1).double()
    assert_close(block.solve(G)[0].reshape(-1), torch.linalg.solve(torch.kron(L, R), G.reshape(-1)), 1e-10)


@pytest.mark.parametrize("shared", ["expand", "reduce"])
def test_positions_expanded_and_reduced(shared):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(4, 2, 3, 3).double()
    terms = linearise(model, nn.MSELoss(), [((x,), {}, torch.sin)]).terms
    rows = next(iter(rows_by_weight(terms).values()))
    (left, right), (sides,) = samples(sides_of(rows), shared), sides_of(rows)
    s, X = sides.factor[0], sides.given_vectors()[0]  # (r, N, P, o), (N, P, i + 1)
    if shared == "reduce":
        s, X = s.sum(2, keepdim=True), X.mean(1, keepdim=True)
    B = torch.einsum("anpo,anpq->oq", s, s)
    A = torch.einsum("npi,npj->ij", X, X) / (X.shape[0] * X.shape[1])
    assert_close(left.vectors[0][0].T @ left.vectors[0][0], B, 1e-10)
    assert_close(right.vectors[0][0].T @ right.vectors[0][0], A, 1e-10)


def test_averages_forget_at_the_stated_rate():
    first, second = linear(5), linear(5)
    block = KroneckerBlock.of(first, "expand")
    single = []
    for rows in (first, second):
        own = KroneckerBlock.of(rows, "expand")
        own.follow(rows, 0.0, 0.1)
        single.append(own.right.dense())
        block.follow(rows, 0.25, 0.1)
    assert_close(block.right.dense(), 0.25 * single[0] + 0.75 * single[1], 1e-10)


def tied_rows():
    case = next(c for c in CASES if c.name == "tied")
    found = rows_by_weight(terms_of(case))
    return next(rows for rows in found.values() if len(rows) == 2)


def test_a_tied_weight_is_one_product_with_the_trace_of_the_sum():
    rows = tied_rows()
    block = KroneckerBlock.of(rows, "expand")
    block.follow(rows, 0.0, 0.1)
    traces = []
    for own in rows:
        left, right = samples(sides_of([own]), "expand")
        traces.append(left.trace() * right.trace())
    product = block.left.dense().diagonal(dim1=1, dim2=2).sum() * block.right.dense().diagonal(dim1=1, dim2=2).sum()
    assert float(product) == pytest.approx(sum(traces), rel=1e-10)


def test_micro_batches_are_one_batch():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    half = nn.MSELoss(reduction="sum")
    whole = linearise(model, half, [((x,), {}, y)]).terms
    parts = linearise(model, half, [((x[:3],), {}, y[:3]), ((x[3:],), {}, y[3:])]).terms
    blocks = []
    for terms in (whole, parts):
        rows = next(iter(rows_by_weight(terms).values()))
        block = KroneckerBlock.of(rows, "expand")
        block.follow(rows, 0.0, 0.1)
        blocks.append(dense_of(block))
    assert_close(blocks[1], blocks[0], 1e-10)


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 99))
def test_a_leading_moment_keeps_the_leading_eigenvectors_and_the_trace(M, d, seed):
    torch.manual_seed(seed)
    v = torch.randn(1, M, d).double()
    rank = 2
    found = LeadingMoment.empty(d, v, rank)
    found.follow(Sample([v]), 0.0)
    values, Q = torch.linalg.eigh(v[0].T @ v[0])
    k = min(rank, M, d)
    rest = values[:-k].sum() / max(1, d - min(rank, M))
    top = (Q[:, -k:] * values[-k:]) @ Q[:, -k:].T
    expected = top + rest * (torch.eye(d).double() - Q[:, -k:] @ Q[:, -k:].T)
    assert_close(found.dense()[0], expected, 1e-8)
    assert found.invert(0.3)
    true = torch.linalg.inv(expected + 0.3 * float(values.sum()) / d * torch.eye(d).double())
    G = torch.randn(1, d, 3).double()
    assert_close(found.from_left(G)[0], true @ G[0], 1e-8)
    assert_close(found.from_right(G.transpose(1, 2))[0], G[0].T @ true, 1e-8)


def test_leading_vectors_are_followed_by_iteration():
    """Large on both sides: what is held stays within the moment, misses little of it, and the trace is exact."""
    torch.manual_seed(0)
    d, M, rank = 40, 60, 4
    spectrum = torch.cat([torch.tensor([30.0, 20.0, 10.0, 5.0]), torch.linspace(1, 0.1, d - 4)]).double()
    held, whole = LeadingMoment.empty(d, spectrum, rank), torch.zeros(d, d).double()
    basis = torch.linalg.qr(torch.randn(d, d).double()).Q
    for look in range(30):
        keep = min(0.9, 1 - 1 / (look + 1))
        v = torch.randn(1, M, d).double() * spectrum.sqrt() @ basis.T / M**0.5
        held.follow(Sample([v]), keep)
        whole = keep * whole + (1 - keep) * v[0].T @ v[0]
        # a small turn: what is led by is not the same for long
        turn = 0.02 * torch.randn(d, d).double()
        basis = torch.linalg.qr(basis @ torch.linalg.matrix_exp(turn - turn.T)).Q
    values = torch.linalg.eigvalsh(whole)
    V = held.V
    assert V.shape == (rank, d)
    assert held.trace == pytest.approx(float(values.sum()), rel=1e-12)
    assert 0.97 * float(values[-rank:].sum()) < float(V.square().sum()) < float(values[-rank:].sum()) * (1 + 1e-12)
    assert_close(V @ V.T, torch.diag(V.square().sum(1)), 1e-10)


def test_of_many_vectors_some_are_read(monkeypatch):
    monkeypatch.setattr("pullback.curvature.moments.ENOUGH", 10)
    v = torch.ones(35, 2).double()
    assert thinned(v).shape == (12, 2)
    assert_close(thinned(v).T @ thinned(v), v.T @ v, 1e-12)
    assert_close(thinned(v[:19]), v[:19], 0.0)


def test_wide_layers_are_held_by_leading_vectors_and_tables_by_counts(monkeypatch):
    monkeypatch.setattr("pullback.curvature.moments.LARGE", 4)
    rows = linear(6, (8, 3))
    block = KroneckerBlock.of(rows, "expand")
    assert isinstance(block.right, LeadingMoment)
    assert isinstance(block.left, MatrixMoment)
    block.follow(rows, 0.0, 0.1)
    table = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    terms = linearise(table, nn.MSELoss(), [((torch.randint(0, 5, (4, 2)),), {}, torch.sin)]).terms
    averages = Averages("kfac", "expand", 0.1, 0.95, 5)
    averages.follow(terms)
    assert isinstance(averages.blocks[0].left, DiagonalMoment)


@pytest.mark.parametrize("net", ["linear", "conv"])
def test_ekfac_is_the_diagonal_in_the_eigenbasis(net):
    torch.manual_seed(0)
    if net == "linear":
        rows = linear(5)
    else:
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
        x = torch.randn(4, 2, 3, 3).double()
        terms = linearise(model, nn.MSELoss(), [((x,), {}, torch.sin)]).terms
        rows = next(iter(rows_by_weight(terms).values()))
    plain = KroneckerBlock.of(rows, "expand")
    block = EigenBlock(plain.params, plain.rule, plain.shape, plain.left, plain.right, "expand", basis=5)
    block.follow(rows, 0.0, 0.2)
    (sides,) = sides_of(rows)
    U = sides.rows().flatten(0, 2).flatten(1)
    P, Q = block.bases
    basis = torch.kron(P[0], Q[0])
    D = (U @ basis).square().sum(0)
    assert_close(block.D.reshape(-1), D, 1e-10)
    M = (basis * (D + 0.2 * D.mean())) @ basis.T
    G = torch.randn(1, *U.new_empty(1, block.shape[1], sides.rows().shape[4]).shape[1:]).double()
    assert_close(block.solve(G).reshape(-1), torch.linalg.solve(M, G.reshape(-1)), 1e-9)


def test_a_factor_that_is_not_finite_leaves_the_old_inverse_then_refuses():
    rows = linear(5)
    block = KroneckerBlock.of(rows, "expand")
    block.follow(rows, 0.95, 0.1)
    G = torch.randn(1, 2, 4).double()
    before, C = block.solve(G), block.right.dense().clone()
    bad = linear(5)
    bad[0].x[0, 0, 0] = float("nan")
    for _ in range(4):
        block.follow(bad, 0.95, 0.1)
    assert torch.equal(block.solve(G), before)
    assert torch.equal(block.right.dense(), C)
    with pytest.raises(StepError, match="could not be inverted 5 times in a row"):
        block.follow(bad, 0.95, 0.1)
    block.follow(rows, 0.95, 0.1)
    assert block.failures == 0


def test_a_layer_without_curvature_is_not_divided_by():
    rows = linear(5)
    rows[0].s.zero_()
    block = KroneckerBlock.of(rows, "expand")
    block.follow(rows, 0.95, 0.1)
    assert bool(torch.isfinite(block.solve(torch.randn(1, 2, 4).double())).all())
