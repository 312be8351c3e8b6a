"""Oracle 2: coalitions are dense block solves; who claims what is checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from cases import by_name
from oracle import assert_close, dense, linearise
from pullback import Damping


def deep():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("partition", "groups"),
    [
        ([["0.*", "4.*"]], [[0, 2], [1]]),
        ([["0.*"], ["2.*", "4.weight", "4.bias"]], [[0], [1, 2]]),
        ([["*"]], [[0, 1, 2]]),
    ],
)
def test_coalitions_are_dense_block_solves(partition, groups):
    model, x, y = deep()
    criterion = nn.CrossEntropyLoss()
    opt = pullback.LayerwiseMetric(model, criterion, partition=partition, damping=Damping(control="fixed", initial=0.5))
    before = weights(model)
    criterion(model(x), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    twin, _, _ = deep()
    lin = linearise(twin, criterion, [((x,), {}, y)])
    U = dense(twin, lin.blocks)
    ids = torch.cat([torch.full((block.n,), k) for k, block in enumerate(lin.blocks)])
    owner = torch.empty(len(g), dtype=torch.long)
    for k, group in enumerate(groups):
        owner[(ids[:, None] == torch.tensor(group)).any(1)] = k
    M = (U.T @ U) * (owner[:, None] == owner[None]) + opt.last.mu * torch.eye(len(g), dtype=U.dtype)
    d = -torch.linalg.solve(M, g)
    alpha = -(g @ d) / ((U @ d) @ (U @ d) + opt.last.mu * d @ d)
    assert_close(weights(model) - before, (alpha if len(groups) > 1 else 1.0) * d, 1e-9)
    assert len(opt.last.spaces) == len(groups)


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ([["encoder.*"]], "matches no trained parameter"),
        ([["0.weigth"]], "did you mean '0.weight'"),
        ([["0.weight"]], "move as one block but the partition divides them"),
        ([["0.*"], ["*.bias"]], "divides them"),
    ],
)
def test_partitions_that_do_not_fit(partition, words):
    model, x, y = deep()
    opt = pullback.GaussNewton(model, nn.CrossEntropyLoss(), partition=partition)
    before = weights(model)
    opt.criterion(model(x), y).backward()
    with pytest.raises(ValueError, match=words):
        opt.step()
    assert torch.equal(before, weights(model))


def test_parameters_of_another_optimizer_are_left_alone():
    model, x, y = deep()
    head = torch.optim.SGD(model[4].parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    opt = pullback.GaussNewton(model, criterion, params=model[:4].parameters())
    criterion(model(x), y).backward()
    before = model[4].weight.detach().clone()
    opt.step()
    assert torch.equal(before, model[4].weight)
    assert opt.coverage["4.weight"].status == "frozen"
    assert "not among this optimizer's params" in opt.coverage["4.weight"].why
    head.step()
    assert not torch.equal(before, model[4].weight)


def test_tied_modules_are_one_block_in_every_partition():
    model, args, kwargs = by_name["tied"].build()
    opt = pullback.LayerwiseMetric(model, nn.CrossEntropyLoss())
    opt.criterion(model(*args, **kwargs), torch.tensor([0, 1, 2, 3])).backward()
    opt.step()
    assert len(opt.last.spaces) == 2
    assert "tied embedding + linear" in opt.coverage["table.weight"].why
