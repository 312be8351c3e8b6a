from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from pullback.problems import Budget, MissingExtraError, Problem, SpecError, compare, load_problem, parse_optimizer, run


class Bent(nn.Module):
    """a tanh(b x), two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * torch.tanh(self.b * x)


@pytest.fixture
def bent(line: Problem) -> Problem:
    x = line.train[0]
    return dataclasses.replace(
        line, make_model=lambda seed: Bent(), train=(x, 2 * torch.tanh(3 * x)), test=None, targets=(1e-6, 1e-20)
    )


@pytest.mark.parametrize("method", ["trf", "dogbox", "lm"])
@pytest.mark.parametrize("scale", ["unit", "jac"])
def test_it_solves_and_keeps_a_history(bent: Problem, method: str, scale: str) -> None:
    result = run(bent, f"least-squares:method={method},x_scale={scale}", budget=Budget(steps=60))
    assert result.failure is None
    assert (result.loss or 0.0) < 1e-20
    assert 3 <= result.steps < 60  # It ends by itself.
    assert [evaluation.step for evaluation in result.history] == list(range(result.steps + 1))
    assert result.trials_per_step is not None
    assert result.trials_per_step >= 1
    assert (result.steps_to[1e-6] or 0) < result.steps
    assert all(0 < evaluation.seconds <= result.seconds for evaluation in result.history[1:])


def test_the_budget_and_a_loss_end_it(bent: Problem) -> None:
    half = dataclasses.replace(bent, loss_scale=0.5)
    whole, scaled = (run(p, "least-squares", budget=Budget(steps=2)) for p in (bent, half))
    assert (whole.steps, scaled.steps) == (2, 2)
    assert scaled.history[0].loss == pytest.approx(0.5 * whole.history[0].loss)
    assert run(bent, "least-squares", budget=Budget(steps=60), until=1e-6).steps == whole_steps(bent)
    batches = dataclasses.replace(bent, batch_size=5)
    assert run(batches, "least-squares", budget=Budget(epochs=2)).steps == 2
    summed = dataclasses.replace(bent, criterion=nn.MSELoss(reduction="sum"))
    assert (run(summed, "least-squares", budget=Budget(steps=60)).loss or 0.0) < 1e-20


def whole_steps(problem: Problem) -> int | None:
    return run(problem, "least-squares", budget=Budget(steps=60)).steps_to[1e-6]


def test_other_losses_are_refused() -> None:
    with pytest.raises(SpecError, match=r"least-squares refuses: .* the criterion is CrossEntropyLoss; choose"):
        compare(load_problem("wine"), "sgd,least-squares", seeds=1, budget=Budget(steps=1))
    with pytest.raises(SpecError, match="give trf, dogbox or lm"):
        run(load_problem("diabetes"), "least-squares:method=newton", budget=Budget(steps=1))


def test_a_model_that_mixes_samples_fails_in_words(line: Problem) -> None:
    class Mixes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(0)) + 1

    result = run(
        dataclasses.replace(line, make_model=lambda seed: Mixes(1, 1)), "least-squares", budget=Budget(steps=3)
    )
    assert result.failure is not None
    assert "mixes samples" in result.failure


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r'least-squares needs scipy: pip install "pullback\[problems\]"'):
        parse_optimizer("least-squares")
