"""Metrics with something given beside the prediction: precisions, variances, rates."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_metrics import gram
from torch import nn

import pullback
from oracle import assert_close, loss_hessian
from pullback.metric import Gaussian, Huber, Poisson, Sampled, cell_weights, resolve


def precision(kind: str, d: int) -> torch.Tensor:
    A = torch.randn(d, d, dtype=torch.float64)
    return A.diagonal().square() + 0.1 if kind == "diagonal" else A @ A.T + 0.1 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["diagonal", "matrix"])
@pytest.mark.parametrize(("shape", "samples"), [((4, 3), 4), ((4, 2, 3), 4), ((8, 3), 4), ((4, 2, 2, 3), 2)])
def test_gaussian_with_a_precision(kind, shape, samples):
    z = torch.randn(shape, dtype=torch.float64)
    y = torch.randn_like(z)
    P = precision(kind, 3)
    full = torch.diag(P) if kind == "diagonal" else P

    class Quadratic(nn.Module):
        def forward(self, z, y):
            return 0.3 * 0.5 * torch.einsum("...i,ij,...j->...", z - y, full, z - y).sum()

    metric = Gaussian(P, scale=0.3, reduction="sum")
    weight = metric.default_weight(z, samples)
    S = metric.factor(z, weight, samples)
    H = loss_hessian(Quadratic(), z, y)
    # Positions of one sample have rows of their own: the sum over samples is exact either way.
    assert_close(gram(S) if samples == len(z) else gram(S.reshape(len(S), samples, -1)), H)
    (costate,) = torch.autograd.grad(Quadratic()(z.requires_grad_(), y), z)
    z = z.detach()
    e0 = metric.coordinates(z, weight, costate, samples)
    back = torch.einsum("anc,an->nc", S.reshape(len(S), samples, -1), e0)
    assert_close(back, costate.reshape(samples, -1))


@pytest.mark.parametrize("kind", ["diagonal", "matrix"])
def test_a_precision_overrides_the_metric_of_a_criterion(kind):
    z, y, P = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), precision(kind, 3)
    criterion, metric = nn.MSELoss(), Gaussian(P)
    weight = cell_weights(criterion, metric, z, y, 5)
    full = torch.diag(P) if kind == "diagonal" else P
    expected = 2 / 15 * torch.block_diag(*[full] * 5)
    assert_close(gram(metric.factor(z, weight, 5)), expected)
    half = weight * torch.tensor([1.0, 0, 1, 1, 1], dtype=torch.float64)[:, None]
    assert_close(gram(metric.factor(z, half, 5))[:3], expected[:3])
    assert torch.isfinite(metric.coordinates(z, half, y, 5)).all()
    many = gram(Sampled(metric, 20_000).factor(z, weight, 5))
    assert float((many - expected).abs().max()) < 0.05 * float(expected.max())
    assert repr(metric) == f"Gaussian(precision of shape {tuple(P.shape)})"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (4,), None])
@pytest.mark.parametrize("keyword", [True, False])
def test_gaussian_nll_weighs_by_the_variance(reduction, shape, keyword):
    torch.manual_seed(1)
    model = nn.Linear(2, 3).double()
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    var = 0.5 if shape is None else torch.rand(shape, dtype=torch.float64)
    criterion = nn.GaussianNLLLoss(reduction=reduction, eps=0.1, full=True)

    class With(nn.Module):
        def forward(self, z, y):
            return criterion(z, y, var)

    tape = pullback.tape.Tape(model, criterion, None, "loop")
    value = criterion(model(x), target=y, var=var) if keyword else criterion(model(x), y, var)
    upstream = torch.rand_like(value)
    (upstream * value).sum().backward()
    (term,) = tape.terms
    tape.close()
    z = model(x).detach()
    weight = cell_weights(criterion, Gaussian(), z, y, 4, (var,)) * upstream
    assert_close(gram(Gaussian().factor(z, weight, 4)), loss_hessian(With(), z, y, upstream))
    (rows,) = [unit.rows(term.factors[id(model)], 4) for unit in term.plan.units]
    assert_close(rows.rmatvec(term.e0), torch.cat([p.grad.reshape(-1) for p in model.parameters()]))


def test_a_variance_that_is_trained_is_refused():
    model, criterion = nn.Linear(2, 3), nn.GaussianNLLLoss()
    opt = pullback.GaussNewton(model, criterion)
    var = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(pullback.MetricError, match="A predicted variance belongs into the prediction"):
        criterion(model(torch.randn(4, 2)), torch.zeros(4, 3), var)
    opt.close()
    with pytest.raises(pullback.MetricError, match="would broadcast the predictions"):
        cell_weights(criterion, Gaussian(), torch.zeros(4, 1), torch.zeros(4, 1), 4, (torch.ones(4, 3),))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_poisson_rates_have_the_hessian_at_the_expected_count(reduction):
    z = torch.rand(4, 3, dtype=torch.float64) + 0.1
    criterion = nn.PoissonNLLLoss(log_input=False, eps=1e-3, reduction=reduction)
    metric, y = resolve(criterion, None), z + 1e-3
    weight = cell_weights(criterion, metric, z, y, 4)
    assert_close(gram(metric.factor(z, weight, 4)), loss_hessian(criterion, z, y))
    assert repr(metric) == "Poisson(log_input=False)"
    with pytest.raises(pullback.MetricError, match=r"predicted rate of -0\.1"):
        metric.factor(torch.full((2, 2), -0.1), weight, 2)


def test_poisson_and_huber_train():
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    for criterion, y in (
        (nn.PoissonNLLLoss(), torch.poisson((x.sum(1, keepdim=True)).exp())),
        (nn.HuberLoss(delta=0.2), torch.sin(x.sum(1, keepdim=True))),
    ):
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        opt = pullback.GaussNewton(model, criterion)
        losses = []
        for _ in range(15):
            opt.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05
        assert all(b <= a + 1e-6 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gaussian(torch.tensor([1.0, 0.0])), "must be positive"),
        (lambda: Gaussian(torch.ones(2, 2, 2)), r"shape \(d,\) or \(d, d\)"),
        (lambda: Gaussian(torch.ones(2, dtype=torch.long)), "floating"),
        (lambda: Gaussian(torch.ones(2, 2)), "symmetric and positive definite"),
        (lambda: Gaussian(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric and positive definite"),
        (lambda: Gaussian(torch.ones(2)).variance(torch.zeros(4, 3)), "agree along the prediction's last axis"),
        (lambda: Gaussian(torch.eye(2)).factor(torch.zeros(4, 2), torch.rand(4, 2), 4), "weighs outputs differently"),
        (lambda: Huber(0.0), "delta must be positive"),
        (lambda: Huber().variance(torch.zeros(2, 3)), "use nn.HuberLoss as the criterion"),
        (lambda: resolve(nn.SmoothL1Loss(beta=0.0), None), "beta=0 is L1Loss"),
        (lambda: Poisson(scale=0.0), "scale must be positive"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(pullback.MetricError, match=words):
        make()
