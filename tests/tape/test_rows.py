"""Oracle 1: rows of U one by one, and U^T U against the Hessian of the very criterion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import CASES, LOSSES, by_name, loss_by_name
from oracle import assert_close, dense, jacobian, linearise, loss_hessian, params_of
from pullback.metric import cell_weights, resolve


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("loss", ["mse", "cross entropy smooth"])
def test_every_row_is_the_dense_row(case, loss):
    model, args, kwargs = case.build()
    spec = loss_by_name[loss]
    z = model(*args, **kwargs).detach()
    criterion, y = spec.criterion(z.shape[1]).double(), spec.target(z)
    lin = linearise(model, criterion, [(args, kwargs, y)])
    metric = resolve(criterion, None)
    S = metric.factor(z, cell_weights(criterion, metric, z, y, len(z)), len(z), y)
    J = jacobian(model, args, kwargs)
    rows = torch.einsum("anc,ncw->anw", S, J).reshape(-1, J.shape[-1])
    assert_close(dense(model, lin.blocks), rows)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda s: s.name)
@pytest.mark.parametrize("case", ["mlp", "linear on sequences"])
def test_metric_is_the_hessian_of_the_very_loss(case, loss):
    model, args, kwargs = by_name[case].build(n=5)
    z = loss.head(model(*args, **kwargs)).detach()
    criterion, y = loss.criterion(z.shape[1]).double(), loss.target(z)
    lin = linearise(model, criterion, [(args, kwargs, y)], head=loss.head)
    raw = model(*args, **kwargs).detach()
    J = jacobian(model, args, kwargs).reshape(raw.numel(), -1)
    count = criterion(z, y).numel()

    class Headed(nn.Module):
        def forward(self, v, target):
            return criterion(loss.head(v), target) / count

    H = loss_hessian(Headed(), raw, y)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ H @ J)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_residual_generates_the_gradient(case):
    model, args, kwargs = case.build()
    lin = linearise(model, nn.CrossEntropyLoss(), [(args, kwargs, lambda z: z.argmin(1))])
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert_close(dense(model, lin.blocks).T @ lin.e0, g, 1e-9)


def test_losses_of_several_kinds_add_up():
    """Two uses of the loss, other batch sizes, one divided: rows with their true weights."""
    case = by_name["mlp"]
    model, args, kwargs = case.build(n=4)
    other = case.inputs(3)
    y, y2 = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1])

    class Quarter(nn.CrossEntropyLoss):
        """Not a criterion with another forward: the weight arrives from outside."""

    criterion = Quarter()
    lin = linearise(model, criterion, [(args, kwargs, y), (other, kwargs, y2)])
    parts = []
    for a, t in ((args, y), (other, y2)):
        z = model(*a).detach()
        J = jacobian(model, a, kwargs).reshape(z.numel(), -1)
        parts.append(J.T @ loss_hessian(criterion, z, t) @ J)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, sum(parts))
    assert lin.R == 4 + 3


@pytest.mark.parametrize("layout", ["folded", "classes second", "sequence"])
def test_sequence_outputs(layout):
    """(N, T, C) predictions in the layouts people use; positions of a sample keep rows of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    y = torch.randint(0, 3, (3, 5))
    if layout == "sequence":
        criterion, target, head = nn.MSELoss(), torch.randn(3, 5, 3, dtype=torch.float64), lambda z: z
    elif layout == "folded":
        criterion, target, head = nn.CrossEntropyLoss(), y.reshape(-1), lambda z: z.reshape(-1, 3)
    else:
        criterion, target, head = nn.CrossEntropyLoss(), y, lambda z: z.transpose(1, 2)
    lin = linearise(model, criterion, [((x,), {}, target)], head=head)
    J = jacobian(model, (x,), {}, head)
    z = head(model(x)).detach()
    H = loss_hessian(criterion, z, target)
    J = J.reshape(z.numel(), -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ H @ J)
    assert 3 * 5 * (3 if layout == "sequence" else 2) == lin.R


def test_frozen_parameters_have_no_columns():
    model, args, kwargs = by_name["mlp"].build()
    model[0].weight.requires_grad_(False)
    lin = linearise(model, nn.MSELoss(), [(args, kwargs, torch.randn(4, 2, dtype=torch.float64))])
    assert set(params_of(model)) == {"0.bias", "2.weight", "2.bias"}
    assert sum(block.n for block in lin.blocks) == 4 + 8 + 2
    J = jacobian(model, args, kwargs).reshape(8, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 8))
