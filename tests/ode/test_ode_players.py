"""Layers side by side in the field of a block as players: what they share, against one layer that is both."""

from __future__ import annotations

import copy

import pytest
import torch
from fields import TIGHT
from torch import nn

import pullback
from oracle import assert_close
from pullback.errors import StepError
from pullback.ode import ODEBlock


class Sides(nn.Module):
    """Two layers on one state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(2, 4), nn.Linear(2, 3), nn.Linear(7, 2)

    def forward(self, t, x):
        return self.o(torch.tanh(torch.cat([self.a(x), self.b(x)], 1)) * (1 + t))


class Joint(nn.Module):
    """The same as one layer."""

    def __init__(self, twin: Sides) -> None:
        super().__init__()
        self.ab, self.o = nn.Linear(2, 7), twin.o
        with torch.no_grad():
            self.ab.weight.copy_(torch.cat([twin.a.weight, twin.b.weight]))
            self.ab.bias.copy_(torch.cat([twin.a.bias, twin.b.bias]))

    def forward(self, t, x):
        return self.o(torch.tanh(self.ab(x)) * (1 + t))


NAMED = [["1.flow.func.a", "1.flow.func.b"]]


def models(**options):
    torch.manual_seed(0)
    field = Sides()
    ends = nn.Linear(3, 2), nn.Linear(2, 2)
    fields = field, Joint(field)
    both = [copy.deepcopy(nn.Sequential(ends[0], ODEBlock(own, **options), ends[1]).double()) for own in fields]
    return *both, torch.randn(6, 3).double(), torch.randn(6, 2).double()


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("options", [TIGHT, {**TIGHT, "adjoint": False}, {"solver": "rk4", "step": 0.125}])
def test_moments_of_players_are_those_of_one_layer(options, shared):
    played, joined, x, y = models(**options)
    found = []
    for model in (played, joined):
        criterion = nn.MSELoss()
        made = {"columns": "exact", "shared": shared}
        game = pullback.Game(stages=NAMED, structure="cooperative")
        if model is played:
            opt = pullback.KroneckerGame(model, criterion, game=game, **made)
        else:
            opt = pullback.Kronecker(model, criterion, **made)
        criterion(model(x), y).backward()
        opt.step()
        found.append(opt.blocks)
    stage = found[0][0]
    assert stage.names == tuple(NAMED[0])
    layer = next(block for block in found[1] if block.params[0] is joined[1].func.ab.weight)
    assert_close(stage.left.C[0], layer.left.C[0], 1e-10)
    A = layer.right.C[0]
    assert_close(stage.right.C[0], torch.cat([torch.cat([A, A], 1)] * 2), 1e-10)


@pytest.mark.parametrize("structure", ["cooperative", "bandit"])
@pytest.mark.parametrize("adjoint", [True, False])
def test_players_in_a_field_and_a_learned_time_train(structure, adjoint):
    torch.manual_seed(0)
    block = ODEBlock(Sides(), adjoint=adjoint, learn="t1", penalty=1e-2, every=2, rtol=1e-3, atol=1e-4)
    model = nn.Sequential(nn.Linear(3, 2), block, nn.Linear(2, 1)).double()
    x = torch.randn(32, 3).double()
    y = torch.tanh(x[:, :1] * x[:, 1:2])
    criterion = nn.MSELoss()
    opt = pullback.KroneckerGame(model, criterion, game=pullback.Game(stages=NAMED, structure=structure))
    losses, times = [], [block.t1]
    for _ in range(20):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        times.append(block.t1)
    assert losses[-1] < losses[0]
    assert len(set(times)) == 11  # every second step
    assert len(opt.game.report().stages) == 1


def test_players_inside_and_outside_do_not_match():
    played, _, x, y = models(**TIGHT)
    criterion = nn.MSELoss()
    game = pullback.Game(stages=[["0", "1.flow.func.a"]], structure="cooperative")
    opt = pullback.KroneckerGame(played, criterion, game=game)
    criterion(played(x), y).backward()
    with pytest.raises(StepError, match=r"different numbers of positions|different times"):
        opt.step()


def test_players_in_a_field_have_to_be_named():
    played, _, x, y = models(**TIGHT)
    criterion = nn.MSELoss()
    opt = pullback.KroneckerGame(played, criterion)
    criterion(played(x), y).backward()
    with pytest.raises(StepError, match="have to be named"):
        opt.step()
