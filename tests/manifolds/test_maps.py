"""Tangent coordinates and retractions against the equations of the manifolds; points that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import curved
from oracle import assert_close
from pullback.errors import ManifoldError
from pullback.manifolds import Orthogonal, PositiveDefinite, Sphere, Stiefel, constrain, manifolds_of

CASES = {
    "sphere": (Sphere(), (5,)),
    "sphere of a matrix": (Sphere(3.0), (2, 3)),
    "stiefel tall": (Stiefel(), (5, 2)),
    "stiefel wide": (Stiefel(), (2, 4)),
    "stiefel, one column": (Stiefel(), (4, 1)),
    "orthogonal": (Orthogonal(), (3, 3)),
    "positive": (PositiveDefinite(), (3, 3)),
    "positive number": (PositiveDefinite(), (1, 1)),
}


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 50))
def test_coordinates_are_an_orthonormal_basis_of_the_tangent_space(case, seed):
    manifold, shape = CASES[case]
    w = curved.point(manifold, shape, seed)
    tangent = manifold.tangent(w)
    E = tangent.from_tangent(torch.eye(tangent.dimension, dtype=w.dtype)).reshape(tangent.dimension, -1).T
    B, G = curved.basis(manifold, w), curved.product(manifold, w)
    assert tangent.dimension == B.shape[1] == manifold.dimension(w.shape)
    assert_close(E.T @ G @ E, torch.eye(tangent.dimension, dtype=w.dtype), 1e-10)
    assert_close(B @ torch.linalg.lstsq(B, E).solution, E, 1e-10)  # spans no more than the tangent space
    g = torch.randn(2, 3, *shape, dtype=w.dtype)
    assert_close(tangent.to_tangent(g), g.reshape(2, 3, -1) @ E, 1e-10)
    c = torch.randn(2, tangent.dimension, dtype=w.dtype)
    assert_close(tangent.from_tangent(c), (c @ E.T).reshape(2, *shape), 1e-10)
    # The nearest tangent direction in the manifold's own product, by least squares.
    d = g[0, 0]
    near = B @ torch.linalg.solve(B.T @ G @ B, B.T @ G @ d.reshape(-1))
    assert_close(E @ tangent.coordinates(d), near, 1e-9)
    assert_close(manifold.project(w, d).reshape(-1), near, 1e-9)
    assert_close(tangent.to(torch.float64).to_tangent(g), tangent.to_tangent(g), 1e-15)


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 50), size=st.floats(1e-3, 30.0))
def test_retraction_stays_on_the_manifold_and_is_of_second_order(case, seed, size):
    manifold, shape = CASES[case]
    w = curved.point(manifold, shape, seed)
    tangent = manifold.tangent(w)
    d = size * tangent.from_tangent(torch.randn(tangent.dimension, dtype=w.dtype))
    moved = manifold.retract(w, d)
    assert_close(moved, curved.retract(manifold, w, d), 1e-9)
    manifold.check(moved)
    assert manifold.distance(moved) <= 1e-13 * max(1.0, float(moved.norm()))
    h = 1e-4 / max(1.0, float(d.norm()))
    # Off w + h d by O(h^2): halved, a quarter.
    off = [float((manifold.retract(w, t * d) - w - t * d).norm()) for t in (h, h / 2)]
    if off[0] > 1e-12:
        assert off[1] == pytest.approx(off[0] / 4, rel=0.05)


def test_a_direction_that_is_not_finite_gives_a_point_that_is_not():
    for manifold, shape in CASES.values():
        w = curved.point(manifold, shape)
        assert not torch.isfinite(manifold.retract(w, torch.full_like(w, torch.nan))).any()
        with pytest.raises(ManifoldError, match=r"direction of shape \(7,\)"):
            manifold.retract(w, torch.zeros(7))


@pytest.mark.parametrize(
    ("manifold", "w", "says"),
    [
        (Sphere(), torch.tensor([1.0, 1.0]), r"not on Sphere\(radius=1.0\): it lies 0.414 away.*project=True"),
        (Stiefel(), 2 * torch.eye(3, 2), r"not on Stiefel\(\): it lies 1.41 away"),
        (PositiveDefinite(), torch.tensor([[1.0, 2.0], [0.0, 5.0]]), "it lies 1.41 away"),
        (PositiveDefinite(), torch.diag(torch.tensor([1.0, -3.0])), "it lies 3 away"),
        (PositiveDefinite(), torch.diag(torch.tensor([1.0, 0.0])), "smallest eigenvalue is 0"),
        (Sphere(), torch.tensor([1.0, float("nan")]), "is not finite"),
        (Orthogonal(), torch.eye(3, 2), r"square matrices, got the shape \(3, 2\); take Stiefel"),
        (Stiefel(), torch.ones(3), r"holds matrices, got the shape \(3,\)"),
        (PositiveDefinite(), torch.ones(2, 3), r"square matrices, got the shape \(2, 3\)"),
        (Sphere(), torch.ones(1), r"two numbers or more, got the shape \(1,\)"),
        (Stiefel(), torch.ones(1, 1), "no direction to move in"),
        (Sphere(), torch.tensor([1, 0]), "has dtype torch.int64"),
    ],
)
def test_what_is_no_point_is_refused(manifold, w, says):
    with pytest.raises(ManifoldError, match=says):
        manifold.tangent(w)


def test_a_declaration_is_checked_and_can_project():
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(ManifoldError, match=r"Parameter 'weight' is not on Stiefel\(\): it lies .* away"):
        constrain(layer, "weight", Stiefel())
    assert not manifolds_of(layer)
    with pytest.raises(TypeError, match="such as Sphere"):
        constrain(layer, "weight", Stiefel)
    with pytest.raises(AttributeError):
        constrain(layer, "wait", Sphere())
    with pytest.raises(ManifoldError, match="has no direction"):
        constrain(_zeros(), "weight", Sphere(), project=True)
    with pytest.raises(ManifoldError, match="lower rank"):
        constrain(_zeros(), "weight", Stiefel(), project=True)
    with pytest.raises(ManifoldError, match="zero matrix"):
        constrain(_zeros(), "weight", PositiveDefinite(), project=True)
    p = constrain(layer, "weight", Stiefel(), project=True)
    assert p is layer.weight
    U, _, Vh = torch.linalg.svd(before, full_matrices=False)
    assert torch.equal(p.detach(), U @ Vh)
    with pytest.raises(ValueError, match="radius"):
        Sphere(0.0)


def _zeros():
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    return layer


def test_declarations_follow_copies_and_leave_state_dicts_plain():
    model, _, _ = curved.net()
    twin = copy.deepcopy(model)
    named = {name: manifolds_of(twin).get(id(p)) for name, p in twin.named_parameters()}
    assert named["0.weight"] == Stiefel()
    assert named["4.weight"] == Sphere(2.0)
    assert named["4.bias"] is None
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    plain = nn.Sequential(*plain, curved.Quadratic(), nn.Linear(2, 2)).double()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert not manifolds_of(plain)


def test_tied_parameters_have_one_manifold():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    both = nn.Sequential(a, b)
    constrain(both, "0.weight", Orthogonal(), project=True)
    assert list(manifolds_of(both).values()) == [Orthogonal()]
    constrain(both, "1.weight", Sphere(3**0.5))
    with pytest.raises(ManifoldError, match=r"'1.weight' is tied to one on Orthogonal\(\)"):
        manifolds_of(both)


def test_parameters_of_geoopt_are_recognised():
    geoopt = pytest.importorskip("geoopt")
    model = nn.Module()
    model.u = geoopt.ManifoldParameter(torch.eye(3)[0], manifold=geoopt.Sphere())
    model.W = geoopt.ManifoldParameter(torch.eye(4, 2), manifold=geoopt.Stiefel())
    model.P = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.SymmetricPositiveDefinite())
    model.flat = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Euclidean())
    held = manifolds_of(model)
    assert [held.get(id(p)) for p in model.parameters()] == [Sphere(), Stiefel(), PositiveDefinite(), None]
    model.ball = geoopt.ManifoldParameter(torch.zeros(2), manifold=geoopt.PoincareBall())
    with pytest.raises(ManifoldError, match="geoopt's PoincareBall"):
        manifolds_of(model)
