"""Sunspots of the years to come, by ODEs that start from those of the last years."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError
from pullback.problems.irregular import ODERNN, PairRNN, ends, forecasts, interleaved, kept
from pullback.problems.models import seeded
from pullback.problems.odes import Observed, OwnClock, ode_block, small_field
from pullback.problems.preparation import at_least, data_generator, dtype_of
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register
from pullback.problems.trajectories import Trajectories

Model: TypeAlias = Literal["latent", "ode-rnn"]

_FILE = Path("series") / "sunspots_yearly.csv.gz"
_REMEDY = "put sunspots.csv of github.com/statsmodels/statsmodels, gzipped, in DATA/series/sunspots_yearly.csv.gz."
#: The first year that is forecast for the test.
_TEST = 1929
#: Years whose observations are read if nothing is said, and the largest share of years that may be missing.
_YEARS, _MOST = 16, 0.9


@register("sunspots")
def sunspots(
    *,
    model: Model = "latent",
    missing: float = 0.0,
    window: int | None = None,
    ahead: int = 8,
    latent: int = 4,
    width: int = 12,
    batch_size: int | None = None,
    solver: str | None = None,
    steps: int = 4,
    tolerance: float = 1e-4,
    adjoint: bool | None = None,
    dtype: str = "float64",
    data: Path | None = None,
) -> Problem:
    """Yearly sunspots, the next 8 years from the last 16: encoder, latent flow of a tanh field, decoder, float64.

    A latent ODE (Chen, Rubanova, Bettencourt & Duvenaud 2018, section 5) without its noise: a linear layer reads the
    window, the latent state flows for T years, another one reads that. Square roots of the numbers, standardised by the
    years trained on; a row is a window with one T. Years before 1929 are trained on, forecasts of later ones the test.
    Where years are missing, the times between those observed are inputs, and a recurrent layer reads both; an ODE-RNN
    flows between observations and is updated by a GRU cell at each (Rubanova, Chen & Duvenaud 2019).

    Args:
        model: "latent", or "ode-rnn".
        missing: Share of all years that are not observed, from 0 on; the seed decides which. They are no targets of the
            training either; the test asks for all.
        window: Observations that are read; None for 16 years' worth of them.
        ahead: Years that are forecast.
        latent: Numbers of the latent state.
        width: Hidden width of the field.
        batch_size: Rows per step, or None for all.
        solver: Method of torchdiffeq; None for dopri5, and rk4 with "ode-rnn", whose flow is solved `window` times.
        steps: Steps of a solver of fixed ones over each of its times.
        tolerance: Relative tolerance of an adaptive solver.
        adjoint: Whether gradients are solved backwards in time; None for yes, and no with "ode-rnn".
        dtype: "float32" or "float64".
        data: Folder that contains ``series/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem: inputs (N, window + 1), the last column T, or (N, 2 window) as in `pullback.problems.irregular`;
        targets (N, 1).

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If an option makes no sense.
    """
    kind = dtype_of("sunspots", dtype)
    if model not in ("latent", "ode-rnn"):
        raise SpecError(f"model of sunspots cannot be {model!r}; give latent or ode-rnn.")
    if not 0 <= missing <= _MOST:
        raise SpecError(f"missing of sunspots is {missing}; give a share from 0 to {_MOST}.")
    window = max(1, round(_YEARS * (1 - missing))) if window is None else window
    for option, value in (("window", window), ("ahead", ahead), ("latent", latent), ("width", width)):
        at_least("sunspots", option, value)
    years, numbers = _read(data_folder("sunspots", data, _REMEDY) / _FILE)
    early = int((years < _TEST).sum())
    often = model == "ode-rnn"
    pairs = often or missing > 0
    solver = solver or ("rk4" if often else "dopri5")
    adjoint = not often if adjoint is None else adjoint

    def make() -> nn.Module:
        field = OwnClock(small_field(latent, width, kind))
        block = ode_block("sunspots", field, solver, tolerance, adjoint=adjoint, steps=steps)
        start: nn.Module = nn.Linear(window, latent, dtype=kind)
        if often:
            start = ODERNN(nn.GRUCell(1, latent, dtype=kind), block)
        elif pairs:
            start = PairRNN(nn.GRU(2, latent, batch_first=True, dtype=kind), nn.Linear(latent, latent, dtype=kind))
        return Observed(start, block, nn.Linear(latent, 1, dtype=kind))

    def drawn(seed: int) -> Problem:
        seen = kept(len(years), missing, data_generator(seed))
        early_seen = seen[seen < early]
        if window + 1 > len(early_seen) or window + ahead > early:
            raise DataError(
                f"sunspots has {len(early_seen)} observations in {early} years before {_TEST}; window = {window} and "
                f"ahead = {ahead} take more."
            )
        roots = numbers.sqrt()
        mean, scale = roots[early_seen].mean(), roots[early_seen].std(correction=0)
        values = ((roots - mean) / scale).to(kind)
        if pairs:
            train = forecasts(values, early_seen, early_seen, window, ahead)
            test = forecasts(values, seen, torch.arange(early, len(values)), window, ahead)
        else:
            train = _windows(values, range(window, early - ahead + 1), window, ahead)
            test = _windows(values, range(early, len(values) - ahead + 1), window, ahead)
        return Problem(
            name="sunspots",
            make_model=seeded(make),
            train=train,
            test=test,
            criterion=nn.MSELoss(),
            batch_size=batch_size,
            dtype=kind,
            test_metric="rmse",
            targets=(0.3, 0.2, 0.1),
            description=f"yearly sunspots ahead, {model}, squared error of standardised square roots",
            trajectories=_shown(years, values, seen, window, ahead, pairs, lambda z: (mean + scale * z).square()),
            redraw=drawn if missing else None,
        )

    return drawn(0)


def _windows(values: Tensor, first: range, window: int, ahead: int) -> Split:
    """Windows that end before a year, beside T, and the value after T years; T = 1 is that year itself."""
    inputs, targets = [], []
    for year in first:
        for lead in range(1, ahead + 1):
            inputs.append(torch.cat([values[year - window : year], values.new_tensor([lead])]))
            targets.append(values[year + lead - 1 : year + lead])
    return torch.stack(inputs), torch.stack(targets)


def _shown(
    years: Tensor,
    values: Tensor,
    seen: Tensor,
    window: int,
    ahead: int,
    pairs: bool,
    view: Callable[[Tensor], Tensor],
) -> Trajectories:
    """Forecasts that follow each other, and what was observed."""
    last = ends(seen, window, ahead)
    read = [seen[end - window : end] for end in last]
    return Trajectories(
        times=years[seen].to(values.dtype),
        observed=values[seen, None],
        pieces=torch.stack([interleaved(values, times) if pairs else values[times] for times in read]),
        begins=torch.stack([years[times[-1]] for times in read]).to(values.dtype),
        lengths=values.new_full((len(read),), float(ahead)),
        names=("sunspots",),
        time="year",
        view=view,
    )


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
