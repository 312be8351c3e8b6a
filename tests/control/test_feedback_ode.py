"""Feedback through ODE blocks: what is measured in front of the field and of its times is right to first order."""

from __future__ import annotations

import pytest
import torch
from loops import looped
from torch import nn

from models import Moving
from pullback.ode import ODEBlock


def model(**options):
    torch.manual_seed(0)
    block = ODEBlock(Moving(), rtol=1e-10, atol=1e-11, **options)
    return nn.Sequential(nn.Linear(3, 2), block, nn.Linear(2, 2)).double(), torch.randn(5, 3).double()


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("learn", [(), ("t0",), ("t0", "t1")])
def test_measured_deviations_are_right_to_first_order(adjoint, learn):
    """The remainder of a step of length h, over h squared, tends to a number: nothing of first order is missing."""
    found = []
    for far in (1e-2, 1e-3):
        net, x = model(adjoint=adjoint, learn=learn, penalty=0.3)
        loop = looped(net, nn.MSELoss(), [((x,), {}, torch.zeros_like)]).loop
        joint = loop.joint()
        products = loop.products(joint)
        loop.rates = [far] * len(loop.rates)
        with torch.no_grad():
            remainders = loop.anticipate(joint, 1.0, products)
        found.append([float(r.norm()) / far**2 for r in remainders])
    assert len(found[0]) >= 3 + len(learn)
    for a, b in zip(*found, strict=True):
        assert abs(a - b) < 0.2 * max(a, b) + 1e-4


@pytest.mark.parametrize("adjoint", [True, False])
def test_stages_follow_the_way_of_the_state(adjoint):
    net, x = model(adjoint=adjoint, learn=("t0", "t1"))
    found = looped(net, nn.MSELoss(), [((x,), {}, torch.zeros_like)])
    names = [blocks[0].name for blocks in found.loop.course.stages]
    assert names[:2] == ["0", "1.start"]
    assert names[-2:] == ["1.end", "2"]
    assert not found.route.broken
