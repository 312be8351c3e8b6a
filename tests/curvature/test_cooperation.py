"""Cooperation in Kronecker form: the dense joint system, its spectrum, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import pullback
from oracle import assert_close
from pullback.curvature.cooperation import Cooperation

F64 = torch.float64
SHAPES = [(3, 4), (2, 5), (4, 3)]


def joint(samples, N):
    """E[x_u x_v^T] for all pairs."""
    return [[x.T @ y / N for y in samples] for x in samples]


def game(shapes, N=12, seed=0, *, inputs=False, outputs=False, dtype=F64):
    """Factors of players, and gradients; with a common input or output if asked for."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(N, i, generator=generator, dtype=F64).to(dtype) for _, i in shapes]
    h = [torch.randn(N, o, generator=generator, dtype=F64).to(dtype) for o, _ in shapes]
    x = [x[0]] * len(x) if inputs else x
    h = [h[0]] * len(h) if outputs else h
    gradients = [torch.randn(o, i, generator=generator, dtype=F64).to(dtype) for o, i in shapes]
    return joint(x, N), joint(h, N), gradients


def damped(A, B, mu):
    """The damped diagonal blocks of one player."""
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    return (
        A + pi * mu**0.5 * torch.eye(len(A), dtype=A.dtype),
        B + mu**0.5 / pi * torch.eye(len(B), dtype=B.dtype),
    )


def assembled(A, B, mu):
    """The joint system as one matrix over row-major weights, and its block diagonal."""
    m = len(A)
    blocks = [[torch.kron(B[u][v], A[u][v]) for v in range(m)] for u in range(m)]
    for u in range(m):
        own = damped(A[u][u], B[u][u], mu)
        blocks[u][u] = torch.kron(own[1], own[0])
    return torch.cat([torch.cat(row, 1) for row in blocks]), torch.block_diag(*[blocks[u][u] for u in range(m)])


def twin(A, B, mu, gradients):
    b = torch.cat([G.reshape(-1) for G in gradients])
    d = torch.linalg.solve(assembled(A, B, mu)[0], b)
    return [p.view_as(G) for p, G in zip(d.split([G.numel() for G in gradients]), gradients, strict=True)]


def dense_gap(A, B, mu):
    """1 - a b / ((a + d)(b + e)) of the worst player."""
    gaps = []
    for u in range(len(A)):
        whole = damped(A[u][u], B[u][u], mu)
        a, b = A[u][u].norm(), B[u][u].norm()
        gaps.append(float(1 - a / (a + (whole[0] - A[u][u])[0, 0]) * b / (b + (whole[1] - B[u][u])[0, 0])))
    return min(gaps)


@st.composite
def games(draw):
    m = draw(st.integers(1, 4))
    common = draw(st.sampled_from(["", "inputs", "outputs", "both"]))
    o, i = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shapes = []
    for _ in range(m):
        own = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        shapes.append((o if common in ("outputs", "both") else own[0], i if common in ("inputs", "both") else own[1]))
    N, seed = draw(st.integers(1, 9)), draw(st.integers(0, 999))  # N below a size: factors of deficient rank
    found = game(shapes, N, seed, inputs=common in ("inputs", "both"), outputs=common in ("outputs", "both"))
    return found, common, draw(st.sampled_from([1.0, 1e-1, 1e-2]))


@given(games())
def test_the_dense_joint_system(drawn):
    (A, B, gradients), common, mu = drawn
    cooperation = Cooperation(A, B, mu, tolerance=1e-13, iterations=2000)
    for found, expected in zip(cooperation.solve(gradients), twin(A, B, mu, gradients), strict=True):
        assert_close(found, expected)
    m = len(A)
    assert cooperation.converged
    if m == 2 or m == 1 or common:
        assert cooperation.method == ("pair" if m == 2 else "common")
        assert cooperation.outcome == "exact"
    if common == "both":
        assert cooperation.identical == [(u, v) for u in range(m) for v in range(u + 1, m)]


