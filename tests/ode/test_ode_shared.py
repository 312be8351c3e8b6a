"""A weight in the field that is also one outside, and EKFAC: rows, directions and steps against dense twins."""

from __future__ import annotations

import copy

import pytest
import torch
from fields import TIGHT, build
from torch import nn
from torch.func import functional_call, jacrev

import pullback
from oracle import assert_close, dense, linearise
from pullback.curvature.eigen import EigenBlock
from pullback.errors import CoverageError
from pullback.ode import ODEBlock


class Inside(nn.Module):
    """A field of a layer of its own and one that is somebody else's too."""

    def __init__(self, shared: nn.Linear, by_hand: bool = False) -> None:
        super().__init__()
        self.shared, self.own, self.by_hand = shared, nn.Linear(2, 2), by_hand

    def forward(self, t, x):
        x = nn.functional.linear(x, self.shared.weight) if self.by_hand else self.shared(x)
        return self.own(torch.tanh(x)) * (1 + t)


class Both(nn.Module):
    """A layer that is in the field, in front of the block, and perhaps behind it."""

    def __init__(self, behind: bool, by_hand: bool, options: dict) -> None:
        super().__init__()
        self.shared, self.behind, self.last = nn.Linear(2, 2), behind, nn.Linear(2, 2)
        self.block = ODEBlock(Inside(self.shared, by_hand), **options)

    def forward(self, x):
        x = self.block(torch.sin(self.shared(x)))
        return self.last(self.shared(x) if self.behind else x)


def shared(behind=False, by_hand=False, **options):
    torch.manual_seed(0)
    model = Both(behind, by_hand, options).double()
    return model, torch.randn(4, 2).double(), torch.randn(4, 2).double()


def jacobian(model, x):
    """dz/dw through the solver's steps, by name, (numbers of z, *shape); by torch.func where torchdiffeq lets it."""
    twin = copy.deepcopy(model)
    block = next(module for module in twin.modules() if isinstance(module, ODEBlock))
    block.flow.adjoint = False
    if block.flow.solver.method == "rk4":
        params = {name: p.detach() for name, p in twin.named_parameters()}
        return jacrev(lambda p: functional_call(twin, p, (x,)).flatten())(params)
    params = dict(twin.named_parameters())
    rows = [torch.autograd.grad(z, list(params.values()), retain_graph=True) for z in twin(x).flatten()]
    return {name: torch.stack(own) for name, own in zip(params, zip(*rows, strict=True), strict=True)}


def flat(J):
    return torch.cat([own.flatten(1) for own in J.values()], 1)


RK4 = {"solver": "rk4", "step": 0.25, "adjoint": False}
UNROLLED = [{**TIGHT, "adjoint": False}, RK4]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("options", UNROLLED)
def test_rows_of_a_layer_inside_and_outside(options, behind):
    model, x, y = shared(behind, **options)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)])
    U = dense(model, lin.blocks)
    J = flat(jacobian(model, x)) * (2 / y.numel()) ** 0.5
    assert_close(U.T @ U, J.T @ J, 1e-10)
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close(U.T @ lin.e0, g, 1e-10)
    assert float(g[:6].abs().max()) > 1e-3  # of the shared layer


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_with_the_adjoint_it_has_rows_of_the_whole_model(behind, by_hand):
    """Sample by sample, since no call of a layer shows both places: slow, and right where tolerances are tight."""
    model, x, y = shared(behind, by_hand, **TIGHT)
    nn.MSELoss()(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    J, residual = flat(jacobian(model, x)), (model(x) - y).flatten().detach()
    assert_close(g, J.T @ residual * (2 / y.numel()), 1e-8)
    model.zero_grad()
    criterion = nn.MSELoss()
    lin = linearise(model, criterion, [((x,), {}, lambda z: y)])
    U, J = dense(model, lin.blocks), flat(jacobian(model, x))
    H = J.T @ J * (2 / y.numel())
    assert_close(U.T @ U, H, 1e-8)
    model, x, y = shared(behind, by_hand, rtol=1e-3, atol=1e-4)
    _ = pullback.GaussNewton(model, criterion)
    with pytest.raises(CoverageError, match=r"rows of 'shared\.(weight|bias)' do not reproduce its gradient"):
        criterion(model(x), y).backward()


@pytest.mark.parametrize("form", ["kfac", "ekfac"])
def test_a_shared_layer_trains(form):
    model, _, _ = shared(adjoint=False, rtol=1e-3, atol=1e-4)
    x = torch.randn(32, 2).double()
    y = torch.tanh(x)
    criterion = nn.MSELoss()
    opt = pullback.Kronecker(model, criterion, form=form)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("options", "tolerance"), [(TIGHT, 1e-8), *((own, 1e-10) for own in UNROLLED)])
def test_ekfac_against_its_dense_twin(options, tolerance):
    """Every row by the dense Jacobian, rotated, squared and summed; then the damped step."""
    model, x, y = build("chain", n=5, **options)
    field = model[1].func
    J = {name: own * (2 / y.numel()) ** 0.5 for name, own in jacobian(model, x).items()}
    criterion, damping = nn.MSELoss(), 0.1
    opt = pullback.Kronecker(model, criterion, form="ekfac", columns="exact", damping=damping, trust=None, momentum=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    criterion(model(x), y).backward()
    opt.step()
    for layer, name in ((field.a, "1.flow.func.a"), (field.b, "1.flow.func.b"), (model[2], "2")):
        block = next(b for b in opt.blocks if b.params[0] is layer.weight)
        assert isinstance(block, EigenBlock)
        P, Q = (basis[0] for basis in block.bases)
        for basis, side in ((P, block.left), (Q, block.right)):
            inside = basis.T @ side.C[0] @ basis
            assert_close(inside, inside.diagonal().diag(), 1e-10)
        rows = torch.cat([J[f"{name}.weight"], J[f"{name}.bias"].unsqueeze(2)], 2)
        D = torch.einsum("po,rpq,qi->roi", P, rows, Q).square().sum(0)
        assert_close(block.D[0], D, tolerance)
        G = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        step = P @ (P.T @ G @ Q / (D + damping * D.mean())) @ Q.T
        moved = [before[f"{name}.weight"] - layer.weight, before[f"{name}.bias"] - layer.bias]
        assert_close(torch.cat([moved[0], moved[1][:, None]], 1).detach(), step, 10 * tolerance)


class Twice(nn.Module):
    """One block at two places of the model, called twice."""

    def __init__(self) -> None:
        super().__init__()
        block = ODEBlock(Inside(nn.Linear(2, 2)), rtol=1e-4, atol=1e-5)
        self.first, self.second = nn.Sequential(nn.Linear(2, 2), block), nn.Sequential(block, nn.Linear(2, 2))

    def forward(self, x):
        return self.second(torch.sin(self.first(x)))


def test_a_block_at_two_places_has_its_own_rows():
    torch.manual_seed(0)
    model, criterion = Twice().double(), nn.MSELoss()
    x, y = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    opt = pullback.GaussNewton(model, criterion)
    criterion(model(x), y).backward()
    opt.step()
    assert {treated.rule for treated in opt._treated} == {"linear", "ODE (Inside)"}
