from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pullback.cli.app import app

FILE = '''
import os
import signal
import torch
from torch import nn
from pullback.problems import Problem

class Stops(nn.MSELoss):
    """Presses Ctrl-C at the n-th loss that is computed for training."""
    seen = 0
    def __init__(self, at):
        super().__init__()
        self.at = at
    def forward(self, outputs, targets):
        Stops.seen += torch.is_grad_enabled()
        if self.at and Stops.seen >= self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(outputs, targets)

def make(rows: int = 8, stop: int = 0, validation: bool = False) -> Problem:
    x = torch.linspace(-1, 1, rows).unsqueeze(1)
    return Problem(name="line", make_model=lambda seed: nn.Linear(1, 1), train=(x, 2 * x), test=(x, 2 * x),
                   validation=(x[1::2], 2 * x[1::2]) if validation else None,
                   criterion=Stops(stop) if stop else nn.MSELoss(), test_metric="rmse", targets=(0.1, 1e-9))
'''


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A quick problem in a file of one's own."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return f"{path}:make"


@pytest.fixture
def pullback(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command line within this process."""
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*args: str) -> Result:
        return CliRunner().invoke(app, list(args), prog_name="pullback")

    return invoke
