"""Steps on manifolds: the dense tangent step, plain steps in a chart, undone steps, and who refuses."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import curved
import pullback
from closed import CLOSED
from oracle import assert_close
from pullback import Damping, Momentum
from pullback.errors import ManifoldError
from pullback.manifolds import Orthogonal, PositiveDefinite, Sphere, Stiefel, constrain, manifolds_of

FIXED = Damping(control="fixed", initial=0.3)
OPEN = {"layerwise": pullback.LayerwiseMetric, "global": pullback.GaussNewton}


def step(opt, model, x, y):
    opt.zero_grad()
    loss = opt.criterion(model(x), y)
    loss.backward()
    opt.step()
    return loss.item()


def off(model: nn.Module) -> float:
    """Largest distance of a parameter from its manifold, relative to the parameter."""
    held = manifolds_of(model)
    return max(held[id(p)].distance(p.detach()) / float(p.detach().norm()) for p in model.parameters() if id(p) in held)


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("mass", ["identity", "named"])
def test_step_is_the_dense_tangent_step(solver, kind, mass):
    model, x, y = curved.net()
    table = {"0.weight": 2.0, "4.weight": 0.5, "6.A": 3.0, "7.bias": 4.0} if mass == "named" else "identity"
    dense = curved.Blocks(model, x, y)
    owner, D = [], []
    for name, p in model.named_parameters():
        owner += [name.split(".")[0]] * p.numel()
        D += [table.get(name, 1.0) if mass == "named" else 1.0] * p.numel()
    mask = torch.tensor([[a == b or kind == "global" for a in owner] for b in owner])
    opt = OPEN[kind](model, nn.MSELoss(), damping=FIXED, mass=table, solver=solver)
    step(opt, model, x, y)
    D, mu = torch.tensor(D, dtype=torch.float64)[:, None], opt.last.mu
    d = dense.direction(mu, dense.H * mask, D)
    M = mu * D * dense.G + dense.H
    alpha = float(-(dense.g @ d) / (d @ M @ d)) if kind == "layerwise" else 1.0
    assert opt.last.scale == pytest.approx(alpha, rel=1e-5 if solver == "cg" else 1e-8)
    for p, expected in zip(model.parameters(), dense.moved(alpha * d), strict=True):
        assert_close(p.detach(), expected, 1e-5 if solver == "cg" else 1e-9)


def test_projecting_the_ambient_step_can_point_uphill():
    """w on the circle, M long across the tangent: -M^{-1} g projected climbs, the tangent step does not."""

    class Tilted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))

        def forward(self, x):
            return x * (self.w @ torch.tensor([3.0, 2.9], dtype=torch.float64))

    model = Tilted()
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    criterion = nn.MSELoss()
    constrain(model, "w", Sphere())
    # A penalty makes the gradient another one than U^T e0, as regularisers do.
    tilt = torch.tensor([40.0, -15.0], dtype=torch.float64)

    def loss():
        return criterion(model(x), y) + model.w @ tilt

    opt = pullback.GaussNewton(model, criterion, damping=Damping(control="fixed", initial=0.01))
    loss().backward()
    g = model.w.grad.clone()
    before = loss().item()
    w = model.w.detach().clone()
    U = 2**0.5 * torch.tensor([[3.0, 2.9]], dtype=torch.float64)
    opt.step()
    M = opt.last.mu * torch.eye(2, dtype=torch.float64) + U.T @ U
    ambient = Sphere().project(w, -torch.linalg.solve(M, g))
    assert float(ambient @ g) > 0
    with torch.no_grad():
        moved = model.w - w
    assert float(Sphere().project(w, moved) @ g) < 0
    assert loss().item() < before


class Chart(nn.Module):
    """A module whose weight is a parameter c without constraints: w = R(w0, E c), by the dense retraction."""

    def __init__(self, module: nn.Module, name: str, manifold) -> None:
        super().__init__()
        w = getattr(module, name).detach()
        E = manifold.tangent(w)
        self.c = nn.Parameter(torch.zeros(E.dimension, dtype=w.dtype))
        self.point = lambda c: curved.retract(manifold, w, E.from_tangent(c))
        self.others = nn.ParameterDict({n.replace(".", "_"): p for n, p in module.named_parameters() if n != name})
        self.inner = [module, name]  # in a list: no child, its weight is not a parameter of this

    def forward(self, x: Tensor) -> Tensor:
        module, name = self.inner
        return torch.func.functional_call(module, {name: self.point(self.c), **dict(self.others)}, (x,))


def charted(model: nn.Sequential) -> nn.Sequential:
    """The same model at the same point, in the chart of the retraction."""
    held = manifolds_of(model)
    out = []
    for layer in copy.deepcopy(model):
        out.append(layer)
    for k, layer in enumerate(model):
        for name, p in layer.named_parameters():
            if id(p) in held:
                out[k] = Chart(copy.deepcopy(layer), name, held[id(p)])
    return nn.Sequential(*out)


@pytest.mark.parametrize("kind", [*OPEN, *CLOSED])
def test_a_step_is_the_plain_step_in_the_chart(kind):
    """Trial losses, deviations, the look ahead and the arc: all as for a model that has the coordinates as weights."""
    model, x, y = curved.net()
    twin = charted(model)
    make = {**OPEN, **CLOSED}[kind]
    opt, other = (make(m, nn.MSELoss(), damping=Damping(initial=1e-3)) for m in (model, twin))
    losses = [step(opt, model, x, y), step(other, twin, x, y)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert opt.last.accepted
    assert opt.last.note == other.last.note
    for name in ("mu", "predicted", "actual", "scale", "trials"):
        assert getattr(opt.last, name) == pytest.approx(getattr(other.last, name), rel=1e-7)
    assert_close(model(x).detach(), twin(x).detach(), 1e-8)


@pytest.mark.parametrize("momentum", [None, Momentum(kind="spring"), Momentum()], ids=["none", "spring", "model"])
@pytest.mark.parametrize("kind", [*OPEN, *CLOSED])
def test_weights_stay_on_their_manifolds(kind, momentum):
    if kind in CLOSED and momentum is not None and momentum.kind == "model":
        pytest.skip("refused there")
    model, x, y = curved.net()
    opt = {**OPEN, **CLOSED}[kind](model, nn.MSELoss(), momentum=momentum)
    losses = [step(opt, model, x, y) for _ in range(50)]
    assert off(model) <= 1e-12
    assert losses[-1] < 0.3 * losses[0]


def test_momentum_is_carried_into_the_new_tangent_space():
    model, x, y = curved.net()
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=FIXED, momentum=Momentum(kind="spring", decay=0.7))
    step(opt, model, x, y)
    held = manifolds_of(model)
    previous = [opt.state[p]["step"] for p in model.parameters()]
    p = torch.cat(
        [
            (s if m is None else m.project(w.detach(), s)).reshape(-1)
            for w, s in zip(model.parameters(), previous, strict=True)
            for m in [held.get(id(w))]
        ]
    )
    dense = curved.Blocks(model, x, y)
    step(opt, model, x, y)
    M = opt.last.mu * dense.G + dense.H
    shift = 0.7 * p  # minimises g.d + |Ud|^2/2 + mu/2 |d - shift|^2 over tangent d
    b = dense.E.T @ (dense.g - opt.last.mu * dense.G @ shift)
    d = -dense.E @ torch.linalg.solve(dense.E.T @ M @ dense.E, b)
    for w, expected in zip(model.parameters(), dense.moved(opt.last.scale * d), strict=True):
        assert_close(w.detach(), expected, 1e-8)


@pytest.mark.parametrize("kind", [*OPEN, *CLOSED])
@pytest.mark.parametrize("far", [1e3, float("nan")])
def test_bad_steps_are_undone_bit_for_bit(kind, far):
    class Cliff(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, _, _ = curved.net()
            self.start = self.inner[0].weight.detach().clone()

        def forward(self, x):
            z = self.inner(x)
            return z + (0.0 if torch.equal(self.inner[0].weight.detach(), self.start) else far)

    model = Cliff()
    _, x, y = curved.net()
    opt = {**OPEN, **CLOSED}[kind](model, nn.MSELoss(), damping=Damping(trials=3))
    before = [p.detach().clone() for p in model.parameters()]
    step(opt, model, x, y)
    assert not opt.last.accepted
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_an_untried_step_is_taken_back_bit_for_bit():
    model, x, y = curved.net()
    opt = pullback.LayerwiseMetric(model, nn.MSELoss(), damping=Damping(control="slope", initial=1.0))
    for _ in range(3):
        step(opt, model, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    step(opt, model, x, y)
    assert not all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    step(opt, model, x, 1e3 * y)  # a batch that judges the last step badly
    assert not opt.last.accepted
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_the_slope_test_asks_the_tangent_gradient():
    model, x, y = curved.net()
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=Damping(control="slope"))
    opt.criterion(model(x), y).backward()
    with torch.no_grad():
        slopes, held = opt._slopes(), manifolds_of(model)
    assert len(held) == 4
    for p in model.parameters():
        if id(p) in held:
            B = curved.basis(held[id(p)], p.detach())
            assert_close(slopes[id(p)].reshape(-1), B @ B.T @ p.grad.reshape(-1), 1e-10)
        else:
            assert slopes[id(p)] is p.grad


def test_float32_solves_in_float64_where_it_must():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    constrain(model, "0.weight", Stiefel(), project=True)
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=Damping(initial=1e-5))
    x = torch.randn(40, 3)
    losses = [step(opt, model, x, torch.tanh(x[:, :1])) for _ in range(40)]
    assert losses[-1] < 1e-2 * losses[0]
    assert off(model) < 1e-6
    assert model[0].weight.dtype == torch.float32


def test_several_learning_rates():
    model, x, y = curved.net()
    dense = curved.Blocks(model, x, y)
    slow = [model[0].weight, model[7].weight]
    rest = [p for p in model.parameters() if all(p is not q for q in slow)]
    groups = [{"params": slow, "lr": 0.25}, {"params": rest}]
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=FIXED, params=groups)
    step(opt, model, x, y)
    rates = [torch.full_like(p, 0.25 if any(p is q for q in slow) else 1.0).reshape(-1) for p in model.parameters()]
    d = dense.direction(opt.last.mu) * torch.cat(rates)
    for p, expected in zip(model.parameters(), dense.moved(d), strict=True):
        assert_close(p.detach(), expected, 1e-9)


# -- known problems --------------------------------------------------------------------------------------


class Power(nn.Module):
    """w -> A w for a row of A each, w on the sphere: |A w - sigma v| has its least value at the leading vector."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.w[:, None]


