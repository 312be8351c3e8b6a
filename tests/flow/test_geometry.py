"""Lifts, lengths and the action, beside dense twins and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from oracle import assert_close, jacobian
from pullback.flow import AdaptedFlow, FlowError, flow
from pullback.flow.geometry import (
    action,
    energy,
    flow_time,
    horizontal_at,
    length,
    lift_path,
    straight_time,
)
from pullback.flow.record import Path

f64 = torch.float64


def small(rows: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return model, torch.randn(rows, 3, dtype=f64), torch.randn(rows, 1, dtype=f64)


def test_horizontal_and_vertical() -> None:
    model, x, _ = small()
    D = jacobian(model, (x,), {}).reshape(5, -1)
    split = horizontal_at(model, x)
    assert_close(split.D, D)
    assert split.rank == 5
    theta, v = torch.randn(D.shape[1], dtype=f64), torch.randn(5, dtype=f64)
    assert float((D @ split.vertical(theta)).abs().max()) < 1e-12
    assert_close(split.horizontal(theta), torch.linalg.pinv(D) @ D @ theta)
    assert_close(split.lift(v), torch.linalg.pinv(D) @ v)
    assert_close(D @ split.lift(v), v)


def test_the_flow_is_the_lift_of_the_straight_line() -> None:
    """Same curve of weights, other clock; its length does not depend on the clock."""
    model, x, y = small()
    start = [p.detach().clone() for p in model.parameters()]
    x0 = model(x).detach()
    T, c = 20.0, 1 / 10
    run = flow(model, x, y, until=T, tol=1e-9, keep_path=True)
    ended = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for p, old in zip(model.parameters(), start, strict=True):
        p.data.copy_(old)
    t = straight_time(T, c)
    assert flow_time(t, c) == pytest.approx(T)
    lifted = lift_path(model, x, lambda s: x0 + s * (y - x0), until=t)
    assert_close(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), ended, 1e-5)
    assert run.path is not None
    assert length(lifted) == pytest.approx(length(run.path), rel=1e-4)
    assert energy(lifted) >= length(lifted) ** 2 / (2 * t) * (1 - 1e-9)
    # The action vanishes on the flow, and not on another clock.
    for p, old in zip(model.parameters(), start, strict=True):
        p.data.copy_(old)
    on = action(model, x, y, run.path)
    off = action(model, x, y, lifted)
    assert on < 1e-8 < 1e-3 < off
    # x' = y - x(0) there, and -grad C = 2c (1 - t)(y - x(0)): a closed form.
    size = float((y - x0).square().sum())
    expected = 0.5 * size * ((t - 0) * 1 - 4 * c * (t - t**2 / 2) + 4 * c**2 * (1 - (1 - t) ** 3) / 3)
    assert off == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), start, strict=True))


def test_length_and_energy_of_a_circle() -> None:
    times = [0.1 * k for k in range(11)]
    path = Path(
        times,
        [torch.tensor([math.cos(s), math.sin(s)], dtype=f64) for s in times],
        [torch.tensor([-math.sin(s), math.cos(s)], dtype=f64) for s in times],
    )
    assert length(path) == pytest.approx(1.0, rel=1e-6)
    assert energy(path) == pytest.approx(0.5, rel=1e-6)
    assert_close(path.at(0.55), torch.tensor([math.cos(0.55), math.sin(0.55)], dtype=f64), 1e-6)
    assert_close(path.slope_at(0.55), torch.tensor([-math.sin(0.55), math.cos(0.55)], dtype=f64), 1e-4)


def test_lifts_that_do_not_exist_are_refused() -> None:
    model, x, y = small()
    with pytest.raises(FlowError, match="begin where they are"):
        lift_path(model, x, lambda s: y + s)
    narrow, many = nn.Linear(3, 1).double(), torch.randn(9, 3, dtype=f64)
    z = narrow(many).detach()
    with pytest.raises(FlowError, match="full row rank"):
        lift_path(narrow, many, lambda s: z + s)
    flow_ = AdaptedFlow(model, x, y)
    flow_.close()
    assert not model._forward_hooks
