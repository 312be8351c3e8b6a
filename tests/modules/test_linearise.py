"""A composite's linearisation is the chain rule of its parts: against dense Jacobians of the whole, nestings drawn."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import jacrev

import pullback
from oracle import assert_close, called
from pullback.errors import MixingError
from pullback.modules import CompositionError, feedback, hierarchy, parallel, residual, riemannian, series


def leaf(rng: random.Random, a: int, b: int):
    kind = rng.choice(["linear", "sequential", "map"])
    mass = rng.choice([1.0, 0.5, 3.0])
    if kind == "linear":
        return riemannian(nn.Linear(a, b).double(), mass=mass)
    if kind == "sequential":
        return riemannian(nn.Sequential(nn.Linear(a, b), nn.Tanh()).double(), mass=mass)
    W, c = 0.5 * torch.randn(a, b, dtype=torch.float64), torch.randn(b, dtype=torch.float64)
    k = torch.randn((), dtype=torch.float64)
    return riemannian(lambda x, W, c, k: torch.sin(x @ W + k) * c, [W, c, k], mass=mass, inputs=a, outputs=b)


def drawn(rng: random.Random, a: int, b: int, depth: int):
    """A module from vectors of a numbers to vectors of b, nested that deep at the most."""
    if depth == 0:
        return leaf(rng, a, b)
    kinds = ["series", "sum", "loop"]
    kinds += ["concatenate", "hierarchy"] * (b > 1) + ["split"] * (a > 1) + ["residual", "shared"] * (a == b)
    kind = rng.choice(kinds)

    def part(a: int, b: int):
        return drawn(rng, a, b, rng.randrange(depth))

    mass = rng.choice([1.0, 2.0])
    if kind == "series":
        middle = rng.randint(1, 3)
        return series(part(a, middle), part(middle, b), mass=mass)
    if kind == "shared":
        once = part(a, a)
        return series(once, part(a, a), once, mass=mass)
    if kind == "sum":
        return parallel(part(a, b), part(a, b), mass=mass)
    if kind == "concatenate":
        k = rng.randint(1, b - 1)
        return parallel(part(a, k), part(a, b - k), join="concatenate", mass=mass)
    if kind == "split":
        k = rng.randint(1, a - 1)
        return parallel(part(k, b), part(a - k, b), split=[k, a - k], mass=mass)
    if kind == "residual":
        return residual(part(a, a), step=rng.choice([1.0, 0.3]), mass=mass)
    if kind == "hierarchy":
        k = rng.randint(1, b - 1)
        return hierarchy(part(a, k), part(a + k, b - k), mass=mass)
    return feedback(part(a, b), part(b, a), rounds=rng.randint(0, 2), mass=mass)


def jacobians(module, x):
    """(N dout, N din) and (N dout, n)."""
    params = {name: p.detach() for name, p in module.trained().items()}
    y = module(x).detach()
    Jx = jacrev(lambda x: called(module, params, (x,), {}))(x).reshape(y.numel(), x.numel())
    Jp = jacrev(lambda p: called(module, p, (x,), {}))(params)
    return y, Jx, torch.cat([j.reshape(y.numel(), -1) for j in Jp.values()], 1)


def packed(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


@given(seed=st.integers(0, 10**6), a=st.integers(1, 3), b=st.integers(1, 3), depth=st.integers(0, 3))
def test_operators_are_the_dense_jacobians(seed, a, b, depth):
    torch.manual_seed(seed)
    module = drawn(random.Random(seed), a, b, depth)
    N = 3
    x = torch.randn(N, a, dtype=torch.float64)
    y, Jx, Jp = jacobians(module, x)
    local = module.linearise(x)
    assert_close(local.y, y, 1e-12)
    dx, dy = torch.randn_like(x), torch.randn_like(y)
    theta = {name: torch.randn_like(p) for name, p in module.trained().items()}
    scale = max(1.0, float(Jx.abs().max()), float(Jp.abs().max()))
    for found, expected in (
        (local.A(dx).reshape(-1), Jx @ dx.reshape(-1)),
        (local.At(dy).reshape(-1), Jx.T @ dy.reshape(-1)),
        (local.B(theta).reshape(-1), Jp @ packed(theta)),
        (packed(local.Bt(dy)), Jp.T @ dy.reshape(-1)),
    ):
        assert float((found - expected).abs().max()) <= 1e-10 * scale
    # A metric of the outputs: rows of single samples, the factor at the input, the parameter metric.
    S = torch.randn(2, *y.shape, dtype=torch.float64)
    pulled = local.pull_back(S)
    apart = torch.einsum("rno,nm->rnmo", S, torch.eye(N, dtype=torch.float64)).reshape(2 * N, -1)
    U = apart @ Jp
    assert float((pulled.rows - U).abs().max()) <= 1e-10 * scale
    assert float((pulled.factor.sum(1) - (apart @ Jx).reshape(2, N, N, a).sum((1, 2))).abs().max()) <= 1e-9 * scale
    G = torch.einsum("rno,rnp->nop", S, S)
    same = local.pull_back(matrix=G)
    D = torch.cat([torch.full((p.numel(),), module.masses()[name]) for name, p in module.trained().items()]).double()
    M = 0.7 * torch.diag(D) + U.T @ U
    assert float((pulled.metric(0.7) - M).abs().max()) <= 1e-10 * scale**2
    assert float((same.metric(0.7) - M).abs().max()) <= 1e-7 * scale**2
    d = packed(theta)
    assert float((pulled.apply(0.7, d) - M @ d).abs().max()) <= 1e-9 * scale**2
    assert all(torch.equal(pulled.unpack(d)[name], t) for name, t in theta.items())
    assert torch.equal(pulled.pack(theta), d)


def test_states_of_more_axes():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()).double()
    back = nn.Conv2d(6, 2, 3, padding=1).double()
    branch = nn.Conv2d(2, 3, 3, padding=1).double()
    module = residual(series(parallel(conv, branch, join="concatenate"), back))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    y, Jx, Jp = jacobians(module, x)
    local = module.linearise(x)
    dy = torch.randn_like(y)
    assert_close(local.At(dy).reshape(-1), Jx.T @ dy.reshape(-1))
    assert_close(packed(local.Bt(dy)), Jp.T @ dy.reshape(-1))
    assert_close(local.A(x).reshape(-1), Jx @ x.reshape(-1))
    S = torch.randn(2, *y.shape, dtype=torch.float64)
    apart = torch.einsum("rno,nm->rnmo", S.flatten(2), torch.eye(2, dtype=torch.float64)).reshape(4, -1)
    assert_close(local.pull_back(S).rows, apart @ Jp)


def test_the_state_maps_are_what_they_say():
    torch.manual_seed(0)
    f, g, h = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), nn.Linear(2, 3).double()
    u, v = nn.Linear(1, 2).double(), nn.Linear(2, 2).double()
    low = nn.Linear(5, 4).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(series(f, h)(x), h(f(x)))
    assert torch.equal(parallel(f, g)(x), f(x) + g(x))
    assert torch.equal(parallel(f, g, join="concatenate")(x), torch.cat([f(x), g(x)], 1))
    assert torch.equal(parallel(u, v, split=[1, 2])(x), u(x[:, :1]) + v(x[:, 1:]))
    assert torch.equal(residual(series(f, h), step=0.5)(x), x + 0.5 * h(f(x)))
    y = f(x + h(f(x + h(f(x)))))
    assert torch.equal(feedback(f, h, rounds=2)(x), y)
    assert torch.equal(feedback(f, h, rounds=0)(x), f(x))
    assert torch.equal(hierarchy(f, low)(x), torch.cat([f(x), low(torch.cat([x, f(x)], 1))], 1))


def test_two_points_at_once_and_beside_an_optimizer():
    """A linearisation holds what it needs: later calls, and the hooks of an optimizer, change nothing."""
    torch.manual_seed(0)
    first, second = (riemannian(lambda x: x.tanh(), {}) for _ in range(2))
    module = parallel(first, series(second, residual(nn.Linear(4, 4).double())), join="concatenate")
    x = torch.randn(3, 4, dtype=torch.float64)
    opt = pullback.GaussNewton(module, nn.MSELoss())
    local = module.linearise(x)
    dy = torch.randn_like(local.y)
    before = local.At(dy)
    parallel(first, second, join="concatenate").linearise(torch.randn(2, 7, dtype=torch.float64))
    module.linearise(torch.randn(5, 4, dtype=torch.float64))
    assert torch.equal(local.At(dy), before)
    _, Jx, _ = jacobians(module, x)
    assert_close(before.reshape(-1), Jx.T @ dy.reshape(-1))
    opt.criterion(module(x), torch.zeros(3, 8, dtype=torch.float64)).backward()
    opt.step()
    assert opt.last.accepted


def test_frozen_parameters_have_no_columns():
    inner = nn.Linear(3, 2).double()
    inner.bias.requires_grad_(False)
    module = series(inner, nn.Linear(2, 1).double())
    x = torch.randn(4, 3, dtype=torch.float64)
    local = module.linearise(x)
    _, _, Jp = jacobians(module, x)
    names = ["parts.0.module.weight", "parts.1.module.weight", "parts.1.module.bias"]
    assert list(local.Bt(local.y)) == list(module.masses()) == names
    assert_close(packed(local.Bt(local.y)), Jp.T @ local.y.reshape(-1))


def test_samples_must_be_apart_for_rows():
    module = series(nn.Linear(3, 2).double(), nn.BatchNorm1d(2).double())
    local = module.linearise(torch.randn(4, 3, dtype=torch.float64))
    with pytest.raises((MixingError, ValueError), match=r"BatchNorm|more than 1 value"):
        local.pull_back(torch.ones(1, 4, 2, dtype=torch.float64))
    mean = riemannian(lambda x: x - x.mean(0), {}).linearise(torch.randn(4, 3, dtype=torch.float64))
    with pytest.raises(MixingError, match="another output in a batch than alone"):
        mean.pull_back(torch.ones(1, 4, 3, dtype=torch.float64))


def test_changes_that_do_not_fit_are_refused():
    local = riemannian(nn.Linear(3, 2)).linearise(torch.randn(4, 3))
    ones = torch.ones(2, 2)
    for call, says in (
        (lambda: local.A(torch.ones(3)), r"shape \(3,\), the state \(4, 3\)"),
        (lambda: local.Bt(torch.ones(4, 3)), r"shape \(4, 3\), the output \(4, 2\)"),
        (lambda: local.B({"weight": ones}), r"'weight' has shape \(2, 2\), the module has no trained parameter"),
        (lambda: local.B({"module.weight": ones}), r"has shape \(2, 2\), the module has \(2, 3\)"),
        (local.pull_back, "one of them"),
        (lambda: local.pull_back(torch.ones(4, 2)), r"is \(r, \*that\), got \(4, 2\)"),
        (lambda: local.pull_back(matrix=torch.eye(3)), r"G has shape \(3, 3\); for 2 outputs"),
        (lambda: local.pull_back(matrix=-torch.eye(2)), "smallest eigenvalue -1"),
        (lambda: local.pull_back(matrix=torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "asymmetry 0.5"),
        (lambda: local.pull_back(matrix=torch.full((2, 2), torch.nan)), "not finite"),
    ):
        with pytest.raises(CompositionError, match=says):
            call()


def test_a_module_at_two_places_keeps_its_parameters():
    """torch.func.functional_call alone leaves a shared module with what it was called with."""
    layer = nn.Linear(3, 3).double()
    whole = riemannian(nn.Sequential(layer, nn.Tanh(), layer))
    own = layer.weight
    x = torch.randn(4, 3, dtype=torch.float64)
    local = whole.linearise(x)
    local.pull_back(torch.ones(1, 4, 3, dtype=torch.float64))
    local.A(x)
    assert layer.weight is own
    _, _, Jp = jacobians(whole, x)
    assert_close(packed(local.Bt(x)), Jp.T @ x.reshape(-1))