@pytest.mark.parametrize("make", [pullback.GaussNewton, pullback.FeedbackGaussNewton])
def test_leading_eigenvector_on_the_sphere(make):
    """sum_i (a_i . w - c)^2 ... with c = 0 and B = sigma I - A: the least eigenvector of B^T B is A's leading one."""
    torch.manual_seed(1)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)) @ Q.T
    B = 5.0 * torch.eye(6, dtype=torch.float64) - A
    model = Power(torch.randn(6, dtype=torch.float64))
    constrain(model, "w", Sphere(), project=True)
    opt = make(model, nn.MSELoss())
    for _ in range(15):
        step(opt, model, B, torch.zeros(6, 1, dtype=torch.float64))
    w = model.w.detach()
    assert float(w @ A @ w) == pytest.approx(5.0, abs=1e-12)
    assert abs(float(w @ Q[:, 0])) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("n", "p"), [(5, 2), (4, 4)])
def test_procrustes(n, p):
    """min |X W - Y|: known in closed form for square W, and for Y = X W* for any."""
    torch.manual_seed(2)
    X = torch.randn(30, n, dtype=torch.float64)
    star = torch.linalg.qr(torch.randn(n, p, dtype=torch.float64))[0]
    Y = X @ star + (0.1 * torch.randn(30, p, dtype=torch.float64) if n == p else 0.0)
    start = star + 0.5 * torch.randn(n, p, dtype=torch.float64)
    model = curved.Dense(start.T.contiguous())
    constrain(model, "weight", Orthogonal() if n == p else Stiefel(), project=True)
    opt = pullback.GaussNewton(model, nn.MSELoss())
    for _ in range(25):
        step(opt, model, X, Y)
    expected = star
    if n == p:
        U, _, Vh = torch.linalg.svd(X.T @ Y)
        expected = U @ Vh
        assert torch.linalg.det(expected) * torch.linalg.det(model.weight.detach()) > 0
    assert_close(model.weight.detach().T, expected, 1e-7)


