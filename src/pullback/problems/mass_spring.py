r"""A chain of masses and springs, brought to a reference by a controller that is made of modules.

.. math:: m q_i'' = s(e_{i+1}) - s(e_i) - c q_i' + f_i, \qquad e_i = q_i - q_{i-1}, \qquad s(e) = k e + h e^3

q are displacements from rest, the first spring hangs on a wall (q_0 = 0), the last mass is free (s(e_{n+1}) = 0): the
textbook chain with Duffing's springs. The force :math:`f_i` is what holds the reference r plus what module i says
of the deviations z = q - r and velocities of its own mass and its two neighbours. Controllers have no biases: the
reference is an equilibrium whatever they have learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pullback.modules import RiemannianModule, Series, hierarchy, parallel, riemannian, series
from pullback.problems.errors import SpecError
from pullback.problems.models import seeded
from pullback.problems.preparation import at_least, data_generator
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register

#: Factors of deviation (1/m), velocity (s/m) and control force (1/N) in the residuals.
WEIGHTS = (1.0, 0.5, 0.2)


@dataclass(frozen=True)
class Chain:
    """The chain without its controller, SI units.

    Attributes:
        n: masses, of 1 kg each.
        stiffness: k, N/m.
        hardening: h, N/m^3; 0 for linear springs.
        damping: c, N s/m.
        stretch: elongation of every spring at the reference, m.
        step: of the integrator, s.
    """

    n: int = 3
    stiffness: float = 1.0
    hardening: float = 0.5
    damping: float = 0.1
    stretch: float = 0.3
    step: float = 0.2

    @property
    def reference(self) -> Tensor:
        """r, (n,)."""
        return self.stretch * torch.arange(1, self.n + 1, dtype=torch.float64)

    def elongations(self, q: Tensor) -> Tensor:
        """E from displacements, (..., n) to (..., n)."""
        return torch.cat([q[..., :1], q[..., 1:] - q[..., :-1]], -1)

    def springs(self, q: Tensor) -> Tensor:
        """Forces of the springs on the masses, (..., n) to (..., n)."""
        e = self.elongations(q)
        s = e * (self.stiffness + self.hardening * e * e)
        return torch.cat([s[..., 1:], torch.zeros_like(s[..., :1])], -1) - s

    def energy(self, x: Tensor) -> Tensor:
        """Kinetic and elastic energy, J, of states [z, v], (..., 2 n) to (...)."""
        z, v = x.split(self.n, -1)
        e = self.elongations(self.reference + z)
        elastic = self.stiffness * e.square() / 2 + self.hardening * e**4 / 4
        whole: Tensor = (v.square() / 2 + elastic).sum(-1)
        return whole

    def slope(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Z' and v' of states [z, v], (..., 2 n), under control forces u, (..., n), beside those that hold r."""
        z, v = x.split(self.n, -1)
        r = self.reference
        return v, self.springs(r + z) - self.springs(r) - self.damping * v + u

    def advance(self, xu: Tensor) -> Tensor:
        """One step of the semi-implicit Euler method, [z, v, u] to [z, v], (..., 3 n) to (..., 2 n).

        The new velocity moves the masses, so without damping and control the method is symplectic.
        """
        x, u = xu.split([2 * self.n, self.n], -1)
        z, v = x.split(self.n, -1)
        v = v + self.step * self.slope(x, u)[1]
        return torch.cat([z + self.step * v, v], -1)

    def neighbourhoods(self, x: Tensor) -> Tensor:
        """What the modules see, (..., 2 n) to (..., 6 n): three deviations and three velocities each, zero outside."""
        seen = []
        for part in x.split(self.n, -1):
            padded = nn.functional.pad(part, (1, 1))
            seen += [padded[..., :-2], part, padded[..., 2:]]
        return torch.stack(seen, -1).flatten(-2)


