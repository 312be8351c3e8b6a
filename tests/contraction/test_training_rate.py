"""Rates of training systems beside dense Hessians by torch.func, in every metric; what they cost."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import oracle
from pullback import MetricError
from pullback.contraction import ContractionError, training_rate
from pullback.contraction.hessian import System

f64 = torch.float64


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, dtype=f64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def case(kind: str, *, trained: int = 0) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(40, 4, dtype=f64)
    if kind == "regression":
        model, criterion, y = net(4, 7, 5, 2), nn.MSELoss(), torch.sin(2 * x[:, :2])
    else:
        model, criterion, y = net(4, 9, 3), nn.CrossEntropyLoss(), (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(trained):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return model, criterion, x, y


def dense_hessian(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """In the order of named_parameters."""
    params = oracle.params_of(model)
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        own = {k: v.view(s) for k, v, s in zip(params, flat.split(sizes), shapes, strict=True)}
        value: Tensor = criterion(functional_call(model, own, (x,)), y)
        return value

    H: Tensor = jacrev(jacrev(loss))(torch.cat([p.reshape(-1) for p in params.values()]).detach())
    return H


def metric_of(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, mass: Any, mu: float | None) -> Tensor:
    """M, dense: Jacobians by torch.func and the criterion's Hessian."""
    J = oracle.jacobian(model, (x,), {}).flatten(0, -2)
    z = model(x).detach()
    G = J.T @ oracle.loss_hessian(criterion, z, y) @ J
    masses = {
        name: torch.as_tensor(1.0 if mass == "identity" else mass.get(name, 1.0))
        for name, _ in model.named_parameters()
    }
    D = torch.diag(
        torch.cat([masses[name].double().expand(p.shape).reshape(-1) for name, p in model.named_parameters()])
    )
    return D if mu is None else mu * D + G


MASS = {"0.weight": 3.0, "2.bias": 0.2}


@pytest.mark.parametrize("pulled", [None, 0.05])
@pytest.mark.parametrize("mass", ["identity", MASS], ids=["identity", "mass"])
@pytest.mark.parametrize("trained", [0, 300])
@pytest.mark.parametrize("kind", ["regression", "classes"])
def test_rates_are_the_smallest_eigenvalue(kind: str, trained: int, mass: Any, pulled: float | None) -> None:
    model, criterion, x, y = case(kind, trained=trained)
    M = metric_of(model, criterion, x, y, mass, pulled)
    H = dense_hessian(model, criterion, x, y)
    values = torch.linalg.eigvals(torch.linalg.solve(M, H)).real
    least, norm = float(values.min()), float(values.abs().max())
    options: dict[str, Any] = {"mass": mass, "pulled": pulled}
    dense = training_rate(model, criterion, x, y, method="dense", **options)
    assert dense.value == pytest.approx(least, rel=1e-8, abs=1e-9 * norm)
    assert dense.proved
    for method in ("davidson", "lanczos"):
        found = training_rate(model, criterion, x, y, method=method, evaluations=400, **options)
        assert found.converged, method
        assert not found.proved
        assert abs(found.upper - least) <= 1e-6 * norm, method
        assert found.value <= least + 1e-12 * norm  # never rounded up
        assert found.lower <= least


def test_evaluations_are_counted_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, x, y = case("regression", trained=300)
    made = {"product": 0, "difference": 0}
    for name in made:
        method = getattr(System, name)

        def counted(self: System, v: Tensor, name: str = name, method: Any = method) -> Tensor:
            made[name] += 1
            out: Tensor = method(self, v)
            return out

        monkeypatch.setattr(System, name, counted)
    found = training_rate(model, criterion, x, y)
    assert found.converged
    assert made["product"] == 1
    assert found.products == sum(made.values())
    # A gradient and two columns; the gradients nearby; a graph and one exact product.
    assert found.evaluations == 1 + 2 + made["difference"] + 1 + 2 < 50
    plain = training_rate(model, criterion, x, y, method="lanczos", evaluations=400)
    assert plain.evaluations == 1 + 2 + 1 + 2 * plain.products
    assert found.products < 0.7 * plain.products