@given(games())
def test_the_whitened_spectrum_lies_where_it_is_said(drawn):
    """In (0, m], above the gap 1 - a b / ((a + d)(b + e)), and the damped system above the undamped one plus mu."""
    (A, B, _), _, mu = drawn
    M, P = assembled(A, B, mu)
    gap = dense_gap(A, B, mu)
    L = torch.linalg.cholesky(P)
    W = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, M, upper=False).T, upper=False)
    spectrum = torch.linalg.eigvalsh((W + W.T) / 2)
    assert gap - 1e-10 <= float(spectrum[0])
    assert float(spectrum[-1]) <= len(A) + 1e-10
    blocks = [torch.cat([torch.kron(B[u][v], A[u][v]) for v in range(len(A))], 1) for u in range(len(A))]
    rest = M - torch.cat(blocks)
    assert float(torch.linalg.eigvalsh((rest + rest.T) / 2)[0]) >= mu * (1 - 1e-10)


def test_a_player_alone_is_kfac():
    A, B, (G,) = game([(3, 4)])
    a, b = damped(A[0][0], B[0][0], 0.1)
    (found,) = Cooperation(A, B, 0.1).solve([G])
    assert_close(found, torch.linalg.solve(b, G) @ torch.linalg.inv(a))


def test_strangers_move_as_if_alone():
    A, B, gradients = game(SHAPES[:2])
    A[0][1], A[1][0] = torch.zeros_like(A[0][1]), torch.zeros_like(A[1][0])
    for u, found in enumerate(Cooperation(A, B, 0.1).solve(gradients)):
        a, b = damped(A[u][u], B[u][u], 0.1)
        assert_close(found, torch.linalg.solve(b, gradients[u]) @ torch.linalg.inv(a))


@pytest.mark.parametrize("shapes", [[(3, 6), (5, 6)], [(4, 6), (4, 6)]])
def test_a_common_input_does_not_make_it_singular(shapes):
    """Rank 3 of 6, one input: undamped complements of the factors vanish, the joint step is still found."""
    A, B, gradients = game(shapes, N=3, inputs=True)
    x = A[0][0]
    assert float((x - x @ torch.linalg.pinv(x) @ x).abs().max()) < 1e-12
    cooperation = Cooperation(A, B, 1e-4)
    assert cooperation.identical == []
    for found, expected in zip(cooperation.solve(gradients), twin(A, B, 1e-4, gradients), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("seed", range(5))
def test_complements_of_each_factor_alone_would_be_wrong(seed):
    """(A_uu - a) x (B_uu - b) misses the complement by a quarter to two thirds, and steps worse than K-FAC does."""
    generator = torch.Generator().manual_seed(seed)
    x, y, h, k = (torch.randn(20, n, generator=generator, dtype=F64) for n in (4, 5, 3, 4))
    y[:, :4] += 0.3 * x
    k[:, :3] += 0.3 * h
    A, B, mu = joint([x, y], 20), joint([h, k], 20), 0.01
    G = [torch.randn(3, 4, generator=generator, dtype=F64), torch.zeros(4, 5, dtype=F64)]
    (a0, b0), (a1, b1) = (damped(A[u][u], B[u][u], mu) for u in range(2))
    a = A[0][1] @ torch.linalg.solve(a1, A[1][0])
    b = B[0][1] @ torch.linalg.solve(b1, B[1][0])
    exact, alone = torch.kron(b0, a0) - torch.kron(b, a), torch.kron(b0 - b, a0 - a)
    assert 0.24 < float((alone - exact).norm() / exact.norm()) < 0.69
    found = Cooperation(A, B, mu).solve(G)[0]
    assert_close(found.reshape(-1), torch.linalg.solve(exact, G[0].reshape(-1)))

    def miss(matrix):
        return float((torch.linalg.solve(matrix, G[0].reshape(-1)) - found.reshape(-1)).norm() / found.norm())

    assert miss(alone) > 0.24
    assert miss(alone) > 2 * miss(torch.kron(b0, a0))


@pytest.mark.parametrize(("mu", "tolerance"), [(1.0, 1e-4), (1e-2, 1e-8), (1e-4, 1e-12)])
def test_cg_needs_no_more_than_its_bound_and_keeps_its_tolerance(mu, tolerance):
    A, B, gradients = game(SHAPES, N=4)
    cooperation = Cooperation(A, B, mu, tolerance=tolerance, iterations=5000)
    found = cooperation.solve(gradients)
    assert cooperation.method == "cg"
    assert cooperation.converged
    assert 0 < int(cooperation.outcome.split()[0]) <= cooperation.bound
    root = (len(A) / dense_gap(A, B, mu)) ** 0.5
    assert cooperation.bound == pytest.approx(0.5 * root * math.log(2 * root / tolerance), abs=1.001)
    M, P = assembled(A, B, mu)
    b = torch.cat([G.reshape(-1) for G in gradients])
    r = b - M @ torch.cat([D.reshape(-1) for D in found])
    relative = (r @ torch.linalg.solve(P, r)) / (b @ torch.linalg.solve(P, b))
    assert float(relative) ** 0.5 <= 1.01 * tolerance + 1e-14


def test_cg_says_when_it_stops_early():
    A, B, gradients = game(SHAPES)
    cooperation = Cooperation(A, B, 1e-6, iterations=2)
    assert not cooperation.converged
    cooperation.solve(gradients)
    assert cooperation.outcome == "2 iterations (stopped early)"
    assert not cooperation.converged
    still = cooperation.solve([torch.zeros_like(G) for G in gradients])
    assert cooperation.outcome == "0 iterations"
    assert not any(D.any() for D in still)


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ([(3, 4), (3, 4)], {}),
        ([(3, 4), (5, 7)], {}),
        ([(3, 6), (5, 2)], {}),
        ([(3, 4), (2, 4), (5, 4)], {"inputs": True}),
        ([(3, 4), (3, 2), (3, 5)], {"outputs": True}),
        (SHAPES, {}),
    ],
)
def test_flops_are_what_torch_counts(shapes, kind):
    A, B, gradients = game(shapes, **kind)
    counts = []
    for iterations in (1, 3):
        cooperation = Cooperation(A, B, 0.1, tolerance=1e-14, iterations=iterations)
        with FlopCounterMode(display=False) as counter:
            cooperation.solve(gradients)
        counts.append(counter.get_total_flops())
    if cooperation.method == "cg":
        # What is left over is the whitening on the way in and out, and dot products of vectors.
        per = (counts[1] - counts[0]) / 2
        assert cooperation.flops <= per <= cooperation.flops + 8 * sum(o * i for o, i in shapes)
    else:
        assert counts == [cooperation.flops] * 2
    assert cooperation.layerwise_flops == sum(2 * o * i * (o + i) for o, i in shapes)


