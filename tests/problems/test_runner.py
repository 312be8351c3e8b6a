from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.problems import Budget, InterruptedRun, Problem, Progress, SpecError, clock, compare, evaluator, run
from pullback.problems.errors import one_line
from pullback.problems.machine import machine, measuring
from pullback.problems.runner import batches

Fake = Callable[[str, Callable[..., Any]], None]


class Scripted(torch.optim.SGD):
    """SGD that does something of its own at its third step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 3:
            self.act()
        return super().step(closure)

    def act(self) -> None:
        """For the cases to override."""


class Raises(Scripted):
    def act(self) -> None:
        raise RuntimeError("the matrix is singular\nand more of it")


class Interrupts(Scripted):
    def act(self) -> None:
        raise KeyboardInterrupt


class Explodes(Scripted):
    def act(self) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.nan)


def test_the_record_of_a_run(line: Problem) -> None:
    result = run(line, "sgd:lr=0.5", seed=3, budget=Budget(steps=60))
    assert (result.optimizer, result.options, result.seed, result.steps) == ("sgd", {"lr": 0.5}, 3, 60)
    assert [evaluation.step for evaluation in result.history[:4]] == [0, 1, 2, 3]
    assert result.history[0].seconds == 0.0
    assert result.history[-1].step == 60
    assert result.loss is not None
    assert result.test is not None
    assert result.loss < 1e-4 < result.history[0].loss
    assert result.seconds > 0
    assert result.ms_per_step == pytest.approx(1e3 * result.seconds / 60)
    assert result.failure is None
    first = next(evaluation for evaluation in result.history if evaluation.loss <= 1.0)
    assert result.reached == {1.0: first.seconds, 1e-30: None}


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adam", "adamw", "rmsprop", "lbfgs", "muon", "soap", "layerwise-metric", "gauss-newton"]
)
def test_every_optimizer_lowers_the_loss(line: Problem, optimizer: str) -> None:
    result = run(line, f"{optimizer}:lr=0.1", budget=Budget(steps=10))
    assert result.failure is None
    assert result.loss is not None
    assert result.loss < result.history[0].loss


@pytest.mark.parametrize("optimizer", ["layerwise-metric:samples=1", "gauss-newton:samples=2,damping=0.1"])
def test_ours_with_samples(line: Problem, optimizer: str) -> None:
    result = run(line, optimizer, budget=Budget(steps=10))
    assert result.failure is None
    assert result.loss is not None
    assert result.loss < result.history[0].loss


def test_ours_report_their_coverage_and_leave_no_hooks(line: Problem) -> None:
    models: list[nn.Module] = []
    watched = dataclasses.replace(line, make_model=lambda seed: models.append(nn.Linear(1, 1)) or models[-1])
    assert "exact" in (run(watched, "layerwise-metric", budget=Budget(steps=2)).coverage or "")
    assert run(line, "adam", budget=Budget(steps=2)).coverage is None
    assert not any(model._forward_hooks or model._forward_pre_hooks for model in models)
    assert not line.criterion._forward_hooks
    assert not line.criterion._forward_pre_hooks


def test_a_seed_means_one_model_and_one_order_for_all_optimizers(line: Problem, fake: Fake) -> None:
    seen: dict[str, list[float]] = {"a": [], "b": []}

    def spy(name: str) -> Callable[..., Any]:
        class Spy(torch.optim.SGD):
            def __init__(self, params: Any) -> None:
                super().__init__(params, lr=0.0)
                if name == "b":
                    torch.rand(5)  # A constructor that draws numbers changes nothing.

            def step(self, closure: Any = None) -> None:
                weight = self.param_groups[0]["params"][0]
                seen[name].extend([weight.item(), weight.grad.item(), torch.rand(()).item()])

        return Spy

    fake("a", spy("a"))
    fake("b", spy("b"))
    problem = dataclasses.replace(line, batch_size=5)
    for name in seen:
        run(problem, name, seed=4, budget=Budget(epochs=2))
    assert seen["a"] == seen["b"]
    seen["b"].clear()
    run(problem, "b", seed=5, budget=Budget(epochs=2))
    assert seen["a"] != seen["b"]


def test_an_epoch_draws_every_row_once() -> None:
    x = torch.arange(11.0)
    problem = Problem(
        name="count",
        make_model=lambda seed: nn.Identity(),
        train=(x, x),
        criterion=nn.MSELoss(),
        batch_size=4,
    )
    source = batches(problem, seed=1)
    first, second = ([next(source) for _ in range(3)] for _ in range(2))
    assert [len(inputs) for inputs, _ in first] == [4, 4, 3]
    for epoch in (first, second):
        assert torch.equal(torch.cat([inputs for inputs, _ in epoch]).sort().values, x)
        assert all(torch.equal(inputs, targets) for inputs, targets in epoch)
    assert not torch.equal(torch.cat([inputs for inputs, _ in first]), torch.cat([inputs for inputs, _ in second]))


class FakeTime:
    """A clock that stands still unless somebody works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        fake = types.SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: 2 * self.now)
        monkeypatch.setattr(clock, "time", fake)


