from __future__ import annotations

import math

import pytest
import torch

import pullback
from pullback.metric import cell_weights, resolve
from pullback.ode import ODEBlock
from pullback.problems import load_problem
from pullback.problems.cnf import FlowField, FlowNLL, NormalizingFlow, WithDivergence, likelihood


def flow(trace: str = "exact", tolerance: float = 1e-9) -> NormalizingFlow:
    torch.manual_seed(0)
    field = FlowField(2, 6, 2).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(3)
    block = ODEBlock(WithDivergence(field, 2), rtol=tolerance, atol=tolerance / 10)
    return NormalizingFlow(block, trace == "hutchinson").double()


def points(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_delta_is_the_logarithm_of_the_volume() -> None:
    model, x = flow(), points()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: solved(model, row)))(x)
    out = model(x)
    torch.testing.assert_close(out[:, 2], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-6)
    torch.testing.assert_close(out[:, :2], torch.stack([solved(model, row) for row in x]), rtol=0, atol=1e-6)


def solved(model: NormalizingFlow, row: torch.Tensor, steps: int = 60) -> torch.Tensor:
    """z(1) of one point by Runge and Kutta's method, without a library."""
    z, h = row, 1 / steps

    def f(t: float, z: torch.Tensor) -> torch.Tensor:
        state = torch.cat([z, torch.zeros_like(z[:1])])[None]
        out: torch.Tensor = model.block.func(torch.tensor(t, dtype=z.dtype), state)
        return out[0, :2]

    for k in range(steps):
        t = k * h
        a = f(t, z)
        b = f(t + h / 2, z + h / 2 * a)
        c = f(t + h / 2, z + h / 2 * b)
        z = z + h / 6 * (a + 2 * b + 2 * c + f(t + h, z + h * c))
    return z


def test_the_trace_is_that_of_the_jacobian_and_hutchinsons_its_mean() -> None:
    model, x = flow(), points(3)
    func, t = model.block.func, torch.tensor(0.4, dtype=torch.float64)
    field = func.field
    assert isinstance(field, FlowField)
    none = torch.zeros(1, 0, 2, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: field(t, row[None], none)[0][0]))(x)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    state = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    torch.testing.assert_close(func(t, state)[:, 2], trace, rtol=1e-10, atol=1e-10)
    signs = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    both = [func(t, torch.cat([x, s.expand(3, 2), torch.zeros_like(x[:, :1])], 1)) for s in signs]
    torch.testing.assert_close((both[0][:, -1] + both[1][:, -1]) / 2, trace, rtol=1e-10, atol=1e-10)
    assert all(not each[:, 2:4].any() for each in both)


def test_training_draws_signs_and_evaluation_does_not() -> None:
    model, x = flow("hutchinson", 1e-5), points()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), flow("exact", 1e-5)(x))


def test_the_likelihood_of_an_affine_flow_is_known() -> None:
    x = points(7)
    outputs = torch.cat([2 * x + 1, torch.full((7, 1), 2 * math.log(2), dtype=torch.float64)], 1)
    normal = torch.distributions.Normal(-0.5, 0.5)
    torch.testing.assert_close(likelihood(outputs), normal.log_prob(x).sum(1))
    assert FlowNLL()(outputs, x).item() == pytest.approx(-normal.log_prob(x).sum(1).mean().item())


def test_the_metric_is_the_hessian_in_z_and_the_volumes() -> None:
    criterion, outputs = FlowNLL(), torch.randn(4, 3, dtype=torch.float64)
    metric = resolve(criterion, None)
    S = metric.factor(outputs, cell_weights(criterion, metric, outputs, outputs, samples=4), samples=4)
    found = torch.einsum("ano,anp->nop", S, S)
    whole = torch.autograd.functional.hessian(lambda o: criterion(o, o), outputs)
    hessian = whole[torch.arange(4), :, torch.arange(4)]
    volumes = torch.diag(torch.tensor([0.0, 0, 1], dtype=torch.float64)) / 4
    torch.testing.assert_close(found, hessian + volumes, rtol=1e-12, atol=1e-12)


def test_in_one_dimension_the_metric_of_a_linear_flow_is_the_hessian_in_the_weight() -> None:
    # z = a x, delta = log a: the Gauss-Newton matrix under the metric, and the Hessian of the mean loss at its least.
    x = points(50)[:, :1]
    a = x.square().mean().rsqrt().requires_grad_()
    loss = (0.5 * (a * x).square() - a.log()).mean()
    (slope,) = torch.autograd.grad(loss, a, create_graph=True)
    (hessian,) = torch.autograd.grad(slope, a)
    assert slope.item() == pytest.approx(0, abs=1e-12)
    gauss_newton = x.square().mean() + 1 / a.detach() ** 2
    assert hessian.item() == pytest.approx(gauss_newton.item(), rel=1e-12)


def test_rows_explain_the_gradient_of_a_flow() -> None:
    problem = load_problem("circles:points=12,width=4,depth=1,tolerance=1e-7")
    model, criterion = problem.build_model(0), FlowNLL()
    optimizer = pullback.GaussNewton(model, criterion)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = criterion(model(problem.train[0]), problem.train[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.last is not None
    assert optimizer.last.rank == 36