@pytest.mark.parametrize("kind", [{}, {"inputs": True}])
@pytest.mark.parametrize("m", [2, 3])
def test_float32_factors(m, kind):
    shapes = [(3, 5)] * m
    A, B, gradients = game(shapes, dtype=torch.float32, **kind)
    found = Cooperation(A, B, 0.01).solve(gradients)
    wide = [[[block.double() for block in row] for row in F] for F in (A, B)]
    for D, expected in zip(found, twin(*wide, 0.01, [G.double() for G in gradients]), strict=True):
        assert D.dtype == torch.float32
        assert_close(D.double(), expected, 1e-4)


@pytest.mark.parametrize("m", [2, 3])
def test_who_cannot_be_told_apart_gets_equal_steps(m):
    A, B, gradients = game([(3, 4)] * m, inputs=True, outputs=True)
    cooperation = Cooperation(A, B, 1e-6)
    assert cooperation.identical == [(u, v) for u in range(m) for v in range(u + 1, m)]
    steps = cooperation.solve([gradients[0]] * m)
    for step in steps[1:]:
        assert_close(step, steps[0], 1e-8)
    # Almost the step that one player in the place of all would take, divided among them.
    alone = torch.linalg.solve(B[0][0], gradients[0]) @ torch.linalg.inv(A[0][0]) / m
    assert_close(steps[0], alone, 0.02)


@pytest.mark.parametrize("m", [2, 3])
def test_who_cannot_be_told_apart_is_refused_where_damping_is_lost(m):
    A, B, _ = game([(3, 4)] * m, inputs=True, outputs=True)
    with pytest.raises(pullback.StepError, match=r"cannot be told apart.*mu = 1e-30 .*Raise mu"):
        Cooperation(A, B, 1e-30)


