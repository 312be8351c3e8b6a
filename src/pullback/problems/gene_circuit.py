r"""A synthetic gene circuit whose rates evolve until it answers a band of inducer concentrations.

Three genes in an incoherent feed-forward loop: the inducer I switches on X, X switches on Y and the reporter Z, Y
switches Z off. Per gene, mRNA m and protein p (molecules per cell, minutes):

.. math:: m' = \alpha (\ell + (1 - \ell) h) - \delta_m m, \qquad p' = \beta m - \delta_p p

.. math:: h_X = \sigma(n \ln(I/K)), \qquad h_Y = \sigma(n \ln(p_X/K)), \qquad
          h_Z = \sigma(n_X \ln(p_X/K_X)) \, \sigma(-n_Y \ln(p_Y/K_Y))

with :math:`\sigma(n \ln x) = x^n / (1 + x^n)`, Hill's function. Rates to begin with are those of the repressilator
(Elowitz and Leibler, Nature 403, 2000); that such loops are concentration sensors is in Entus, Aufderheide and Sauro,
Systems and Synthetic Biology 1, 2007. Nothing acts back, so the steady state is a composition of maps, and parameters
are the logarithms of all rates, thresholds and exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pullback.modules import RiemannianModule, Series, parallel, riemannian, series
from pullback.problems.errors import SpecError
from pullback.problems.models import seeded
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem
from pullback.problems.registry import register

#: Share of a promoter's strength that it has when it is off.
LEAK = 1e-3
#: Molecules of Y at which Z is half off to begin with: a weak operator. With 40, as all others, the circuit is silent.
REPRESSION = 1000.0
#: Logarithms of transcripts per minute, molecules per cell at half strength, and the exponent.
PROMOTER = {"alpha": math.log(30.0), "K": math.log(40.0), "n": math.log(2.0)}
#: Logarithms of proteins per transcript and minute (20 per life), and of decays at half-lives of 2 and 10 minutes.
PRODUCT = {
    "beta": math.log(20 * math.log(2) / 2),
    "decay_m": math.log(math.log(2) / 2),
    "decay_p": math.log(math.log(2) / 10),
}
#: Logarithms of the reporter wanted: molecules per cell far from the band, and those added at its centre.
FLOOR, HEIGHT = 20.0, 2000.0
GENES = ("X", "Y", "Z")


def _activated(x: Tensor, alpha: Tensor, K: Tensor, n: Tensor) -> Tensor:
    """Ln of transcripts per minute from ln of an activator, (N, 1) to (N, 1)."""
    return alpha + torch.log(LEAK + (1 - LEAK) * torch.sigmoid(n.exp() * (x - K)))


def _gated(x: Tensor, alpha: Tensor, K: Tensor, n: Tensor) -> Tensor:
    """Ln of transcripts per minute from ln of an activator and a repressor, (N, 2) to (N, 1); K and n are (2,)."""
    s = torch.sigmoid(n.exp() * (x - K) * x.new_tensor([1.0, -1.0]))
    return alpha + torch.log(LEAK + (1 - LEAK) * s.prod(1, keepdim=True))


def _product(x: Tensor, beta: Tensor, decay_m: Tensor, decay_p: Tensor) -> Tensor:
    """Ln of molecules of protein from ln of transcripts per minute, in the steady state, (N, 1) to (N, 1)."""
    return x + beta - decay_m - decay_p


class Circuit(Series):
    """The steady state of the loop as a Riemannian module: ln of the inducer (N, 1) to ln of the reporter (N, 1).

    Args:
        logs: parameters by gene and name (see ``PROMOTER`` and ``PRODUCT``), one-dimensional.
        promoter_mass: D of the parameters of promoters.
        product_mass: D of the parameters of translation and decay.
    """

    def __init__(
        self, logs: Mapping[str, Mapping[str, Tensor]], *, promoter_mass: float = 1.0, product_mass: float = 4.0
    ) -> None:
        genes: dict[str, tuple[RiemannianModule, RiemannianModule]] = {}
        for gene in GENES:
            rule, inputs = (_gated, 2) if gene == "Z" else (_activated, 1)
            own = logs[gene]
            genes[gene] = (
                riemannian(rule, {k: own[k] for k in PROMOTER}, mass=promoter_mass, inputs=inputs, outputs=1),
                riemannian(_product, {k: own[k] for k in PRODUCT}, mass=product_mass, inputs=1, outputs=1),
            )
        x, y, z = (series(*genes[gene]) for gene in GENES)
        super().__init__(x, parallel(riemannian(nn.Identity(), inputs=1, outputs=1), y, join="concatenate"), z)
        self._genes = (genes,)  # in a tuple: registered once, where they are used

    def gene(self, name: str) -> tuple[RiemannianModule, RiemannianModule]:
        """Promoter and product of a gene, "X", "Y" or "Z"."""
        return self._genes[0][name]

    def logs(self, name: str) -> dict[str, Tensor]:
        """The parameters of a gene by name, as they are now, detached."""
        return {k.rpartition(".")[2]: p.detach() for part in self.gene(name) for k, p in part.named_parameters()}

    def dynamics(self, inducer: Tensor) -> Callable[[Tensor], Tensor]:
        """The vector field of mRNA and protein at a concentration of the inducer.

        Args:
            inducer: ln of it, one number.

        Returns:
            From [m_X, p_X, m_Y, p_Y, m_Z, p_Z], (6,), to its derivative per minute, (6,).
        """

        def field(state: Tensor) -> Tensor:
            p = state[1::2].log()
            seen = {"X": inducer.reshape(1, 1), "Y": p[:1].reshape(1, 1), "Z": p[:2].reshape(1, 2)}
            slopes = []
            for k, gene in enumerate(GENES):
                own, (m, level) = self.logs(gene), state[2 * k : 2 * k + 2]
                made = self.gene(gene)[0](seen[gene]).reshape(()).exp()
                slopes.append(made - own["decay_m"].exp() * m)
                slopes.append(own["beta"].exp() * m - own["decay_p"].exp() * level)
            return torch.cat([slope.reshape(1) for slope in slopes])

        return field

    def simulate(self, inducer: Tensor, state: Tensor, minutes: float, step: float = 0.5) -> Tensor:
        """The circuit over time by Runge and Kutta's method of order 4.

        Args:
            inducer: ln of its concentration, one number.
            state: molecules to begin with, (6,), proteins positive.
            minutes: how long.
            step: of the integrator, minutes.

        Returns:
            States at every step, (steps + 1, 6).
        """
        f, seen = self.dynamics(inducer), [state]
        for _ in range(round(minutes / step)):
            a = f(state)
            b = f(state + step / 2 * a)
            c = f(state + step / 2 * b)
            state = state + step / 6 * (a + 2 * b + 2 * c + f(state + step * c))
            seen.append(state)
        return torch.stack(seen)


def band(inducer: Tensor, width: float) -> Tensor:
    """Ln of the reporter that is wanted at ln of the inducer, both (N, 1)."""
    return torch.log(FLOOR + HEIGHT * torch.exp(-(inducer / width).square() / 2))


def peak_error(model: nn.Module) -> float:
    """How far the peak of the response is from the inducer's concentration it should be at, in decades."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        return abs(float(x[int(model(x * math.log(10)).argmax())]))


