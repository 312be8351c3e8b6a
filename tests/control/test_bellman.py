"""The Bellman objects: dense value functions, the minimiser they promise, and backpropagation as the first order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close

MU = 0.3


def chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


def states(model, x):
    """The inputs of the linear layers, with graph, and the prediction."""
    inputs = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(x)
        x = layer(x)
    return inputs, x


def test_first_order_is_backpropagation():
    model, x, y = chain()
    criterion = nn.MSELoss()
    stages = pullback.bellman(model, criterion, x, y, mu=MU, order=1)
    inputs, z = states(model, x)
    loss = criterion(z, y)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, [*inputs[1:], *params])
    costates, gradients = grads[:2], grads[2:]
    for stage, costate in zip(stages[1:], costates, strict=True):
        (found,) = stage.value_gradient
        assert_close(found, costate)
    by_name = dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))
    for stage in stages:
        for name, k in stage.open_loop.items():
            assert_close(k, -by_name[name] / MU)


def test_value_functions_are_what_the_modules_behind_can_reach():
    """V in front of a stage, by brute force: minimise the quadratic model over the parameters behind it."""
    model, x, y = chain()
    stages = pullback.bellman(model, nn.MSELoss(), x, y, mu=MU)
    blocks = [stage._blocks for stage in stages]
    e = torch.randn(stages[0].e0.shape, dtype=torch.float64)
    for k, stage in enumerate(stages):
        U = torch.cat([block.dense() for own in blocks[k:] for block in own], 1)
        residual = stage.e0 + e
        A = torch.eye(U.shape[1], dtype=U.dtype) * MU + U.T @ U
        d = -torch.linalg.solve(A, U.T @ residual)
        reached = 0.5 * (residual + U @ d).square().sum() + 0.5 * MU * d.square().sum()
        assert stage.value(e) == pytest.approx(float(reached), rel=1e-10)


def test_gains_answer_to_a_deviation_of_the_input():
    model, x, y = chain()
    stages = pullback.bellman(model, nn.MSELoss(), x, y, mu=MU)
    stage = stages[1]
    (inside,) = stage.state
    assert_close(inside, torch.tanh(model[0](x)).detach())
    dx = torch.randn_like(inside)
    e = stage.deviation([dx])
    U = torch.cat([block.dense() for own in stages[1:] for block in own._blocks], 1)
    A = torch.eye(U.shape[1], dtype=U.dtype) * MU + U.T @ U
    both = -torch.linalg.solve(A, U.T @ torch.stack([stage.e0, e], 1))
    own = sum(block.n for block in stage._blocks)
    assert_close(torch.cat([k.reshape(-1) for k in stage.open_loop.values()]), both[:own, 0])
    assert_close(torch.cat([k.reshape(-1) for k in stage.feedback([dx]).values()]), both[:own, 1])
    (curved,) = stage.value_curvature([dx])
    assert float((curved * dx).sum()) == pytest.approx(float(e @ (stage.gamma @ e)), rel=1e-10)
    with pytest.raises(ValueError, match=r"shape \(6, 3\), the tensor \(6, 4\)"):
        stage.feedback([dx[:, :3]])


def test_nothing_is_left_behind():
    model, x, y = chain()
    weights = [p.clone() for p in model.parameters()]
    pullback.bellman(model, nn.MSELoss(), x, y, mu=MU)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mu": 0.0}, "mu must be positive"),
        ({"mu": 1.0, "order": 3}, "order must be 1"),
        ({"mu": 1.0, "metric": pullback.Sampled(m=1)}, "give an exact metric"),
    ],
)
def test_bad_options(options, words):
    model, x, y = chain()
    with pytest.raises(ValueError, match=words):
        pullback.bellman(model, nn.MSELoss(), x, y, **options)
