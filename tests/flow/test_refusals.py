"""What is refused, in words, with the weights as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pullback.flow import AdaptedFlow, CrossEntropy, FlowError, Squared, flow

f64 = torch.float64


def small(dtype: torch.dtype = f64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)).to(dtype)
    return model, torch.randn(4, 3, dtype=dtype), torch.randn(4, 1, dtype=dtype)


def refused(said: str, *arguments: object, **options: object) -> None:
    model = arguments[0]
    assert isinstance(model, nn.Module)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FlowError, match=said):
        flow(*arguments, **options)  # type: ignore[arg-type]
    assert all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    assert not model._forward_hooks


def test_contradictory_duplicates_with_the_reachable_minimum() -> None:
    model, x, y = small()
    x[2] = x[0]
    y[0], y[2] = 1.0, 3.0
    # Mean 2: two residuals of one, c = 1/8.
    refused(r"Samples 0 and 2 have the same input.*C = 0\.25\. Average or drop", model, x, y, 1e-6)
    run = flow(model, x, y, regime="any-rank")
    assert run.cost == pytest.approx(0.25, rel=1e-6)
    assert run.stopping_time is None
    y[2] = 1.0
    prepared = AdaptedFlow(model, x, y)
    assert "1 inputs are repeated with equal targets" in prepared.notes[0]
    with pytest.raises(FlowError, match="promises no stopping time"):
        prepared.stopping_time(1e-6)
    prepared.close()


def test_zero_residual() -> None:
    model, x, _ = small()
    refused("The residual is zero at the start", model, x, model(x).detach(), 1e-6)


@pytest.mark.parametrize("where", ["input", "target", "weight"])
def test_values_that_are_not_finite(where: str) -> None:
    model, x, y = small()
    if where == "input":
        x[1, 1] = torch.nan
        refused("1 of 12 input numbers are not finite", model, x, y, 1e-6)
    elif where == "target":
        y[1] = torch.inf
        refused("Targets must be floating and finite", model, x, y, 1e-6)
    else:
        with torch.no_grad():
            model[2].bias.fill_(torch.inf)  # type: ignore[index, union-attr]
        refused("outputs are not finite", model, x, y, 1e-6)


@pytest.mark.parametrize(("dtype", "eps"), [(f64, 1e-32), (torch.float32, 1e-14)])
def test_eps_below_what_the_numbers_resolve(dtype: torch.dtype, eps: float) -> None:
    refused(f"below what {dtype} resolves", *small(dtype), eps)


def test_single_precision_runs_to_what_it_resolves() -> None:
    run = flow(*small(torch.float32), 1e-6)
    assert run.certificate.held is True


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), 1e9])
def test_eps_out_of_range(eps: float) -> None:
    refused("give a positive cost|is not above eps", *small(), eps)


def test_shapes_dtypes_and_options() -> None:
    model, x, y = small()
    refused(r"shape \(4, 1\) and the targets \(4,\)", model, x, y[:, 0], 1e-6)
    refused("constant c of the cost is -1", model, x, y, 1e-6, c=-1.0)
    refused("change from call to call", nn.Sequential(model, nn.Dropout(0.5)), x, y, 1e-6)
    refused("under-parametrised flow was asked for", model, x, y, 1e-6, regime="under-parametrised")
    with pytest.raises(FlowError, match="Labels must be int64"):
        CrossEntropy(torch.zeros(3))
    refused("have one class", model, x, torch.ones(4, dtype=torch.int64))
    refused("A label is outside of the 2 classes", nn.Linear(3, 2).double(), x, 2 * torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="regime must be"):
        flow(model, x, y, 1e-6, regime="over")
    with pytest.raises(ValueError, match="method must be one of"):
        flow(model, x, y, 1e-6, method="euler")
    with pytest.raises(ValueError, match="Give eps"):
        flow(model, x, y)
    with pytest.raises(FlowError, match="finite"):
        Squared(torch.tensor([torch.nan]))
    for p in model.parameters():
        p.requires_grad_(False)
    refused("No parameter of the model requires grad", model, x, y, 1e-6)
