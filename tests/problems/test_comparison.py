from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pullback.problems import (
    Arrival,
    Budget,
    Comparison,
    Evaluation,
    InterruptedComparison,
    Problem,
    Progress,
    Quartiles,
    Run,
    SpecError,
    compare,
    summarise,
)

Fake = Callable[[str, Callable[..., Any]], None]
BUDGET = Budget(steps=3)


def failing(error: type[BaseException], built: list[int], at: int) -> Callable[..., Any]:
    """An SGD that fails in the run of the at-th optimizer built of its kind; 1 is the tryout, 2 a warm-up."""

    class Fails(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            built.append(1)
            self.number = len(built)

        def step(self, closure: Any = None) -> Any:
            if self.number == at:
                raise error("now")
            return super().step(closure)

    return Fails


def labels(result: Comparison) -> list[tuple[str, int]]:
    return [(run.label, run.seed) for run in result.runs]


def test_optimizers_are_interleaved_seed_by_seed(line: Problem) -> None:
    result = compare(line, "sgd:lr=0.1,adam", seeds=2, budget=BUDGET)
    assert labels(result) == [("sgd:lr=0.1", 0), ("adam", 0), ("sgd:lr=0.1", 1), ("adam", 1)]
    assert labels(compare(line, "sgd", seeds=[7, 5], budget=BUDGET)) == [("sgd", 7), ("sgd", 5)]
    first, second = result.runs[:2]
    assert first.history[0].loss == second.history[0].loss
    assert result.machine["threads"] == 1


def test_a_host_with_and_without_policies(line: Problem) -> None:
    deep = dataclasses.replace(
        line, make_model=lambda seed: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    )
    result = compare(deep, "ocnopt:lr=0.05,ocnopt:lr=0.05,feedback=false,sgd:lr=0.05", seeds=2, budget=BUDGET)
    ends: dict[str, list[float]] = {run.label: [] for run in result.runs}
    for run in result.runs:
        assert run.failure is None
        ends[run.label].append(run.history[-1].loss)
    with_, without, host = ends.values()
    assert without == host
    assert with_ != host


def test_a_failure_does_not_stop_the_others(line: Problem, fake: Fake) -> None:
    fake("fails", failing(RuntimeError, [], at=3))
    result = compare(line, "fails,sgd", seeds=2, budget=BUDGET)
    assert [run.failure for run in result.runs] == ["RuntimeError: now", None, None, None]


def test_ctrl_c_keeps_the_finished_runs_and_the_partial_one(line: Problem, fake: Fake) -> None:
    fake("stops", failing(KeyboardInterrupt, [], at=5))
    with pytest.raises(InterruptedComparison) as caught:
        compare(line, "sgd,stops", seeds=3, budget=BUDGET)
    result = caught.value.comparison
    assert labels(result) == [("sgd", 0), ("stops", 0), ("sgd", 1), ("stops", 1)]
    assert [run.failure for run in result.runs] == [None, None, None, "interrupted"]
    assert result.runs[-1].steps == 0


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_before_any_step(line: Problem, fake: Fake, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if at == 1:
        monkeypatch.setattr("pullback.problems.comparison._try_out", stop)
    fake("stops", failing(KeyboardInterrupt, [], at=2))
    with pytest.raises(InterruptedComparison) as caught:
        compare(line, "stops", seeds=1, budget=BUDGET)
    runs = caught.value.comparison.runs
    assert [(run.steps, run.history, run.loss, run.test) for run in runs] == [(0, (), None, None)] * (at - 1)


def test_ctrl_c_in_the_progress_callback(line: Problem) -> None:
    def stop(progress: Progress) -> None:
        if progress.steps == 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedComparison) as caught:
        compare(line, "sgd,adam", budget=BUDGET, progress=stop)
    assert [(run.steps, run.failure) for run in caught.value.comparison.runs] == [(2, "interrupted")]


def test_refused_options_are_heard_of_before_training(line: Problem) -> None:
    steps: list[Progress] = []
    with pytest.raises(SpecError, match="adam refuses"):
        compare(line, "sgd,adam:lr=-1", budget=BUDGET, progress=steps.append)
    assert not steps
    with pytest.raises(SpecError, match="at least one"):
        compare(line, "sgd", seeds=0)


def test_the_json_is_as_promised_and_has_no_nan(line: Problem) -> None:
    result = compare(line, "sgd:lr=1e300,adam:betas=0.9/0.99", seeds=1, budget=Budget(steps=5)).to_json()
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    assert set(result) == {"problem", "metric", "machine", "summary", "runs"}
    diverged, fine = result["runs"]
    assert set(fine) == {
        "optimizer",
        "options",
        "seed",
        "steps",
        "seconds",
        "cpu_seconds",
        "ms_per_step",
        "trials_per_step",
        "loss",
        "best_loss",
        "test",
        "validation_score",
        "history",
        "ode",
        "reached",
        "steps_to",
        "failure",
    }
    assert diverged["failure"].startswith("the training loss is")
    assert diverged["loss"] is None
    assert diverged["best_loss"] == diverged["history"][0][2]
    assert fine["options"] == {"betas": [0.9, 0.99]}
    assert fine["reached"] == {"1": None, "1e-30": None}
    assert [len(row) for row in fine["history"]] == [6] * 6


def run_of(label: str, seed: int, losses: list[float], failure: str | None = None) -> Run:
    history = tuple(Evaluation(float(k), 2 * k, loss, 0.5) for k, loss in enumerate(losses))
    steps = history[-1].step
    return Run(label, {}, seed, steps, steps / 2, steps / 2, history, (1.0,), failure)


def test_summaries() -> None:
    runs = [
        run_of("a", 0, [4.0, 1.0, 0.25]),
        run_of("b", 0, [4.0, 2.0]),
        run_of("a", 1, [4.0, 3.0, 0.75]),
        run_of("a", 2, [4.0, 0.5], failure="broke"),
    ]
    a, b = summarise(runs)
    assert (a.label, a.runs, a.failed) == ("a", 3, 1)
    assert a.loss == Quartiles(0.375, 0.5, 0.625, 2, 0.75)
    assert a.reached == {1.0: Arrival(3, 3, seconds=1.0, worst_seconds=2.0, steps=2.0, worst_steps=4.0)}
    assert a.ms_per_step == Quartiles(500.0, 500.0, 500.0, 2, 500.0)
    assert a.to_json()["reached"]["1"]["worst_steps"] == 4.0
    assert b.loss == Quartiles(2.0, 2.0, 2.0, 1, 2.0)
    assert b.reached == {1.0: Arrival(0, 1, None, None, None, None)}
    assert Quartiles.of([None, float("inf")]) is None


def test_a_run_that_never_arrives_counts_as_the_last() -> None:
    runs = [run_of("a", 0, [4.0, 1.0]), run_of("a", 1, [4.0, 2.0, 0.5]), run_of("a", 2, [4.0, 3.0])]
    assert Arrival.of(runs, 1.0) == Arrival(2, 3, seconds=2.0, worst_seconds=None, steps=4.0, worst_steps=None)
    assert Arrival.of(runs[:1] + runs[2:], 1.0) == Arrival(1, 2, None, None, None, None)
