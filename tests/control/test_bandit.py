"""The bandit: EXP3.S as printed, regret beside uniform play, checkpoints, rewards of any kind."""

from __future__ import annotations

import io
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pullback
from pullback.control.bandit import Bandit, structures

#: Fewer at a time would be noise: the bandit's regret varies from seed to seed by a few tens of per cent.
SEEDS = range(6)


def play(bandit, best, seed, rounds, gap=1.0, unit=lambda r: r):
    """Gaussian rewards of spread 1, ``gap`` better for the arm that ``best`` names; returns the mean regret."""
    noise = random.Random(seed)
    regret = 0.0
    for t in range(rounds):
        good = bandit.draw() == best(t)
        regret += 0.0 if good else gap
        bandit.reward(unit(noise.gauss(gap if good else 0.0, 1.0)))
    return regret / rounds


def test_it_finds_the_best_arm():
    arms, rounds = list("abcde"), 2000
    uniform = 1 - 1 / len(arms)
    regrets = [play(Bandit(arms, seed=s), lambda t: "d", s, rounds) for s in SEEDS]
    assert sum(regrets) / len(regrets) < 0.55 * uniform
    assert max(regrets) < 0.75 * uniform


def switching(t):
    return "acb"[t // 1000]


def test_it_follows_when_the_best_arm_changes():
    arms, rounds = list("abc"), 3000
    uniform = 1 - 1 / len(arms)
    regrets = [play(Bandit(arms, seed=s), switching, s, rounds) for s in SEEDS]
    assert sum(regrets) / len(regrets) < 0.55 * uniform
    assert max(regrets) < 0.7 * uniform


def test_it_learns_about_all_partitions_of_four_players():
    arms, rounds = list(structures(list("wxyz"))), 3000
    regrets = [play(Bandit(arms, seed=s), lambda t: "w+y | x+z", s, rounds) for s in SEEDS]
    assert sum(regrets) / len(regrets) < 0.65 * (1 - 1 / len(arms))


def test_sharing_is_what_lets_it_follow():
    def mean(share):
        return sum(play(Bandit(list("abc"), share=share, seed=s), switching, s, 3000) for s in SEEDS) / len(SEEDS)

    assert mean(1e-4) < 0.7 * mean(1e-12)


@given(st.integers(1, 6), st.floats(0.05, 1.0), st.floats(1e-4, 0.5), st.integers(2, 9), st.integers(0, 99))
def test_the_published_recursion(K, gamma, alpha, window, seed):
    """Weights as printed, unnormalised, and ranks by counting."""
    arms = [str(k) for k in range(K)]
    bandit = Bandit(arms, exploration=gamma, share=alpha, window=window, seed=seed)
    noise, weights, past = random.Random(seed), [1.0] * K, []
    for _ in range(40):
        p = [(1 - gamma) * w / sum(weights) + gamma / K for w in weights]
        assert list(bandit.probabilities.values()) == pytest.approx(p, rel=1e-10)
        assert sum(bandit.probabilities.values()) == pytest.approx(1, abs=1e-12)
        assert min(bandit.probabilities.values()) >= gamma / K * (1 - 1e-12)
        k, reward = arms.index(bandit.draw()), float(noise.randint(-3, 3))
        bandit.reward(reward)
        below = sum(1.0 if r < reward else 0.5 if r == reward else 0.0 for r in past[-window:])
        x = below / len(past[-window:]) if past else 0.5
        shared = math.e * alpha / K * sum(weights)
        weights = [w * math.exp(gamma / K * x / p[k] * (j == k)) + shared for j, w in enumerate(weights)]
        past.append(reward)


def test_arms_are_drawn_as_often_as_they_are_probable():
    bandit = Bandit(list("abc"), exploration=0.3)
    bandit._weights = [0.7, 0.2, 0.1]
    counts = dict.fromkeys("abc", 0)
    for _ in range(4000):
        counts[bandit.draw()] += 1
        bandit._drawn = None
    for arm, p in bandit.probabilities.items():
        assert abs(counts[arm] / 4000 - p) < 5 * (p * (1 - p) / 4000) ** 0.5


@pytest.mark.parametrize("unit", [lambda r: 1e-9 * r - 3, lambda r: math.copysign(r**6, r), math.atan])
def test_the_unit_of_the_rewards_does_not_matter(unit):
    plain, other = Bandit(list("abc"), seed=3), Bandit(list("abc"), seed=3)
    play(plain, switching, 0, 500)
    play(other, switching, 0, 500, unit=unit)
    assert plain.probabilities == other.probabilities


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_the_lowest(bad):
    bad_arm, worst = (Bandit(list("abc"), seed=1) for _ in range(2))
    noise = random.Random(0)
    for _ in range(200):
        arm = bad_arm.draw()
        assert worst.draw() == arm
        value = noise.random()
        bad_arm.reward(bad if arm == "b" else value)
        worst.reward(math.nan if arm == "b" else value)
    assert bad_arm.probabilities == worst.probabilities
    assert all(math.isfinite(p) for p in bad_arm.probabilities.values())
    assert bad_arm.probabilities["b"] < min(bad_arm.probabilities["a"], bad_arm.probabilities["c"])
    a, b, _ = bad_arm.report()
    assert (b.failed, math.isnan(b.mean)) == (b.played, True)
    assert a.failed == 0
    assert 0 < a.mean < 1


def test_only_bad_rewards_leave_it_as_it_was():
    bandit = Bandit(list("ab"))
    for _ in range(50):
        bandit.draw()
        bandit.reward(math.nan)
    assert list(bandit.probabilities.values()) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("drawn", [False, True])
def test_resume_is_bit_for_bit(drawn):
    def follow(bandit, noise, count):
        out = []
        for _ in range(count):
            out.append((bandit.draw(), bandit.probabilities))
            bandit.reward(noise.gauss(0, 1))
        return out

    whole = Bandit(list("abcd"), window=7, seed=5)
    follow(whole, random.Random(0), 60)
    if drawn:
        whole.draw()
    file = io.BytesIO()
    torch.save(whole.state(), file)
    torch.rand(3)  # the global stream is nobody's concern
    resumed = Bandit(list("abcd"), window=7, seed=99)
    file.seek(0)
    resumed.load(torch.load(file))
    if drawn:
        whole.reward(0.5)
        resumed.reward(0.5)
    assert follow(whole, random.Random(1), 100) == follow(resumed, random.Random(1), 100)
    assert whole.report() == resumed.report()


def test_a_state_is_a_copy():
    bandit = Bandit(list("ab"))
    play(bandit, lambda t: "a", 0, 20)
    state = bandit.state()
    kept = {key: torch.tensor(value) for key, value in state.items() if key in ("weights", "recent", "played", "sums")}
    play(bandit, lambda t: "a", 0, 20)
    assert all(torch.equal(torch.tensor(state[key]), value) for key, value in kept.items())


def test_it_leaves_the_global_stream_alone_and_its_seed_decides():
    before = torch.get_rng_state()
    draws = []
    for seed in (0, 0, 1):
        bandit, own = Bandit(list("abc"), seed=seed), []
        for _ in range(30):
            own.append(bandit.draw())
            bandit.reward(0.0)
        draws.append(own)
    assert torch.equal(before, torch.get_rng_state())
    assert draws[0] == draws[1] != draws[2]


def test_the_report():
    bandit = Bandit(list("ab"), seed=2)
    seen: dict[str, list[float]] = {"a": [], "b": []}
    for t in range(30):
        arm = bandit.draw()
        seen[arm].append(t / 7)
        bandit.reward(t / 7)
    for row in bandit.report():
        assert (row.played, row.failed) == (len(seen[row.name]), 0)
        assert row.mean == pytest.approx(sum(seen[row.name]) / row.played)
        assert row.probability == bandit.probabilities[row.name]
    assert math.isnan(Bandit(["a"]).report()[0].mean)


def test_draws_and_rewards_take_turns():
    bandit = Bandit(list("ab"))
    with pytest.raises(pullback.StepError, match="no arm to reward; draw one first"):
        bandit.reward(1.0)
    arm = bandit.draw()
    with pytest.raises(pullback.StepError, match=f"'{arm}' was drawn and not rewarded.*nan if the step failed"):
        bandit.draw()
    bandit.reward(1.0)
    with pytest.raises(pullback.StepError, match="no arm to reward"):
        bandit.reward(1.0)


def test_rates():
    T, K, S = 5000, 3, 4
    rates = Bandit.rates(K, T, switches=S - 1)
    assert rates["share"] == 1 / T
    gamma = math.sqrt(K * (S * math.log(K * T) + math.e) / ((math.e - 1) * T))
    assert rates["exploration"] == pytest.approx(gamma)
    assert Bandit.rates(15, 10)["exploration"] == 1.0
    assert Bandit(list("abc"), **rates).exploration == rates["exploration"]
    for bad in ((0, 10, 0), (2, 1, 0), (2, 10, -1)):
        with pytest.raises(ValueError, match="rates needs arms >= 1"):
            Bandit.rates(*bad)


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ([], {}, "arms must be a list of different names"),
        (["a", "a"], {}, "arms must be a list of different names"),
        ("ab", {}, "arms must be a list of different names"),
        (["a"], {"exploration": 0.0}, "exploration must be in"),
        (["a"], {"exploration": 1.1}, "exploration must be in"),
        (["a"], {"exploration": math.nan}, "exploration must be in"),
        (["a"], {"share": 0.0}, "share must be in"),
        (["a"], {"share": 1.0}, "share must be in"),
        (["a"], {"window": 1}, "window must be at least 2"),
    ],
)
def test_bad_options_are_refused(arms, options, message):
    with pytest.raises(ValueError, match=message):
        Bandit(arms, **options)