def test_a_common_input_alone_tells_them_apart_at_any_damping():
    A, B, gradients = game([(3, 4)] * 2, inputs=True)
    for found, expected in zip(Cooperation(A, B, 1e-30).solve(gradients), twin(A, B, 1e-30, gradients), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_damping_below_round_off_is_refused_or_harmless(m, kind):
    """Rank 2 of 6 and of 5, with next to no damping: a finite step or an error, never nan."""
    A, B, gradients = game([(5, 6)] * m, N=2, **{kind: True})
    try:
        found = Cooperation(A, B, 1e-34).solve(gradients)
    except pullback.StepError:
        return
    assert all(torch.isfinite(D).all() for D in found)


def test_a_dead_player_stands_on_its_damping():
    """No factor at its output (a trace of zero): pi is 1."""
    A, B, gradients = game(SHAPES[:2])
    B[0][0], B[0][1], B[1][0] = (torch.zeros_like(F) for F in (B[0][0], B[0][1], B[1][0]))
    found = Cooperation(A, B, 0.04).solve(gradients)[0]
    a = A[0][0] + 0.2 * torch.eye(4, dtype=F64)
    assert_close(found, gradients[0] @ torch.linalg.inv(a) / 0.2)


def test_the_set_up_is_kept_and_nothing_given_is_changed():
    for shapes in (SHAPES[:2], SHAPES, [(2, 3)] * 3):
        A, B, gradients = game(shapes, inputs=len({i for _, i in shapes}) == 1)
        kept = [[[block.clone() for block in row] for row in F] for F in (A, B)]
        own = [G.clone() for G in gradients]
        cooperation = Cooperation(A, B, 0.1, tolerance=1e-13)
        first = cooperation.solve(gradients)
        second = cooperation.solve([2 * G for G in gradients])
        for D, E in zip(first, second, strict=True):
            assert_close(E, 2 * D)
        assert all(map(torch.equal, gradients, own))
        for F, G in zip((A, B), kept, strict=True):
            assert all(torch.equal(a, b) for r, s in zip(F, G, strict=True) for a, b in zip(r, s, strict=True))


def changed(which, u, v, f, shapes=SHAPES[:2], both=True):
    """A game with one block (and its transpose) replaced."""
    found = game(shapes)
    found[which][u][v] = f(found[which][u][v])
    if both and u != v:
        found[which][v][u] = found[which][u][v].mT
    return found


def grown(shapes, factor, **kind):
    """A game whose first two players are correlated more than is possible."""
    A, B, gradients = game(shapes, **kind)
    A[0][1], A[1][0] = factor * A[0][1], factor * A[1][0]
    return A, B, gradients


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed(0, 0, 1, lambda F: F[:, :-1]), "inputs[0][1] has shape (4, 4), the diagonal blocks ask for (4, 5)"),
        (changed(1, 1, 1, lambda F: F[:0, :0]), "outputs[0][1] has shape (3, 2), the diagonal blocks ask for (3, 0)"),
        (changed(0, 0, 0, lambda F: F[0, 0]), "inputs[0][0] has shape (), the diagonal"),
        (changed(0, 1, 1, lambda F: F.float()), "inputs[1][1] is torch.float32, the first factor torch.float64"),
        (([row[:1] for row in game(SHAPES)[0]], game(SHAPES)[1]), "inputs has 3 rows, of [1, 1, 1] blocks"),
        ((game(SHAPES)[0], game(SHAPES[:2])[1]), "Inputs of 3 players but outputs of 2"),
        (([], []), "at least for one"),
    ],
)
def test_factors_that_do_not_match_are_refused(found, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Cooperation(found[0], found[1], 1e-4)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed(1, 0, 1, lambda F: F * float("nan")), "outputs[0][1] holds values that are not finite"),
        (changed(0, 0, 1, lambda F: F + 1, both=False), "inputs[1][0] is not the transpose of inputs[0][1]"),
        (changed(0, 1, 1, lambda F: F.triu(1) + F), "inputs[1][1] is not the transpose of inputs[1][1]"),
        (changed(0, 0, 0, lambda F: F - 9 * torch.eye(4)), "inputs is indefinite: the block of player 0"),
        (grown(SHAPES[:2], 9), "inputs is indefinite: the two players have a canonical correlation of"),
        (grown(SHAPES, 9), "inputs is indefinite: it has a negative eigenvalue"),
    ],
)
def test_bad_factors_are_refused(found, message):
    with pytest.raises(pullback.StepError, match=re.escape(message)):
        Cooperation(found[0], found[1], 1e-4)