def slow(line: Problem, clock: FakeTime) -> Problem:
    class Slow(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            clock.now += 1.0 if self.training else 100.0
            return super().forward(inputs)

    return dataclasses.replace(line, make_model=lambda seed: Slow(1, 1))


def test_only_training_steps_are_charged(line: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime(monkeypatch)
    result = run(slow(line, clock), "sgd:lr=0.5", budget=Budget(steps=7))
    assert (result.seconds, result.cpu_seconds) == (7.0, 14.0)
    assert [(evaluation.seconds, evaluation.step) for evaluation in result.history] == [(k, k) for k in range(8)]
    assert clock.now > 8 * 2 * 100


def test_seconds_are_charged_seconds(line: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(slow(line, FakeTime(monkeypatch)), "sgd:lr=0.5", budget=Budget(seconds=4.5))
    assert (result.steps, result.seconds) == (5, 5.0)
    assert result.history[-1].step == 5


def test_an_exception_is_the_failure_and_the_history_stays(line: Problem, fake: Fake) -> None:
    fake("raises", Raises)
    result = run(line, "raises", budget=Budget(steps=10))
    assert result.failure == "RuntimeError: the matrix is singular"
    assert result.steps == 2
    assert [evaluation.step for evaluation in result.history] == [0, 1, 2]


def test_a_constructor_may_fail_too(line: Problem, fake: Fake) -> None:
    def cannot(params: Any) -> Any:
        raise NotImplementedError

    fake("cannot", cannot)
    result = run(line, "cannot", budget=Budget(steps=10))
    assert (result.failure, result.steps, len(result.history)) == ("NotImplementedError", 0, 1)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_loss_that_is_not_finite_ends_the_run(line: Problem, fake: Fake, batch_size: int | None) -> None:
    fake("explodes", Explodes)
    result = run(dataclasses.replace(line, batch_size=batch_size), "explodes", budget=Budget(steps=400))
    assert result.failure == "the training loss is nan"
    assert result.steps in (3, 4)
    assert result.loss is None
    assert result.best_loss is not None
    assert result.to_json()["history"][-1][2] is None


def test_ctrl_c_keeps_what_was_reached(line: Problem, fake: Fake) -> None:
    fake("interrupts", Interrupts)
    with pytest.raises(InterruptedRun) as caught:
        run(line, "interrupts", budget=Budget(steps=10))
    partial = caught.value.run
    assert (partial.steps, len(partial.history), partial.failure) == (2, 3, "interrupted")
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_problem_that_cannot_be_evaluated_is_refused(line: Problem) -> None:
    odd = dataclasses.replace(line, make_model=lambda seed: nn.Linear(3, 1))
    with pytest.raises(SpecError, match="line cannot be evaluated"):
        run(odd, "sgd")
    broken = dataclasses.replace(line, make_model=lambda seed: nn.Linear(1, seed // 0))
    with pytest.raises(SpecError, match="make_model of line raised ZeroDivisionError"):
        compare(broken, "sgd")


def test_progress_is_told_of_each_step(line: Problem) -> None:
    told: list[Progress] = []
    run(line, "sgd:lr=0.5", seed=2, budget=Budget(steps=4), progress=told.append)
    assert [(event.steps, event.fraction) for event in told] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert {(event.label, event.seed) for event in told} == {("sgd:lr=0.5", 2)}
    assert told[-1].loss < told[0].loss


def test_evaluations_are_in_eval_mode_and_disturb_nothing(line: Problem) -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    problem = dataclasses.replace(line, make_model=lambda seed: net)
    result = run(problem, "sgd:lr=0.0", budget=Budget(steps=3))
    assert len({evaluation.loss for evaluation in result.history}) == 1
    assert net.training


def test_large_data_is_evaluated_in_pieces(line: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(line, "sgd:lr=0.1", budget=Budget(steps=2))
    monkeypatch.setattr(evaluator, "_CHUNK", 5)
    pieces = run(line, "sgd:lr=0.1", budget=Budget(steps=2))
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-12)


def test_torch_is_put_back_as_it_was(line: Problem) -> None:
    denormal = torch.full((1,), 1e-310, dtype=torch.float64)
    state = torch.random.get_rng_state()
    with measuring(2):
        assert torch.get_num_threads() == 2
        assert denormal.mul(1.0).item() == 0.0
        torch.rand(3)
        with measuring(1):
            pass
        assert denormal.mul(1.0).item() == 0.0
    assert torch.get_num_threads() == 1
    assert denormal.mul(1.0).item() != 0.0
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_machine_is_named() -> None:
    named = machine(3)
    assert set(named) == {"cpu", "cores", "threads", "python", "torch", "platform"}
    assert named["threads"] == 3
    assert named["torch"] == torch.__version__
    assert all(value for value in named.values())


def test_one_line() -> None:
    assert one_line(ValueError("a\nb")) == "ValueError: a"
    assert one_line(ValueError()) == "ValueError"