class ControlledChain(Series):
    """The chain in closed loop as a Riemannian module: initial states to weighted deviations, velocities and forces.

    A look puts the control forces beside the state, a step is ``series(advance, look)``, and the rollout a hierarchy in
    time, every step driven by the one before it. All of them share the controllers, one leaf per mass.

    Args:
        chain: what is controlled.
        width: tanh units of each controller, which has 7 times as many weights.
        steps: of the rollout.
        masses: D of each controller's weights, one number per mass.
    """

    def __init__(self, chain: Chain, *, width: int, steps: int, masses: tuple[float, ...]) -> None:
        n = chain.n
        each = [riemannian(_controller(width), mass=mass, inputs=6, outputs=1) for mass in masses]
        see = riemannian(chain.neighbourhoods, {}, inputs=2 * n, outputs=6 * n)
        controllers = series(see, parallel(*each, join="concatenate", split=[6] * n))
        look = parallel(riemannian(nn.Identity(), inputs=2 * n, outputs=2 * n), controllers, join="concatenate")
        above = riemannian(partial(_above, n), {}, inputs=5 * n, outputs=3 * n)
        step = series(above, riemannian(chain.advance, {}, inputs=3 * n, outputs=2 * n), look)
        weights = torch.tensor(WEIGHTS, dtype=torch.float64).repeat_interleave(n).repeat(steps + 1)
        super().__init__(
            hierarchy(look, *[step] * steps),
            riemannian(partial(torch.mul, weights), {}, inputs=len(weights), outputs=len(weights)),
        )
        self.chain = chain
        self._controllers = (controllers,)  # in a tuple: registered once, where it is used

    @property
    def controllers(self) -> RiemannianModule:
        """All controllers as one module, states (N, 2 n) to forces (N, n)."""
        return self._controllers[0]

    def closed_loop(self) -> Callable[[Tensor], Tensor]:
        """The vector field of the chain under its controllers, [z, v] (2 n,) to its derivative (2 n,)."""

        def field(x: Tensor) -> Tensor:
            return torch.cat(self.chain.slope(x, self.controllers(x.unsqueeze(0)).squeeze(0)))

        return field


def _controller(width: int) -> nn.Sequential:
    last = nn.Linear(width, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        last.weight.mul_(0.1)  # begins near the free chain
    return nn.Sequential(nn.Linear(6, width, bias=False, dtype=torch.float64), nn.Tanh(), last)


def _above(n: int, x: Tensor) -> Tensor:
    """The level above's [z, v, u] in what a level gets: the whole's input [z, v] in front of it."""
    return x[:, 2 * n :]


@register("mass-spring")
def mass_spring(
    *,
    masses: int = 3,
    hardening: float = 0.5,
    damping: float = 0.1,
    width: int = 6,
    steps: int = 12,
    states: int = 24,
    mass_ratio: float = 4.0,
) -> Problem:
    """Control of a chain of masses and springs, a module per mass, over a rollout: full batch, float64.

    The chain is let go from random states and is to come to the reference, every spring stretched by 0.3 m. The loss is
    the mean square of deviations in m, velocities in 2 m/s and control forces in 5 N, after every step. Masses of 1 kg,
    springs of 1 N/m. The test metric is the root of that mean square from fresh states. The seed draws the states and
    the first controllers.

    Args:
        masses: how many, hence how many controllers.
        hardening: cubic stiffness of the springs, N/m^3; 0 for linear ones.
        damping: of every mass, N s/m.
        width: tanh units of a controller.
        steps: of the integrator, 0.2 s each.
        states: initial states to train on, deviations of 0.4 m and velocities of 0.4 m/s at random; as many to test.
        mass_ratio: mass of the controller at the free end beside that at the wall, in between geometrically: in
            ``model.masses()``, for optimizers made in Python.

    Returns:
        The problem: inputs (N, 2 masses), targets zero, (N, 3 masses (steps + 1)).

    Raises:
        SpecError: If a number makes no sense.
    """
    sizes = (("masses", masses), ("width", width), ("steps", steps), ("states", states))
    for option, size in sizes:
        at_least("mass-spring", option, size)
    for option, value in (("hardening", hardening), ("damping", damping)):
        if not (value >= 0 and math.isfinite(value)):
            raise SpecError(f"{option} of mass-spring is {value}; give 0 or more.")
    if not (mass_ratio > 0 and math.isfinite(mass_ratio)):
        raise SpecError(f"mass_ratio of mass-spring is {mass_ratio}; give a positive number.")
    chain = Chain(n=masses, hardening=hardening, damping=damping)
    own = tuple(mass_ratio ** (i / max(1, masses - 1)) for i in range(masses))

    def drawn(seed: int) -> Problem:
        generator = data_generator(seed)
        return Problem(
            name="mass-spring",
            make_model=seeded(lambda: ControlledChain(chain, width=width, steps=steps, masses=own)),
            train=_starts(chain, states, steps, generator),
            test=_starts(chain, states, steps, generator),
            criterion=nn.MSELoss(),
            dtype=torch.float64,
            test_metric="rmse",
            description=f"chain of {masses} masses, a controller module each, squared deviations over a rollout",
            redraw=drawn,
        )

    return drawn(0)


def _starts(chain: Chain, states: int, steps: int, generator: torch.Generator) -> Split:
    x = 0.4 * torch.randn(states, 2 * chain.n, dtype=torch.float64, generator=generator)
    return x, torch.zeros(states, 3 * chain.n * (steps + 1), dtype=torch.float64)