@register("gene-circuit")
def gene_circuit(
    *, levels: int = 25, width: float = 1.5, spread: float = 0.5, promoter_mass: float = 1.0, product_mass: float = 4.0
) -> Problem:
    """A gene circuit that evolves into a band detector for an inducer, 20 log rates: full batch, float64.

    In the steady state 20 molecules of the reporter are wanted per cell, and 2000 more in a band around the inducer's
    concentration 1. The loss is the mean square of the difference of natural logarithms, over concentrations from 1e-2
    to 1e2. The test metric is the distance of the peak from 1, in decades. The seed draws the circuit to begin with.

    Args:
        levels: concentrations of the inducer, equally spaced in their logarithms.
        width: of the band, standard deviation in units of the natural logarithm.
        spread: standard deviation of the initial logarithms around the literature's.
        promoter_mass: mutational mass of promoters: strength, thresholds, exponents.
        product_mass: mutational mass of translation and decay. Both are in ``model.masses()``, for optimizers made in
            Python.

    Returns:
        The problem: inputs (levels, 1), ln of the inducer; targets (levels, 1), ln of the reporter.

    Raises:
        SpecError: If a number makes no sense.
    """
    at_least("gene-circuit", "levels", levels, 2)
    numbers = {"width": width, "promoter_mass": promoter_mass, "product_mass": product_mass}
    for option, value in numbers.items():
        if not (value > 0 and math.isfinite(value)):
            raise SpecError(f"{option} of gene-circuit is {value}; give a positive number.")
    if not (spread >= 0 and math.isfinite(spread)):
        raise SpecError(f"spread of gene-circuit is {spread}; give 0 or more.")
    inducer = math.log(10) * torch.linspace(-2, 2, levels, dtype=torch.float64).unsqueeze(1)

    def first() -> Circuit:
        return Circuit(_drawn(spread), promoter_mass=promoter_mass, product_mass=product_mass)

    return Problem(
        name="gene-circuit",
        make_model=seeded(first),
        train=(inducer, band(inducer, width)),
        criterion=nn.MSELoss(),
        dtype=torch.float64,
        model_metric=peak_error,
        targets=(0.1, 1e-2, 1e-3),
        description="incoherent feed-forward loop of three genes, squared error of the log reporter",
    )


def _drawn(spread: float) -> dict[str, dict[str, Tensor]]:
    """Parameters around the literature's; X is switched by the inducer, in units of what it takes."""
    logs: dict[str, dict[str, Tensor]] = {}
    for gene in GENES:
        centre = {**PROMOTER, **PRODUCT} | ({"K": 0.0} if gene == "X" else {})
        size = {name: 2 if gene == "Z" and name in {"K", "n"} else 1 for name in centre}
        logs[gene] = {
            name: value + spread * torch.randn(size[name], dtype=torch.float64) for name, value in centre.items()
        }
    logs["Z"]["K"][1] += math.log(REPRESSION) - PROMOTER["K"]
    return logs
