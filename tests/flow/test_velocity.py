"""The field in all regimes, beside the dense twin by torch.func: D, its pseudo-inverse, and the identities of C."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import Residual
from oracle import assert_close, jacobian
from pullback.flow import AdaptedFlow, CrossEntropy, FlowError, Squared
from pullback.flow.aims import Aim, stacked
from pullback.flow.classes import quotient_basis
from pullback.flow.field import Bounds, Field, Point, lift_of
from pullback.flow.inverse import Products, Triangular, Truncated, row_squares
from pullback.flow.lsmr import lsmr
from pullback.flow.system import Jacobian, OutputSystem

f64 = torch.float64


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, dtype=f64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def twin(model: nn.Module, x: Tensor) -> Tensor:
    """D by torch.func, rows in the order of the coordinates, columns in that of named_parameters."""
    J = jacobian(model, (x,), {})
    return J.reshape(len(x), -1, J.shape[-1]).transpose(0, 1).reshape(-1, J.shape[-1])


def point_of(flow: AdaptedFlow) -> Point:
    field = Field(flow.system, flow.aim, lift_of(flow.choice), flow.alpha, Bounds(10, 100.0))
    return field.at(0.0, flow.system.get())


#: rows, widths: over-, under-parametrised, borderline (K = QN = 6 and 12)
SHAPES = {
    "over-parametrised": (4, (3, 7, 2)),
    "under-parametrised": (30, (3, 2, 2)),
    "borderline": (6, (5, 1)),
    "borderline with two outputs": (6, (5, 2)),
}


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_the_identities_hold(name: str, seed: int) -> None:
    N, widths = SHAPES[name]
    torch.manual_seed(seed)
    model, x, y = net(*widths), torch.randn(N, widths[0], dtype=f64), torch.randn(N, widths[-1], dtype=f64)
    D = twin(model, x)
    flow = AdaptedFlow(model, x, y, c=0.3)
    assert flow.regime == name.partition(" with")[0]
    assert flow.rank == min(D.shape)
    point = point_of(flow)
    assert point.D is not None
    assert_close(point.D.dense(), D)
    r = stacked(model(x).detach()) - stacked(y)
    gradient = 0.6 * r
    inverse = torch.linalg.pinv(D)
    condition = float(torch.linalg.cond(D))
    P = D @ inverse
    # theta', x' + P grad C = 0, and the balance of energy; the pseudo-inverse itself is as good as the condition.
    assert_close(point.slope, -inverse @ gradient, 1e-12 * max(condition, 100.0) ** 1.5)
    speed = D @ point.slope
    assert_close(speed, -P @ gradient)
    lost = float(gradient @ speed)
    assert lost == pytest.approx(-float((P @ gradient).square().sum()), rel=1e-10)
    # Horizontal: in the range of D^T.
    assert_close(inverse @ D @ point.slope, point.slope, 1e-10 * max(1.0, condition / 100))
    if flow.promised:
        assert_close(speed, -gradient)
    assert point.inverse is not None
    assert_close(point.inverse.project(point.inverse.project(r)), point.inverse.project(r))
    flow.close()


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_both_flows_are_one_at_the_border(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = net(5, 1), torch.randn(6, 5, dtype=f64), torch.randn(6, 1, dtype=f64)
    system = OutputSystem(model, x, Squared(y).metric())
    D, r = system.linearise(), stacked(y)
    wide = Triangular(D).apply(r)
    D.columns -= 1  # as if it were tall: by the Gram of the columns
    tall = Triangular.__new__(Triangular)
    Triangular.__init__(tall, D)
    assert not tall.wide
    condition = float(torch.linalg.cond(D.dense()))
    assert_close(tall.apply(r), wide, 1e-13 * max(condition, 30.0) ** 2)
    system.close()


def jacobian_of(rows: int, width: int) -> Jacobian:
    torch.manual_seed(3)
    system = OutputSystem(net(4, width, 2), torch.randn(rows, 4, dtype=f64), Squared(torch.ones(rows, 2)).metric())
    D = system.linearise()
    system.close()
    return D


@pytest.mark.parametrize(("rows", "width"), [(5, 6), (40, 3)])
def test_solvers_agree(rows: int, width: int) -> None:
    D = jacobian_of(rows, width)
    v = torch.randn(D.rows, dtype=f64)
    dense = torch.linalg.pinv(D.dense()) @ v
    for solver in (Triangular(D), Triangular(D, qr=True), Truncated(D, 1e-9), Truncated(D, 1e-7, dense=False)):
        assert_close(solver.apply(v), dense, 1e-9)
    assert_close(Products(D, 1e-13, 2000).apply(v), dense, 1e-8)
    assert_close(row_squares(D), D.dense().square().sum(1))
    assert_close(D.normal(), D.dense().T @ D.dense())
    assert_close(D.gram(), D.dense() @ D.dense().T)


@pytest.mark.parametrize("qr", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(5, 6), (50, 12)])
def test_the_ends_of_the_spectrum(rows: int, width: int, qr: bool) -> None:
    """Below 64 all values; above it iterations, that go on from where they were."""
    D = jacobian_of(rows, width)
    values = torch.linalg.svdvals(D.dense())
    inverse, guess = Triangular(D, qr=qr), None
    for _ in range(4):
        found = inverse.extremes(guess)
        guess = found.guess
    assert found.largest == pytest.approx(float(values[0]), rel=1e-3)
    assert found.smallest[0] == pytest.approx(float(values[-1]), rel=1e-6)
    assert found.left is not None
    assert found.right is not None
    assert float(found.left @ D.dense() @ found.right) == pytest.approx(float(values[-1]), rel=1e-5)


def test_lsmr_is_the_least_squares_solution_of_smallest_norm() -> None:
    A = torch.randn(9, 4, dtype=f64) @ torch.randn(4, 7, dtype=f64)
    b = torch.randn(9, dtype=f64)
    found = lsmr(lambda t: A @ t, lambda u: A.T @ u, b, tolerance=1e-13, steps=100)
    assert_close(found.x, torch.linalg.pinv(A, rtol=1e-10) @ b, 1e-8)
    assert found.converged
    assert not lsmr(lambda t: A @ t, lambda u: A.T @ u, b, tolerance=1e-13, steps=1).converged


def test_any_rank_leaves_the_weak_modes() -> None:
    torch.manual_seed(0)
    model, x = net(3, 5, 2), torch.randn(4, 3, dtype=f64)
    x[1] = x[0]
    y = torch.randn(4, 2, dtype=f64)
    D = twin(model, x)
    with pytest.raises(FlowError, match=r"Samples 0 and 1 have the same input and different targets.*C = 0\.\d+"):
        AdaptedFlow(model, x, y)
    flow = AdaptedFlow(model, x, y, regime="any-rank")
    assert (flow.regime, flow.rank) == ("any-rank", 6)
    point = point_of(flow)
    r = stacked(model(x).detach()) - stacked(y)
    assert_close(point.slope, -torch.linalg.pinv(D, rtol=1e-9) @ r / 4, 1e-9)
    flow.close()


def test_cross_entropy_moves_logits_modulo_constants() -> None:
    torch.manual_seed(0)
    model, x, labels = net(3, 9, 4), torch.randn(5, 3, dtype=f64), torch.randint(0, 4, (5,))
    D = twin(model, x)
    flow = AdaptedFlow(model, x, labels)
    assert (flow.choice.rows, flow.regime) == (15, "over-parametrised")
    point = point_of(flow)
    z = model(x).detach()
    p = torch.softmax(z, 1)
    wanted = stacked((torch.nn.functional.one_hot(labels, 4) - p) / 5)
    # Up to a constant per sample the logits move as gradient descent in output space.
    moved = (D @ point.slope).view(4, 5).T
    assert_close(moved - moved.mean(1, keepdim=True), wanted.view(4, 5).T)
    B = quotient_basis(4, z)
    assert_close(B.T @ B, torch.eye(3, dtype=f64))
    assert float(B.sum(0).abs().max()) < 1e-14
    flow.close()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_homotopy_has_the_same_critical_set(alpha: float) -> None:
    torch.manual_seed(0)
    model, x, y = net(3, 6, 1), torch.randn(5, 3, dtype=f64), torch.randn(5, 1, dtype=f64)
    D = twin(model, x)
    flow = AdaptedFlow(model, x, y, alpha=alpha)
    r = (model(x).detach() - y)[:, 0] / 5
    expected = -(1 - alpha) * D.T @ r - alpha * torch.linalg.pinv(D) @ r
    assert_close(point_of(flow).slope, expected)
    with pytest.raises(FlowError, match="promises no stopping time"):
        flow.stopping_time(1e-6)
    flow.close()


def test_convolutions_and_skips_are_read_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 3, 3, dtype=f64), nn.Tanh(), nn.Flatten(), Residual(nn.Linear(9, 9, dtype=f64), nn.Tanh()),
        nn.Linear(9, 2, dtype=f64),
    )  # fmt: skip
    x = torch.randn(4, 1, 5, dtype=f64)
    D = twin(model, x)
    system = OutputSystem(model, x, Squared(torch.ones(4, 2)).metric())
    assert_close(system.linearise().dense(), D)
    v = torch.randn(8, dtype=f64)
    assert_close(system.pull(v.view(2, 4).T), D.T @ v)
    system.close()


def test_aims_solve_their_own_flow() -> None:
    """`advance` is the solution operator of `velocity`."""
    path = Squared(lambda s: torch.stack([torch.sin(s / 3), s**2 / 50])[:, None], c=0.2)
    labels = CrossEntropy(torch.tensor([0, 2]))
    labels.check(torch.zeros(2, 3, dtype=f64))
    for aim, x in ((path, torch.tensor([0.7, -0.4], dtype=f64)), (labels, torch.randn(4, dtype=f64))):
        assert isinstance(aim, Aim)
        step, s, y = 1e-3, 0.0, x
        for _ in range(500):
            a = aim.velocity(s, y)
            y = y + step * aim.velocity(s + step / 2, y + step / 2 * a)
            s += step
        assert_close(aim.advance(0.0, x, s), y, 1e-6)
        if aim is labels:
            T = aim.stopping_time(x, 0.05)
            assert aim.predicted(T, x) == pytest.approx(0.05, rel=1e-6)