def test_a_common_input_that_is_indefinite_is_refused():
    """Each block is definite with its damping, all together are not."""
    A, B, _ = game([(2, 3)] * 3, inputs=True)
    values, Q = torch.linalg.eigh(A[0][0])
    values[0] = -1.0
    same = Q * values @ Q.T
    same = (same + same.T) / 2
    d = damped(same, B[0][0], 4.0)[0] - same
    assert 1.0 < float(d[0, 0]) < 3.0
    with pytest.raises(pullback.StepError, match=r"inputs is indefinite: it has the eigenvalue -1,"):
        Cooperation([[same] * 3] * 3, [[B[0][0]] * 3] * 3, 4.0)


def test_bad_gradients_and_options_are_refused():
    A, B, gradients = game(SHAPES[:2])
    cooperation = Cooperation(A, B, 0.1)
    with pytest.raises(ValueError, match=re.escape("shapes [(3, 4)], the factors are for [(3, 4), (2, 5)]")):
        cooperation.solve(gradients[:1])
    with pytest.raises(ValueError, match=r"Gradient 0 is torch\.float32, the factors are torch\.float64"):
        cooperation.solve([gradients[0].float(), gradients[1]])
    with pytest.raises(pullback.StepError, match="Gradient 1 holds values that are not finite"):
        cooperation.solve([gradients[0], gradients[1] / 0])
    for mu in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mu must be positive and finite"):
            Cooperation(A, B, mu)
    for options in ({"tolerance": 0.0}, {"tolerance": 1.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="tolerance must be in"):
            Cooperation(A, B, 0.1, **options)


@pytest.mark.parametrize("shapes", [SHAPES[:2], SHAPES, [(3, 4)] * 3])
def test_one_mu_per_player(shapes):
    A, B, gradients = game(shapes)
    mus = [0.1 * 3**u for u in range(len(shapes))]
    blocks = [[torch.kron(B[u][v], A[u][v]) for v in range(len(A))] for u in range(len(A))]
    for u, mu in enumerate(mus):
        own = damped(A[u][u], B[u][u], mu)
        blocks[u][u] = torch.kron(own[1], own[0])
    M = torch.cat([torch.cat(row, 1) for row in blocks])
    expected = torch.linalg.solve(M, torch.cat([G.reshape(-1) for G in gradients]))
    found = Cooperation(A, B, mus, tolerance=1e-13, iterations=2000).solve(gradients)
    assert_close(torch.cat([D.reshape(-1) for D in found]), expected)
    with pytest.raises(ValueError, match=f"mu has 1 entries for {len(shapes)} players"):
        Cooperation(A, B, mus[:1])


@pytest.mark.parametrize("cut", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("shapes", [[(6, 7), (5, 8)], [(4, 5), (6, 3), (5, 6)], [(4, 3), (3, 4), (3, 5), (2, 3)]])
def test_a_cut_changes_the_whitened_system_by_no_more_than_is_said(shapes, cut):
    """The system that is solved, read off its solver, is symmetric, definite, and within ``error`` of the whole."""
    A, B, _ = game(shapes, N=6)
    cooperation = Cooperation(A, B, 0.03, tolerance=1e-14, iterations=5000, cut=cut)
    M, P = assembled(A, B, 0.03)
    sizes = [o * i for o, i in shapes]
    columns = []
    for e in torch.eye(sum(sizes), dtype=F64):
        right = [p.view(shape) for p, shape in zip(e.split(sizes), shapes, strict=True)]
        columns.append(torch.cat([D.reshape(-1) for D in cooperation.solve(right)]))
    inverse = torch.stack(columns, 1)
    L = torch.linalg.cholesky(P)
    kept = torch.linalg.inv(L.T @ inverse @ L)
    white = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, M, upper=False).T, upper=False)
    change = float(torch.linalg.matrix_norm(white - kept, 2))
    assert change <= cooperation.error * (1 + 1e-8)
    assert float((kept - kept.T).abs().max()) < 1e-8
    low = min(1.0, float(torch.linalg.eigvalsh((white + white.T) / 2)[0]))
    assert float(torch.linalg.eigvalsh((kept + kept.T) / 2)[0]) >= low - 1e-8
    if cut == 0.4:
        assert change > 1e-3  # something was cut
        assert cooperation.flops < Cooperation(A, B, 0.03).flops
    with pytest.raises(ValueError, match="cut must be in"):
        Cooperation(A, B, 0.03, cut=1.0)