def test_where_differences_mislead_exact_products_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With differences that are wrong by a tenth the answer is the same, it only costs more."""
    model, criterion, x, y = case("regression", trained=300)
    least = training_rate(model, criterion, x, y, method="dense").value
    first = training_rate(model, criterion, x, y)
    method = System.difference
    monkeypatch.setattr(System, "difference", lambda self, v: method(self, v) * (1 + 0.1 * torch.sin(1e3 * v)))
    found = training_rate(model, criterion, x, y, evaluations=400)
    assert found.converged
    assert found.upper == pytest.approx(least, abs=1e-6)
    assert found.evaluations > first.evaluations


def test_single_precision_takes_exact_products() -> None:
    model, criterion, x, y = case("regression", trained=300)
    least = training_rate(model, criterion, x, y, method="dense").value
    found = training_rate(model.float(), criterion, x.float(), y.float(), tol=1e-4)
    assert found.converged
    assert found.evaluations == 1 + 2 + 1 + 2 * found.products
    assert found.upper == pytest.approx(least, abs=2e-3)


def test_a_neighbour_is_a_start() -> None:
    model, criterion, x, y = case("regression", trained=100)
    first = training_rate(model, criterion, x, y)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    criterion(model(x), y).backward()
    optimizer.step()
    cold, warm = training_rate(model, criterion, x, y), training_rate(model, criterion, x, y, start=first.vectors)
    assert warm.products < cold.products
    assert warm.upper == pytest.approx(cold.upper, abs=1e-5)
    with pytest.raises(ContractionError, match=r"The start has shape \(3, 1\); 87 parameters need \(87, k\)"):
        training_rate(model, criterion, x, y, start=torch.ones(3, 1))


def test_a_budget_that_does_not_suffice_is_unproved() -> None:
    model, criterion, x, y = case("classes")
    short = training_rate(model, criterion, x, y, evaluations=20)
    least = training_rate(model, criterion, x, y, method="dense").value
    assert not short.converged
    assert short.evaluations <= 20
    assert short.upper >= least - 1e-12
    assert short.lower == -math.inf
    assert short.confidence is None
    assert "UNPROVED, not converged" in str(short)
    with pytest.raises(ContractionError, match="leaves no product with the Hessian"):
        training_rate(model, criterion, x, y, evaluations=4)


def test_a_linear_model_has_the_rate_of_its_features() -> None:
    """Least squares: H = 2/N X^T X in the weights, whose smallest eigenvalue is the rate."""
    torch.manual_seed(0)
    x, model = torch.randn(50, 3, dtype=f64), nn.Linear(3, 1, bias=False).double()
    y = torch.randn(50, 1, dtype=f64)
    known = float(torch.linalg.eigvalsh(2 / 50 * x.T @ x)[0])
    found = training_rate(model, nn.MSELoss(), x, y)
    assert found.value == pytest.approx(known, rel=1e-8)
    own = training_rate(model, nn.MSELoss(), x, y, pulled=1e-3)
    assert own.value == pytest.approx(known / (known + 1e-3), rel=1e-8)
    assert float(training_rate(model, nn.MSELoss(), x, y, mass={"weight": 4.0}).value) == pytest.approx(
        known / 4, rel=1e-8
    )


def test_what_is_refused() -> None:
    model, criterion, x, y = case("regression")
    with pytest.raises(ContractionError, match="not positive definite in general"):
        training_rate(model, criterion, x, y, pulled=0.0)
    with pytest.raises(ValueError, match="method must be"):
        training_rate(model, criterion, x, y, method="qr")
    with pytest.raises(ContractionError, match="not finite"):
        training_rate(model, criterion, x * torch.nan, y)
    with pytest.raises(MetricError, match="No metric is known for"):
        training_rate(model, nn.HingeEmbeddingLoss(), x, y)
    assert not model._forward_hooks
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ContractionError, match="nothing to move"):
        training_rate(model, criterion, x, y)


@pytest.mark.parametrize("kind", ["regression", "classes"])
@pytest.mark.parametrize("pulled", [None, 0.05])
def test_what_davidson_is_given(kind: str, pulled: float | None) -> None:
    """Differences beside exact products, and solves beside dense ones, on both sides of U."""
    model, criterion, x, y = case(kind, trained=50)
    x, y = torch.cat([x, x + 1]), torch.cat([y, y])
    for rows in (6, 80):
        system = System(model, criterion, x[:rows], y[:rows], MASS, pulled)
        known = system.known
        assert known.dual == (rows == 6)
        v = torch.randn(known.n, dtype=f64)
        oracle.assert_close(system.difference(v), system.product(v), 1e-5)
        U = torch.stack([known.matvec(row) for row in torch.eye(known.n, dtype=f64)], 1)
        eye = torch.eye(known.n, dtype=f64)
        M = eye if pulled is None else pulled * eye + U.T @ U
        oracle.assert_close(known.metric(v), M @ v)
        oracle.assert_close(known.solve_metric(v), torch.linalg.solve(M, v))
        oracle.assert_close(known.half_solve(known.half_solve(v)), torch.linalg.solve(M, v))
        wanted = torch.linalg.solve(U.T @ U + 0.7 * M + 0.2 * eye, v)
        given = known.precondition(v, -0.7, 0.2)
        # Up to a factor.
        oracle.assert_close(given / given.norm(), wanted / wanted.norm(), 1e-9)
