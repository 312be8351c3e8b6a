"""Others' code on the same problem: curvlinops for U^T U, SciPy for the minimum of a fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from cases import by_name
from oracle import assert_close, columns, linearise

LOSSES = {"mse": (nn.MSELoss, torch.sin), "cross entropy": (nn.CrossEntropyLoss, lambda z: z.argmin(1))}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_products_with_the_metric_are_those_of_curvlinops(case, loss, reduction):
    reference = pytest.importorskip("curvlinops")
    model, (x,), _ = by_name[case].build(n=6)
    make, target = LOSSES[loss]
    criterion, y = make(reduction=reduction).double(), target(model(x).detach())
    lin = linearise(model, criterion, [((x,), {}, y)])
    G = reference.GGNLinearOperator(model, criterion, list(model.parameters()), [(x, y)], check_deterministic=False)
    where = columns(model, lin.blocks)
    for seed in range(3):
        v = torch.randn(len(where), dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        parts = v[where].split([block.n for block in lin.blocks])
        Uv = sum(block.matvec(part) for block, part in zip(lin.blocks, parts, strict=True))
        ours = torch.empty_like(v)
        ours[where] = torch.cat([block.rmatvec(Uv) for block in lin.blocks])
        assert_close(ours, G @ v, 1e-10)


class Decay(nn.Module):
    """a exp(-b x) + c, three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.w
        return a * torch.exp(-b * x) + c


@pytest.mark.parametrize("method", ["lm", "trf"])
def test_a_fit_ends_where_scipy_ends(method):
    optimize = pytest.importorskip("scipy.optimize")
    x = torch.linspace(0, 4, 40, dtype=torch.float64)[:, None]
    y = 2.5 * torch.exp(-1.3 * x) + 0.5 + 0.05 * torch.randn_like(x)
    model, criterion = Decay(), nn.MSELoss(reduction="sum")
    start = model.w.detach().clone()
    opt = pullback.GaussNewton(model, criterion)
    for _ in range(60):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()

    def residuals(w):
        with torch.no_grad():
            a, b, c = torch.from_numpy(w)
            return (a * torch.exp(-b * x) + c - y)[:, 0].numpy()

    found = optimize.least_squares(residuals, start.numpy(), method=method, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert loss.item() == pytest.approx(2 * found.cost, rel=1e-10)
    assert_close(model.w.detach(), torch.from_numpy(found.x), 1e-6)
