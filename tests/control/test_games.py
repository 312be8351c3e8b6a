"""Who plays, by name or as observed; rewards, reports and resuming of a game."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pullback
from pullback.control import Game, Play, named_stages, stages_of


class Block(nn.Module):
    """Inception: four branches, two of them two layers long; then a residual branch beside a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 1)
        self.b = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, padding=1))
        self.c = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(2, 3, 1))
        self.inner, self.outer = nn.Conv2d(12, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3, padding=1)
        self.skip = nn.Conv2d(12, 4, 1, stride=2)
        self.norm, self.deep = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, groups=2)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)
        x = self.outer(self.inner(x.relu()).relu()) + self.skip(x)
        return self.out(self.deep(self.norm(x)).mean((2, 3)))


def test_parallel_modules_are_found():
    model = Block()
    assert stages_of(model, torch.randn(2, 2, 6, 6)) == [["b.0", "c.0"], ["a", "b.2", "c.2", "d.1"], ["outer", "skip"]]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.o, self.policy, self.value = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        w = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        h = self.o(w @ self.v(x)).mean(1)
        return self.policy(h), self.value(h)


def test_projections_and_heads_are_parallel():
    assert stages_of(Attention(), torch.randn(2, 5, 4)) == [["q", "k", "v"], ["policy", "value"]]


def test_who_is_no_player_is_left_out():
    """A chain, a module that is called twice, a frozen one, and branches of different sizes."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.c.requires_grad_(False)
            self.wide = nn.Conv1d(1, 2, 1)

        def forward(self, x):
            x = self.a(x.sin()) + self.a(x) + self.b(x) + self.c(x)
            return self.d(x) + self.wide(x[:, None]).sum(1)

    assert stages_of(Odd(), torch.randn(3, 4)) == []
    assert stages_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)) == []


def named(stages, model=None, trained=None):
    model = model or Block()
    return named_stages(model, stages, {id(p) for p in model.parameters()} if trained is None else trained)


def test_stages_by_name():
    model = Block()
    first, second = named([["a", "?.2.weight", "d.*"], ["outer", "skip"]], model)
    assert first.names == ("a", "b.2", "c.2", "d.1")
    assert first.weights[1] is model.b[2].weight
    assert second.names == ("outer", "skip")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["a", "skipp"]], r"'skipp' of a stage matches no module with parameters \(did you mean 'skip'\?\)"),
        ([["a", "zzz.*"]], r"'zzz.\*' of a stage matches no module with parameters\."),
        ([["a", "norm"]], r"'norm' makes a player of 'norm' \(GroupNorm\), whose rows have no two sides"),
        ([["a", "deep.*"]], r"'deep.\*' makes a player of 'deep' \(Conv2d\), a convolution in 2 groups"),
        ([["a", "b.*"], ["d.*", "b.2"]], "'b.2' plays in two stages, 1 and 2"),
        ([["a", "b.*"], ["skip"]], "Stage 2 has one player, 'skip'"),
    ],
)
def test_bad_stages_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        named(stages)


def test_weights_that_cannot_play_are_refused():
    model = Block()
    with pytest.raises(ValueError, match=r"'a' \(Conv2d\), whose weight is not trained by this optimizer"):
        named([["a", "b.2"]], model, {id(model.b[2].weight)})
    model.b[2].weight = model.c[2].weight = nn.Parameter(torch.zeros(3, 4, 3, 3))
    with pytest.raises(ValueError, match="whose weight is that of another module too"):
        named([["b.2", "a"]], model)
    nn.utils.parametrizations.weight_norm(model.a)
    with pytest.raises(ValueError, match=r"'a' .*whose weight is computed from other parameters"):
        named([["a", "skip"]], model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "nash"}, "structure=...\\) must be 'open-loop', 'cooperative' or 'bandit', got 'nash'"),
        ({"stages": "all"}, "must be 'auto' or lists of name patterns"),
        ({"stages": [["a"], []]}, "must be 'auto' or lists of name patterns"),
        ({"stages": ["ab"]}, "must be 'auto' or lists of name patterns"),
        ({"stages": []}, "must be 'auto' or lists of name patterns"),
        ({"hold": 0}, "at least 1, got 0 and 1"),
        ({"renew": 0}, "at least 1, got 1 and 0"),
        ({"cut": 1.0}, "cut=...\\) must be in"),
        ({"exploration": 0.0}, "exploration must be in"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Game(**options)


def test_arms():
    five = list("abcde")
    assert list(Game().arms(["a", "b"])) == ["a+b", "a | b"]
    assert list(Game().arms(five)) == ["alone", "together"]
    assert Game(structure="cooperative").arms(five) == {"together": [five]}
    assert Game(structure="open-loop").arms(["a", "b"]) == {"alone": [["a"], ["b"]]}


def test_rewards_are_relative_decreases_per_step():
    play = Play(Game(hold=2))
    play.begin([["a", "b"], ["c", "d", "e"]])
    for step, loss in ((0, 4.0), (2, 100.0), (5, 3.0), (6, 7.0), (16, 9.0)):
        structures = play.look(step, loss)
        assert [sorted(u for group in own for u in group) for own in structures] == [[0, 1], [0, 1, 2]]
    for stage in play.report().stages:
        means = [arm.mean * arm.played for arm in stage.arms if arm.played]
        assert sum(arm.played for arm in stage.arms) == 2
        assert math.isclose(sum(means), (4 - 3) / 4 / 5 + (3 - 9) / 3 / 11)
        assert math.isclose(sum(arm.probability for arm in stage.arms), 1.0)
        assert stage.playing in {arm.name for arm in stage.arms}
    text = str(play.report())
    assert text.splitlines()[0].split() == ["stage", "structure", "played", "failed", "mean", "reward", "probability"]
    assert len(text.splitlines()) >= 1 + 2 + 5 + 1


def test_a_refused_step_is_the_lowest_reward_and_the_next_look_draws():
    play = Play(Game())
    play.begin([["a", "b"]])
    play.failed()  # nothing is played yet
    play.look(0, 1.0)
    play.failed()
    play.failed()
    assert sum(arm.failed for arm in play.report().stages[0].arms) == 1
    play.look(3, 2.0)
    play.look(4, 1.0)
    assert sum(arm.played for arm in play.report().stages[0].arms) == 2


def test_an_unknown_loss_is_refused_where_there_is_a_choice():
    play = Play(Game())
    play.begin([["a", "b"]])
    with pytest.raises(pullback.StepError, match="loss of this step is not known"):
        play.look(0, math.nan)
    fixed = Play(Game(structure="cooperative"))
    fixed.begin([["a", "b"]])
    assert fixed.look(0, math.nan) == fixed.look(1, math.nan) == [[(0, 1)]]


def test_a_game_goes_on_where_it_was():
    def losses():
        generator = torch.Generator().manual_seed(0)
        return torch.rand(40, generator=generator).tolist()

    def run(play, steps):
        return [play.look(k, losses()[k]) for k in steps]

    whole = Play(Game())
    whole.begin([["a", "b", "c"]])
    expected = run(whole, range(40))
    first, second = Play(Game()), Play(Game())
    first.begin([["a", "b", "c"]])
    head = run(first, range(17))
    second.load(first.state())
    assert head + run(second, range(17, 40)) == expected
    assert second.report() == whole.report() or str(second.report()) == str(whole.report())
    other = Play(Game())
    other.begin([["a", "b"]])
    with pytest.raises(ValueError, match=r"state is of the stages \[\('a', 'b', 'c'\)\]"):
        other.load(first.state())
    fresh = Play(Game())
    fresh.load(Play(Game()).state())
    assert fresh.stages is None