def test_regression_of_a_positive_definite_matrix():
    """x^T A x observed, A* with a small eigenvalue: recovered, and positive definite on the way."""
    torch.manual_seed(3)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    star = Q @ torch.diag(torch.tensor([4.0, 1.0, 0.01], dtype=torch.float64)) @ Q.T
    model = curved.Quadratic()
    constrain(model, "A", PositiveDefinite())
    x = torch.randn(20, 3, dtype=torch.float64)
    truth = curved.Quadratic()
    truth.A.data.copy_((star + star.T) / 2)
    opt = pullback.GaussNewton(model, nn.MSELoss())
    for _ in range(40):
        step(opt, model, x, truth(x).detach())
        assert torch.linalg.eigvalsh(model.A.detach())[0] > 0
    assert_close(model.A.detach(), star, 1e-8)


# -- who refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        partial(pullback.Kronecker, criterion=nn.MSELoss()),
        partial(pullback.KroneckerGame, criterion=nn.MSELoss()),
        partial(pullback.OCNOpt, criterion=nn.MSELoss()),
    ],
)
def test_optimizers_that_would_leave_the_manifold_refuse(make):
    model, _, _ = curved.net()
    says = "lives on Stiefel.*take LayerwiseMetric, GaussNewton or FeedbackGaussNewton, or freeze"
    with pytest.raises(ManifoldError, match=says):
        make(model)
    for p in model.parameters():
        p.requires_grad_(id(p) not in manifolds_of(model))
    make(model, params=[p for p in model.parameters() if p.requires_grad])


