"""Sunspots of the years to come, by a latent ODE that starts from those of the last years."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError
from pullback.problems.models import seeded
from pullback.problems.odes import Observed, OwnClock, ode_block, small_field
from pullback.problems.preparation import at_least, dtype_of
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register

_FILE = Path("series") / "sunspots_yearly.csv.gz"
_REMEDY = "put sunspots.csv of github.com/statsmodels/statsmodels, gzipped, in DATA/series/sunspots_yearly.csv.gz."
#: The first year that is forecast for the test.
_TEST = 1929


@register("sunspots")
def sunspots(
    *,
    window: int = 16,
    ahead: int = 8,
    latent: int = 4,
    width: int = 12,
    batch_size: int | None = None,
    solver: str = "dopri5",
    tolerance: float = 1e-4,
    adjoint: bool = True,
    dtype: str = "float64",
    data: Path | None = None,
) -> Problem:
    """Yearly sunspots, the next 8 years from the last 16: encoder, latent flow of a tanh field, decoder, float64.

    A latent ODE (Chen, Rubanova, Bettencourt & Duvenaud 2018, section 5) without its noise: a linear layer reads the
    window, the latent state flows for T years, another one reads that. Square roots of the numbers, standardised by the
    years trained on; a row is a window with one T. Years before 1929 are trained on, forecasts of later ones the test.

    Args:
        window: Years that are read.
        ahead: Years that are forecast.
        latent: Numbers of the latent state.
        width: Hidden width of the field.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time.
        dtype: "float32" or "float64".
        data: Folder that contains ``series/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem: inputs (N, window + 1), targets (N, 1).

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
    """
    kind = dtype_of("sunspots", dtype)
    for option, value in (("window", window), ("ahead", ahead), ("latent", latent), ("width", width)):
        at_least("sunspots", option, value)
    years, numbers = _read(data_folder("sunspots", data, _REMEDY) / _FILE)
    early = int((years < _TEST).sum())
    if window + ahead > early:
        raise DataError(f"sunspots has {early} years before {_TEST}; window + ahead = {window + ahead} must be less.")
    roots = numbers.sqrt()
    values = ((roots - roots[:early].mean()) / roots[:early].std(correction=0)).to(kind)

    def model() -> nn.Module:
        field = OwnClock(small_field(latent, width, kind))
        block = ode_block("sunspots", field, solver, tolerance, adjoint=adjoint)
        return Observed(nn.Linear(window, latent, dtype=kind), block, nn.Linear(latent, 1, dtype=kind))

    return Problem(
        name="sunspots",
        make_model=seeded(model),
        train=_windows(values, range(window, early - ahead + 1), window, ahead),
        test=_windows(values, range(early, len(values) - ahead + 1), window, ahead),
        criterion=nn.MSELoss(),
        batch_size=batch_size,
        dtype=kind,
        test_metric="rmse",
        targets=(0.3, 0.2, 0.1),
        description="yearly sunspots ahead, latent flow of a tanh field, squared error of standardised square roots",
    )


def _windows(values: Tensor, first: range, window: int, ahead: int) -> Split:
    """Windows that end before a year, beside T, and the value after T years; T = 1 is that year itself."""
    inputs, targets = [], []
    for year in first:
        for lead in range(1, ahead + 1):
            inputs.append(torch.cat([values[year - window : year], values.new_tensor([lead])]))
            targets.append(values[year + lead - 1 : year + lead])
    return torch.stack(inputs), torch.stack(targets)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:]
        table = torch.tensor([[float(cell.strip('"')) for cell in line.split(",")[:2]] for line in lines if line])
        if table.ndim != 2 or table.shape[1] != 2 or not bool((table >= 0).all()):
            raise ValueError("not two columns of numbers from zero on")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REMEDY}") from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {_REMEDY}") from error
    return table[:, 0], table[:, 1].double()