def test_the_state_of_other_arms_is_refused():
    with pytest.raises(ValueError, match=r"arms \['a', 'b'\], this bandit has \['a', 'c'\]"):
        Bandit(["a", "c"]).load(Bandit(["a", "b"]).state())


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 2), (3, 5), (4, 15)])
def test_all_partitions_of_a_stage(n, count):
    players = list("wxyz")[:n]
    arms = structures(players)
    assert len(arms) == count  # Bell numbers
    assert len({frozenset(map(frozenset, groups)) for groups in arms.values()}) == count
    for name, groups in arms.items():
        assert sorted(p for group in groups for p in group) == players
        assert name == " | ".join("+".join(group) for group in groups)


def test_given_structures():
    arms = structures(list("abcde"), {"pair": [["d", "b"]], "alone": [], "all": [list("abcde")]})
    assert arms == {
        "pair": [["d", "b"], ["a"], ["c"], ["e"]],
        "alone": [["a"], ["b"], ["c"], ["d"], ["e"]],
        "all": [["a", "b", "c", "d", "e"]],
    }
    assert Bandit(list(arms)).draw() in arms


@pytest.mark.parametrize(
    ("players", "given", "message"),
    [
        ("ab", None, "players must be a list of different names"),
        ([], None, "players must be a list of different names"),
        (["a", "a"], None, "players must be a list of different names"),
        (list("abcde"), None, "5 players have too many partitions to try"),
        (["a"], {}, "No structures are given"),
        (list("ab"), {"s": [["a", "z"]]}, r"'s' must hold lists of the players \['a', 'b'\]"),
        (list("ab"), {"s": ["ab"]}, r"'s' must hold lists of the players"),
        (list("ab"), {"s": [["a"], []]}, r"'s' must hold lists of the players"),
        (list("ab"), {"s": [["a"], ["b", "a"]]}, "'s' names a player twice"),
    ],
)
def test_bad_structures_are_refused(players, given, message):
    with pytest.raises(ValueError, match=message):
        structures(players, given)