def test_flows_and_bellman_refuse():
    model, x, y = curved.net()
    from pullback.flow import AdaptedFlow

    with pytest.raises(ManifoldError, match="an adapted flow does not know how to keep"):
        AdaptedFlow(model, x, y)
    with pytest.raises(ManifoldError, match="bellman does not know how to keep"):
        pullback.bellman(model, nn.MSELoss(), x, y, mu=1.0)


def test_a_declaration_after_the_optimizer_was_made_is_seen():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    nn.init.orthogonal_(layer.weight)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    opt = pullback.GaussNewton(layer, nn.MSELoss())
    constrain(layer, "weight", Orthogonal())
    step(opt, layer, x, y)
    assert off(layer) < 1e-12
    late = pullback.Kronecker(nn.Sequential(layer := nn.Linear(3, 3).double()), nn.MSELoss())
    constrain(layer, "weight", Orthogonal(), project=True)
    late.criterion(late.model(x), y).backward()
    with pytest.raises(ManifoldError, match="Kronecker does not know"):
        late.step()


def test_what_pulls_off_the_manifold_is_refused():
    model, x, y = curved.net()
    with pytest.raises(ManifoldError, match=r"'0.weight' lives on a manifold, which weight_decay=0.1 would leave"):
        pullback.GaussNewton(model, nn.MSELoss(), weight_decay=0.1)
    opt = pullback.GaussNewton(model, nn.MSELoss())
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ManifoldError, match=r"weight_decay=0\.1"):
        step(opt, model, x, y)
    held = manifolds_of(model)
    flat, bent = ([p for p in model.parameters() if (id(p) in held) == want] for want in (False, True))
    groups = [{"params": flat, "weight_decay": 0.1}, {"params": bent}]
    step(pullback.GaussNewton(model, nn.MSELoss(), params=groups), model, x, y)
    for mass, says in (
        ("marquardt", "keeps a mass for every coordinate"),
        ({"6.A": torch.ones(3, 3)}, "'6.A' has one"),
    ):
        opt = pullback.GaussNewton(model, nn.MSELoss(), mass=mass)
        with pytest.raises(ValueError, match=says):
            step(opt, model, x, y)
    model[0].weight.data.mul_(1.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ManifoldError, match=r"A parameter of '0' is not on Stiefel\(\): it lies 0.173 away"):
        step(pullback.GaussNewton(model, nn.MSELoss()), model, x, y)
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_a_constrained_stray_is_not_for_the_fallback():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(2, 2)
            self.w = nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, x):
            return self.own(x)

    model = Mixes()
    constrain(model, "w", Sphere())
    opt = pullback.GaussNewton(model, nn.MSELoss(), fallback=partial(torch.optim.SGD, lr=0.1))
    loss = opt.criterion(model(torch.randn(4, 2)), torch.zeros(4, 2)) + model.w.sum()
    loss.backward()
    with pytest.raises(ManifoldError, match="'w' lives on a manifold but can be given no rows"):
        opt.step()
