from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pullback.problems import Problem, optimizers
from pullback.problems.optimizer_entry import OptimizerEntry


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_line(*, rows: int = 12, batch_size: int | None = None, targets: tuple[float, ...] = (1.0, 1e-30)) -> Problem:
    """Fits a line; float64 so that little steps show."""
    x = torch.linspace(-1, 1, rows, dtype=torch.float64).unsqueeze(1)
    return Problem(
        name="line",
        make_model=lambda seed: nn.Linear(1, 1),
        train=(x, 3 * x + 1),
        test=(x[::2], 3 * x[::2] + 1),
        criterion=nn.MSELoss(),
        batch_size=batch_size,
        dtype=torch.float64,
        test_metric="rmse",
        targets=targets,
    )


@pytest.fixture
def line() -> Problem:
    return make_line()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Gives an optimizer class a name for the length of a test."""

    def add(name: str, kind: Callable[..., Any]) -> None:
        entry = OptimizerEntry(
            name,
            "a fake",
            source=lambda: kind,
            build=lambda model, _, options: kind(model.parameters(), **options),
        )
        monkeypatch.setitem(optimizers._ENTRIES, name, entry)

    return add
