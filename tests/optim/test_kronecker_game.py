"""The optimizer in which modules of a stage play: beside Kronecker, resumed, refused."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

import pullback
from pullback import Game, KroneckerGame


class Toy(nn.Module):
    """Inception on small images, then a residual block on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 3, padding=1)
        self.c = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1))
        self.inner, self.outer, self.skip = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(8, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x), self.c(x)], 1).tanh().flatten(2).square().mean(2)
        return self.out((self.outer(self.inner(x).tanh()) + self.skip(x)).tanh())


CRITERION = nn.CrossEntropyLoss()


def data(N=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, 4, 4, generator=generator)
    return x, (x[:, 0, 1:3].square().sum((1, 2)) > 8).long()


def model():
    torch.manual_seed(3)
    return Toy()


def train(opt, steps):
    x, y = data()
    losses = []
    for k in steps:
        batch = slice(32 * (k % 2), 32 * (k % 2) + 32)
        opt.zero_grad()
        loss = CRITERION(opt.model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def whole_loss(net):
    x, y = data()
    with torch.no_grad():
        return float(CRITERION(net(x), y))


@pytest.mark.parametrize("stages", ["auto", [["a", "b", "c.2"], ["outer", "skip"]]])
def test_a_bandit_trains_and_its_report_adds_up(stages):
    opt = KroneckerGame(model(), CRITERION, game=Game(stages=stages))
    assert str(opt.game.report()).startswith("stage")
    before = whole_loss(opt.model)
    train(opt, range(60))
    assert whole_loss(opt.model) < 0.5 * before
    assert opt.game.stages == [("a", "b", "c.2"), ("outer", "skip")]
    looks = 0
    step = 0
    while step < 60:
        looks, step = looks + 1, opt.schedule.after(step)
    for stage, arms in zip(opt.game.report().stages, (5, 2), strict=True):
        assert len(stage.arms) == arms
        assert sum(arm.played for arm in stage.arms) == looks - 1
        assert not any(arm.failed for arm in stage.arms)
        assert math.isclose(sum(arm.probability for arm in stage.arms), 1)
    assert opt.coverage["a.weight"].why.startswith("conv 2d, in a stage of 3")
    assert {entry.status for entry in opt.coverage.parameters} == {"sampled"}


def test_open_loop_is_kronecker():
    nets = model(), model()
    train(pullback.Kronecker(nets[0], CRITERION), range(12))
    opt = KroneckerGame(nets[1], CRITERION, game=Game(structure="open-loop"))
    train(opt, range(12))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert [arm.name for arm in opt.game.report().stages[0].arms] == ["alone"]


def test_cooperation_is_another_step_than_layerwise():
    nets = model(), model()
    train(pullback.Kronecker(nets[0], CRITERION), range(3))
    opt = KroneckerGame(nets[1], CRITERION, game=Game(structure="cooperative"))
    train(opt, range(3))
    assert not torch.allclose(nets[0].a.weight, nets[1].a.weight, atol=1e-4)
    assert opt.last.spaces[:2] == ("a+b+c.2", "outer+skip")


@pytest.mark.parametrize("stages", ["auto", [["a", "b", "c.2"], ["outer", "skip"]]])
@pytest.mark.parametrize("structure", ["bandit", "cooperative"])
def test_resumed_bit_for_bit(structure, stages):
    game = Game(structure=structure, stages=stages, renew=2)
    straight = KroneckerGame(model(), CRITERION, game=game)
    expected = train(straight, range(24))
    first = KroneckerGame(model(), CRITERION, game=game)
    head = train(first, range(13))
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "opt": first.state_dict()}, file)
    train(first, range(13, 16))  # what goes on does not reach into what was saved
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = KroneckerGame(model(), CRITERION, game=game)
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["opt"])
    assert head + train(second, range(13, 24)) == expected
    for p, q in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert str(second.game.report()) == str(straight.game.report())


def test_a_state_in_memory_is_not_shared():
    game = Game(structure="cooperative")
    first, second = (KroneckerGame(model(), CRITERION, game=game) for _ in range(2))
    train(first, range(6))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert train(first, range(6, 12)) == train(second, range(6, 12))


def test_a_loss_that_is_not_finite_is_the_lowest_reward():
    opt = KroneckerGame(model(), CRITERION)
    train(opt, range(3))
    opt.refresh()
    opt.zero_grad()
    CRITERION(opt.model(torch.full((4, 1, 4, 4), math.nan)), torch.zeros(4, dtype=torch.long)).backward()
    with pytest.raises(pullback.StepError, match="The loss is nan"):
        opt.step()
    for stage in opt.game.report().stages:
        assert sum(arm.failed for arm in stage.arms) == 1
    assert all(math.isfinite(loss) for loss in train(opt, range(4)))


def test_accumulated_batches_make_one_metric():
    opt = KroneckerGame(model(), CRITERION, columns="exact", game=Game(structure="cooperative"))
    x, y = data(16)  # so few samples that all of them are read
    (CRITERION(opt.model(x[:8]), y[:8]) / 2).backward()
    (CRITERION(opt.model(x[8:]), y[8:]) / 2).backward()
    opt.step()
    other = KroneckerGame(model(), CRITERION, columns="exact", game=Game(structure="cooperative"))
    CRITERION(other.model(x), y).backward()
    other.step()
    for p, q in zip(opt.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_what_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="form must be 'kfac' here, got 'ekfac'"):
        KroneckerGame(model(), CRITERION, form="ekfac")
    with pytest.raises(ValueError, match=r"did you mean 'outer'"):
        KroneckerGame(model(), CRITERION, game=Game(stages=[["outr", "skip"]]))
    net = nn.Sequential(nn.Linear(3, 2))
    opt = KroneckerGame(net, CRITERION)
    CRITERION(net(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
    with pytest.raises(pullback.StepError, match="No two modules of this model are parallel"):
        opt.step()
