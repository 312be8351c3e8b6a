from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pullback.problems import Problem

f64 = torch.float64
Make = Callable[..., Problem]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def line() -> Make:
    """A small regression, 26 samples to train on and 10 more, that takes the fields of a problem."""

    def make(model: Callable[[], nn.Module] | None = None, rows: int = 26, **fields: object) -> Problem:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(rows + 10, 2, dtype=f64, generator=generator)
        y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(rows + 10, 1, dtype=f64, generator=generator)
        own = model or (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
        given = {
            "name": "line", "make_model": lambda seed: own(),
            "train": (x[:rows], y[:rows]), "test": (x[rows:], y[rows:]),
            "criterion": nn.MSELoss(), "test_metric": "rmse", "dtype": f64,
        }  # fmt: skip
        return Problem(**(given | fields))  # type: ignore[arg-type]

    return make
