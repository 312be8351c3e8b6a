"""Norms and Grams of chains of linear layers beside the gradients themselves; and what is no chain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oracle import assert_close
from pullback.stability import Objective, output_lipschitz
from pullback.stability.norms import chain_grams, chain_norms, is_chain

f64 = torch.float64


def chain(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5, bias=bias), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [True, False])
def test_norms_and_grams_beside_gradients_and_jacobians(bias: bool, classes: bool) -> None:
    model, x = chain(bias), torch.randn(6, 3, dtype=f64)
    criterion: nn.Module = nn.CrossEntropyLoss() if classes else nn.HuberLoss()
    y = torch.randint(4, (6,)) if classes else torch.randn(6, 4, dtype=f64)
    assert is_chain(model, x)
    objective = Objective(model, criterion, decay=0.3)
    theta = objective.get() + 0.1 * torch.randn(objective.size, dtype=f64)
    norms = torch.linalg.vector_norm(objective.gradients(theta, (x, y)), dim=1)
    assert_close(objective.gradient_norms(theta, (x, y)), norms)
    assert_close(chain_norms(objective.moved(theta), criterion, x, y), norms)

    grams = []
    for k in range(6):
        z = objective.moved(theta)(x[k : k + 1])[0]
        params = list(objective.model.parameters())
        rows = [torch.autograd.grad(one, params, retain_graph=True) for one in z]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        grams.append(J @ J.T)
    assert_close(chain_grams(objective.moved(theta), x), torch.stack(grams))
    largest = max(float(torch.linalg.matrix_norm(G, 2)) for G in grams) ** 0.5
    assert output_lipschitz(objective, theta, x) == pytest.approx(largest, rel=1e-10)


def test_what_is_no_chain() -> None:
    x = torch.randn(6, 3, dtype=f64)

    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = 2 * super().forward(x)
            return out

    shared = nn.Linear(3, 3).double()
    frozen = chain()
    frozen[0].weight.requires_grad_(False)
    hooked = chain()
    hooked[1].register_forward_hook(lambda module, args, out: 2 * out)
    for model in (
        Twice(nn.Linear(3, 2)),
        nn.Sequential(shared, nn.Tanh(), shared),
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)),
        frozen,
        hooked,
        nn.Linear(3, 2),
    ):
        assert not is_chain(model, x)
    assert not is_chain(chain(), torch.randn(6, 2, 3, dtype=f64))
