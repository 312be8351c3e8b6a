"""Oracle 4: the ways to sweep columns give the same numbers, and what is timed is reported."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import pullback
from cases import CASES, by_name
from oracle import assert_close, dense, linearise
from pullback.tape import sweep


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("way", ["vmap", "fold"])
def test_ways_agree(case, way):
    model, args, kwargs = case.build()
    y = torch.zeros_like  # two columns at least
    loop = linearise(model, nn.MSELoss(), [(args, kwargs, y)], sweep="loop")
    if way == "fold" and not case.folds:
        with pytest.raises(pullback.CoverageError, match="sweep='fold' needs"):
            linearise(model, nn.MSELoss(), [(args, kwargs, y)], sweep="fold")
        return
    other = linearise(model, nn.MSELoss(), [(args, kwargs, y)], sweep=way)
    assert other.terms[0].plan.strategy == way
    assert_close(dense(model, other.blocks), dense(model, loop.blocks))


def test_auto_times_once_and_says_so():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    criterion = nn.CrossEntropyLoss()
    opt = pullback.LayerwiseMetric(model, criterion)
    for _ in range(2):
        opt.zero_grad()
        criterion(model(torch.randn(6, 3)), torch.randint(0, 5, (6,))).backward()
        opt.step()
    (plan,) = opt._tape.plans.values()
    assert set(plan.seconds) == {"loop", "vmap", "fold"}
    assert plan.strategy in plan.seconds
    assert f"sweep: {plan.strategy} (timed once:" in str(opt.coverage)


def test_a_way_that_differs_is_never_chosen():
    good = [torch.ones(2, 3)]
    name, reference, seconds = sweep.choose(
        {"loop": lambda: good, "vmap": lambda: [good[0] * 1.1], "fold": lambda: [good[0].clone()]}
    )
    assert reference is good
    assert name in ("loop", "fold")
    assert "vmap" not in seconds


def test_of_many_columns_the_loop_takes_a_few_and_its_time_is_extrapolated():
    assert sweep.probes(3) == [0, 1, 2]
    picks = sweep.probes(61)
    assert (picks[0], picks[-1], len(picks)) == (0, 60, 6)
    S = torch.randn(61, 4)
    ways = {"loop": lambda: [S[picks]], "vmap": lambda: [S * 1.1], "fold": lambda: [S.clone()]}
    name, reference, seconds = sweep.choose(ways, columns=61)
    assert name in ("loop", "fold")
    assert "vmap" not in seconds
    assert len(reference[0]) == 6

    def slow():
        time.sleep(0.006)
        return [S[picks]]

    assert sweep.choose({"loop": slow}, columns=61)[2]["loop"] > 0.06


def test_a_slow_way_is_timed_once():
    runs = []

    def slow():
        runs.append(None)
        time.sleep(0.06)
        return [torch.ones(2)]

    sweep.choose({"loop": slow})
    assert len(runs) == 1


def test_a_way_that_fails_is_passed_over():
    def fails():
        raise RuntimeError("no batching rule")

    name, _, _ = sweep.choose({"loop": lambda: [torch.ones(1)], "vmap": fails})
    assert name == "loop"
    with pytest.raises(pullback.CoverageError, match="could not be pulled back"):
        sweep.choose({"loop": fails})


def test_fold_is_refused_where_the_model_draws_random_numbers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    args = by_name["mlp"].inputs(4)
    with pytest.raises(pullback.CoverageError, match="use 'loop'"):
        linearise(model, nn.MSELoss(), [(args, {}, torch.zeros(4, 2, dtype=torch.float64))], sweep="fold")
