"""An inverse problem: the rates of a reaction network from noisy concentrations over time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pullback.problems.errors import SpecError
from pullback.problems.models import seeded
from pullback.problems.preparation import at_least, data_generator
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register

#: True rates of A + X -> 2 X (A is plenty), X + Y -> 2 Y with its own uptake, and Y -> P.
RATES = {"birth": 1.0, "predation": 0.5, "growth": 0.4, "death": 0.8}
_HORIZON, _STEPS, _EVERY = 6.0, 30, 3


class Rate(nn.Module):
    """One rate, positive: the parameter is its logarithm.

    Args:
        log: The initial logarithm.
    """

    def __init__(self, log: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor([log], dtype=torch.float64))

    def forward(self, initial: Tensor) -> Tensor:
        """The rate, the same in every experiment.

        Args:
            initial: Any tensor with one row per experiment, shape (N, ...).

        Returns:
            Shape (N,).
        """
        rate: Tensor = self.log.exp()
        return rate.expand(len(initial))


class Reactions(nn.Module):
    """Lotka's autocatalytic reactions, integrated by Runge and Kutta's method of order 4 with fixed steps.

    x' = birth x - predation x y, y' = growth x y - death y.

    Args:
        logs: Logarithms of the rates, by name.
        steps: Steps of the integrator over the time of an experiment.
    """

    def __init__(self, logs: dict[str, float], steps: int = _STEPS) -> None:
        super().__init__()
        self.rates = nn.ModuleDict({name: Rate(log) for name, log in logs.items()})
        self.steps = steps

    def forward(self, initial: Tensor) -> Tensor:
        """Concentrations at ten times.

        Args:
            initial: Concentrations of X and Y at time zero, shape (N, 2).

        Returns:
            Shape (N, 20): X and Y at the first time, at the second, and so on.
        """
        birth, predation, growth, death = (self.rates[name](initial) for name in RATES)
        # state' = state * (alone + across state), a matrix per experiment: few operations make a short tape.
        zero = torch.zeros_like(birth)
        across = torch.stack([zero, -predation, growth, zero], 1).unflatten(1, (2, 2))
        alone = torch.stack([birth, -death], 1)

        def slope(state: Tensor) -> Tensor:
            change: Tensor = state * (alone + (across @ state.unsqueeze(2)).squeeze(2))
            return change

        h = _HORIZON / self.steps
        state, seen = initial, []
        for step in range(1, self.steps + 1):
            a = slope(state)
            b = slope(state + h / 2 * a)
            c = slope(state + h / 2 * b)
            d = slope(state + h * c)
            state = state + h / 6 * (a + 2 * b + 2 * c + d)
            if step % (self.steps * _EVERY // _STEPS) == 0:
                seen.append(state)
        return torch.cat(seen, 1)


def rate_error(model: nn.Module) -> float:
    """The largest relative error of a rate.

    Args:
        model: A `Reactions`.

    Returns:
        The largest of |k - true| / true.
    """
    assert isinstance(model, Reactions)
    found = {name: math.exp(log.item()) for (name, log) in zip(model.rates, model.parameters(), strict=True)}
    return max(abs(found[name] / true - 1) for name, true in RATES.items())


@register("rates")
def rates(*, experiments: int = 16, noise: float = 0.05, spread: float = 0.5) -> Problem:
    """Inverse problem: 4 rates of Lotka's reactions from noisy concentrations, one module each: full batch, float64.

    The loss is the mean of ((predicted - measured) / noise)^2, so that about 1 is as good as the data allow. The
    data come from the very integrator that is fitted: noise is the only misfit. The test metric is the largest
    relative error of a rate. The seed draws the experiments, the noise and the first guess.

    Args:
        experiments: How many, each with its own initial concentrations, measured at 10 times.
        noise: Standard deviation of the error of a concentration (they are about 0.5 to 6); 0 for exact data,
            and the loss is then the mean of (predicted - measured)^2.
        spread: Standard deviation of the logarithms of the first guess around the true ones.

    Returns:
        The problem: inputs (N, 2), targets (N, 20).

    Raises:
        SpecError: If a number makes no sense.
    """
    at_least("rates", "experiments", experiments)
    for option, value in (("noise", noise), ("spread", spread)):
        if not (value >= 0 and math.isfinite(value)):
            raise SpecError(f"{option} of rates is {value}; give 0 or more.")

    def drawn(seed: int) -> Problem:
        return Problem(
            name="rates",
            make_model=seeded(lambda: _guess(spread)),
            train=_measured(experiments, noise, data_generator(seed)),
            criterion=nn.MSELoss(),
            loss_scale=1 / noise**2 if noise else 1.0,
            dtype=torch.float64,
            model_metric=rate_error,
            targets=(10.0, 1.3) if noise else (1e-6, 1e-10, 1e-20),
            description="rates of Lotka's reactions, Runge-Kutta, squared error over the variance of the noise",
            redraw=drawn,
        )

    return drawn(0)


def _guess(spread: float) -> Reactions:
    return Reactions({name: math.log(true) + spread * float(torch.randn(())) for name, true in RATES.items()})


def _measured(experiments: int, noise: float, generator: torch.Generator) -> Split:
    initial = 0.5 + 1.5 * torch.rand(experiments, 2, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        exact: Tensor = Reactions({name: math.log(true) for name, true in RATES.items()})(initial)
    return initial, exact + noise * torch.randn(exact.shape, dtype=exact.dtype, generator=generator)
