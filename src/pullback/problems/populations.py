"""Lynx and hare: the fur trade's numbers, fitted by Lotka and Volterra's equations or by a network."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError
from pullback.problems.models import seeded
from pullback.problems.odes import Observed, OwnClock, ode_block, small_field
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register
from pullback.problems.trajectories import Trajectories

_FILE = Path("series") / "hudson-bay-lynx-hare.csv.gz"
_REMEDY = "put hudson-bay-lynx-hare.csv of github.com/stan-dev/example-models, gzipped, in DATA/series."
_FIELDS = ("lotka-volterra", "neural")
#: Thousands of pelts: with this unit all rates are of the order of one per year.
_UNIT = 30.0
_FIRST = 1900


class LotkaVolterra(nn.Module):
    r"""Hares u and lynxes v in logarithms: :math:`(\log u)' = \alpha - \beta v,\ (\log v)' = -\gamma + \delta u`.

    The parameters are the logarithms of the four rates, so that these stay positive.

    Args:
        logs: The initial logarithms of alpha, beta, gamma, delta.
    """

    def __init__(self, logs: Tensor) -> None:
        super().__init__()
        self.logs = nn.Parameter(logs)

    def forward(self, state: Tensor) -> Tensor:
        """The velocity.

        Args:
            state: log u and log v, shape (N, 2).

        Returns:
            Shape (N, 2).
        """
        alpha, beta, gamma, delta = self.logs.exp()
        hare, lynx = state.exp().unbind(1)
        return torch.stack([alpha - beta * lynx, delta * hare - gamma], 1)


class Start(nn.Module):
    """An initial state that is learned, the same for all rows.

    Args:
        state: The first guess, shape (d,).
    """

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = nn.Parameter(state)

    def forward(self, rows: Tensor) -> Tensor:
        """The state.

        Args:
            rows: Anything with one row per sample, shape (N, ...).

        Returns:
            Shape (N, d).
        """
        return self.state.expand(len(rows), -1)


@register("lynx-hare")
def lynx_hare(
    *,
    field: Literal["lotka-volterra", "neural"] = "lotka-volterra",
    ahead: int = 0,
    width: int = 16,
    spread: float = 0.2,
    solver: str = "rk4",
    steps: int = 40,
    tolerance: float = 1e-5,
    adjoint: bool = False,
    data: Path | None = None,
) -> Problem:
    """Pelts of lynx and hare, Hudson Bay 1900 to 1920: flow of Lotka and Volterra's 4 rates or of a network, float64.

    The mean squared error of the logarithms, over all 21 years; the state of 1900 is learned too. Rates and state are
    those of the Stan case study (Carpenter 2018), without its priors. A network that is to make all 20 years at once
    stops at their mean, whatever the optimizer; let it look a few years ahead.

    Args:
        field: "lotka-volterra", or "neural" for a tanh field 2-16-2 of the logarithms.
        ahead: Years to look ahead from every observed year, from 1 to 20; 0 for all years from a learned start.
        width: Hidden width of the neural field.
        spread: Standard deviation of the logarithms of the first guess of the rates, around one per year.
        solver: Method of torchdiffeq.
        steps: Steps of a solver of fixed ones over the longest time. Trial steps may try rates at which an adaptive
            solver takes thousands.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; few steps are quicker without.
        data: Folder that contains ``series/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem: inputs (N, 1) years since 1900, or (N, 3) with the state they are counted from in front; targets
        (N, 2), logarithms of hares and lynxes in 30,000 pelts.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
    """
    if field not in _FIELDS:
        raise SpecError(f"field of lynx-hare cannot be {field!r}; give {' or '.join(_FIELDS)}.")
    if not (spread >= 0 and math.isfinite(spread)):
        raise SpecError(f"spread of lynx-hare is {spread}; give 0 or more.")
    at_least("lynx-hare", "width", width)
    if not 0 <= ahead <= 20:
        raise SpecError(
            f"ahead of lynx-hare is {ahead}; give 1 to 20 years, or 0 for all of them from a learned start."
        )
    years, logs = _read(data_folder("lynx-hare", data, _REMEDY) / _FILE)

    def model() -> nn.Module:
        own: nn.Module = (
            LotkaVolterra(spread * torch.randn(4, dtype=torch.float64))
            if field == "lotka-volterra"
            else small_field(2, width, torch.float64)
        )
        block = ode_block("lynx-hare", OwnClock(own), solver, tolerance, adjoint=adjoint, steps=steps)
        return Observed(nn.Identity() if ahead else Start(logs[0].clone()), block)

    return Problem(
        name="lynx-hare",
        make_model=seeded(model),
        train=_ahead(logs, ahead) if ahead else (years, logs),
        criterion=nn.MSELoss(),
        dtype=torch.float64,
        targets=(0.1, 0.06) if field == "lotka-volterra" else (0.1, 0.03),
        description=f"lynx and hare, {field} field, squared error of the logarithms",
        trajectories=_shown(years, logs, ahead),
    )


def _ahead(logs: Tensor, ahead: int) -> Split:
    """Every observed state beside 1 to `ahead` years, and the states observed then."""
    inputs, targets = [], []
    for years in range(1, ahead + 1):
        now = logs[:-years]
        inputs.append(torch.cat([now, torch.full_like(now[:, :1], years)], 1))
        targets.append(logs[years:])
    return torch.cat(inputs), torch.cat(targets)


def _shown(years: Tensor, logs: Tensor, ahead: int) -> Trajectories:
    """All years from 1900, or the years ahead of every `ahead`-th one."""
    last = len(logs) - 1
    starts = torch.arange(0, last, ahead or last)
    return Trajectories(
        times=_FIRST + years[:, 0],
        observed=logs,
        pieces=logs[starts] if ahead else logs[:1, :0],
        begins=_FIRST + years[starts, 0],
        lengths=(last - starts).clamp(max=ahead or last).to(logs.dtype),
        names=("hare", "lynx"),
        unit="thousands of pelts",
        time="year",
        view=lambda states: _UNIT * states.exp(),
    )


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        rows = [[float(cell) for cell in line.split(",")] for line in lines if line[:1].isdigit()]
        table = torch.tensor(rows, dtype=torch.float64)
        if table.ndim != 2 or table.shape[1] != 3 or not bool((table > 0).all()):
            raise ValueError("not three columns of positive numbers")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REMEDY}") from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {_REMEDY}") from error
    return table[:, :1] - table[0, 0], (table[:, [2, 1]] / _UNIT).log()
