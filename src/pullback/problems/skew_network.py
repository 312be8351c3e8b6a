r"""A network of contracting modules whose couplings are skew in their metrics, so that it contracts whatever it learns.

.. math:: x_i' = -x_i + \Theta_i^{-1} V_i \Theta_i \tanh(x_i) + c_i u + \sum_j G_{ij} x_j, \qquad
          M_i = \Theta_i^2 \text{ diagonal}

In the metric :math:`M_i` a module's generalised Jacobian is :math:`-I + V_i D`, with :math:`0 \le D \le I` the slopes
of tanh, hence its rate is at least :math:`1 - |V_i|_2`. With any B and positive weights w the couplings

.. math:: G_{ij} = (w_i M_i)^{-1} B_{ij}, \qquad G_{ji} = -(w_j M_j)^{-1} B_{ij}^\top \qquad (i < j)

satisfy :math:`M_i G_{ij} = -k (M_j G_{ji})^\top` with k = w_j / w_i, the rule of skew feedback, so that the whole
contracts in diag(w_i M_i) at the least rate of a module (docs/theory 15). The parametrisation is that of Kozachkov,
Ennis and Slotine, RNNs of RNNs, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pullback.contraction import Guarantee, compose, part
from pullback.modules import RiemannianModule, parallel, riemannian, series
from pullback.problems.errors import SpecError, nearest
from pullback.problems.models import seeded
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register

#: Frequency of the oscillator to be imitated, radians per unit of time.
OMEGA = 2.0


def bounded(raw: Tensor, least: float) -> Tensor:
    """A matrix of norm below 1 - least, smooth in a free one, (s, s) to (s, s): Frobenius bounds the spectral norm."""
    return (1 - least) * raw / (1 + raw.square().sum()).sqrt()


def _cell(theta: Tensor, least: float, xu: Tensor, raw: Tensor, drive: Tensor) -> Tensor:
    """The vector field of one module alone, states and input [x_i, u], (N, s + 1), to (N, s)."""
    x, u = xu[:, :-1], xu[:, -1:]
    return -x + (torch.tanh(x) * theta) @ bounded(raw, least).T / theta + u * drive


def _skew(weights: Tensor, size: int, x: Tensor, B: Tensor) -> Tensor:
    """The couplings' share of the vector field, (N, n) to (N, n); of B, (n, n), the upper blocks count."""
    return x @ skew_matrix(weights, size, B).T


def skew_matrix(weights: Tensor, size: int, B: Tensor) -> Tensor:
    """G from free numbers.

    Args:
        weights: the diagonal of diag(w_i M_i), (n,).
        size: s, states of a module.
        B: (n, n), of which the blocks above the diagonal count.

    Returns:
        G, (n, n).
    """
    upper = B * _above(len(weights), size).to(B)
    return (upper - upper.T) / weights.unsqueeze(1)


def _above(n: int, size: int) -> Tensor:
    """One in blocks above the diagonal, zero elsewhere, (n, n)."""
    block = torch.arange(n) // size
    return (block.unsqueeze(1) < block).double()


def _free(size: int, x: Tensor, G: Tensor) -> Tensor:
    """Couplings without any condition, (N, n) to (N, n); of G the blocks off the diagonal count."""
    above = _above(len(G), size).to(G)
    return x @ (G * (above + above.T)).T


class Network(nn.Module):
    """The network run from rest under a constant input, read out at equal times.

    Args:
        modules: how many.
        size: s, states of each.
        least: lower bound of every module's rate, between 0 and 1.
        coupling: "skew" or "free"; both begin with the same G.
        steps: of the integrator (the midpoint rule).
        step: h.
        every: steps between two looks.
    """

    def __init__(
        self, *, modules: int, size: int, least: float, coupling: str, steps: int, step: float, every: int
    ) -> None:
        super().__init__()
        n = modules * size
        self.size, self.least, self.steps, self.step, self.every = size, least, steps, step, every
        #: Theta_i, the square roots of the diagonals of M_i, and w_i
        self.register_buffer("thetas", torch.linspace(0.8, 1.25, size, dtype=torch.float64).repeat(modules, 1))
        self.register_buffer("w", 2.0 ** torch.arange(modules, dtype=torch.float64))
        assert isinstance(self.thetas, Tensor)
        cells = [_made_cell(i, self.thetas[i], least, n) for i in range(modules)]
        self._cells = (cells,)  # in a tuple: registered once, in the field
        B = torch.randn(n, n, dtype=torch.float64) / size**0.5
        if coupling == "skew":
            link = riemannian(partial(_skew, self.weights, size), {"B": B}, inputs=n, outputs=n)
        else:
            G = skew_matrix(self.weights, size, B)
            link = riemannian(partial(_free, size), {"G": G}, inputs=n, outputs=n)
        state = riemannian(partial(_columns, tuple(range(n))), {}, inputs=n + 1, outputs=n)
        self.field: RiemannianModule = parallel(parallel(*cells, join="concatenate"), series(state, link))
        self.readout = nn.Linear(n, 1, bias=False, dtype=torch.float64)

    @property
    def weights(self) -> Tensor:
        """The diagonal of the whole metric diag(w_i M_i), (n,)."""
        assert isinstance(self.thetas, Tensor)
        assert isinstance(self.w, Tensor)
        return (self.w.unsqueeze(1) * self.thetas.square()).flatten()

    @property
    def couplings(self) -> Tensor:
        """G as it is now, zero in the blocks on the diagonal, (n, n)."""
        n = len(self.weights)
        with torch.no_grad():
            link = list(self.field.leaves())[-1]
            columns: Tensor = link(torch.eye(n, dtype=torch.float64))
            return columns.T

    def forward(self, u: Tensor) -> Tensor:
        """Outputs at the times looked at, (N, 1) to (N, looks)."""
        x, seen = u.new_zeros(len(u), len(self.weights)), []
        for k in range(1, self.steps + 1):
            half = x + self.step / 2 * self.field(torch.cat([x, u], 1))
            x = x + self.step * self.field(torch.cat([half, u], 1))
            if k % self.every == 0:
                seen.append(self.readout(x))
        return torch.cat(seen, 1)

    def flow(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        """The vector field under an input, (n,) to (n,).

        Args:
            u: one number.
        """

        def field(x: Tensor) -> Tensor:
            slope: Tensor = self.field(torch.cat([x, u.reshape(1)]).unsqueeze(0))
            return slope.squeeze(0)

        return field

    def cell_rates(self) -> list[float]:
        """1 - |V_i| of every module, which is below its rate at any state in M_i (derived above)."""
        raws = [next(p for name, p in cell.named_parameters() if name.endswith("raw")) for cell in self._cells[0]]
        return [1 - float(torch.linalg.matrix_norm(bounded(raw.detach(), self.least), 2)) for raw in raws]

    def guarantee(self) -> Guarantee:
        """The rate of the whole from those of the modules, composed one module after the other.

        Raises:
            ContractionError: if no rule applies to the couplings.
        """
        assert isinstance(self.thetas, Tensor)
        s, G, whole = self.size, self.couplings, None
        for i, rate in enumerate(self.cell_rates()):
            one = part(f"module {i + 1}", rate, metric=torch.diag(self.thetas[i].square()))
            here = slice(i * s, (i + 1) * s)
            whole = one if whole is None else compose(whole, one, G[: i * s, here], G[here, : i * s])
        assert whole is not None
        return whole


def _columns(which: tuple[int, ...], x: Tensor) -> Tensor:
    return x[:, list(which)]


def _made_cell(i: int, theta: Tensor, least: float, n: int) -> RiemannianModule:
    """Module i with the choice of what it sees of [x, u] in front."""
    size = len(theta)
    own = (*range(i * size, (i + 1) * size), n)
    raw = torch.randn(size, size, dtype=torch.float64) / size
    drive = torch.randn(size, dtype=torch.float64) / size**0.5
    cell = riemannian(
        partial(_cell, theta, least), {"raw": raw, "drive": drive}, mass=1.0, inputs=size + 1, outputs=size
    )
    return series(riemannian(partial(_columns, own), {}, inputs=n + 1, outputs=size + 1), cell)


def oscillator(u: Tensor, times: Tensor) -> Tensor:
    """The step response that is imitated, y'' + omega^2 y = omega^2 sin(2 u) from rest.

    Args:
        u: inputs, (N, 1).
        times: (T,).

    Returns:
        y, (N, T).
    """
    return torch.sin(2 * u) * (1 - torch.cos(OMEGA * times))


@register("skew-network")
def skew_network(
    *,
    modules: int = 3,
    size: int = 3,
    least: float = 0.1,
    coupling: str = "skew",
    inputs: int = 12,
    steps: int = 16,
    step: float = 0.3,
    every: int = 2,
) -> Problem:
    """A network of contracting modules that imitates an oscillator for a while: full batch, float64.

    The step response of y'' + 4 y = 4 sin(2 u), from rest, at inputs u between -1 and 1 (time in its own unit, a period
    and a half of it). The oscillator does not contract: what does can imitate it for a while alone.
    The loss is the mean square of the difference, the test metric its root at inputs in between. The seed draws the
    network.

    Args:
        modules: how many.
        size: states of each.
        least: rate that every module has whatever its weights, between 0 and 1.
        coupling: "skew", so that the network contracts at ``least`` or faster, or "free".
        inputs: values of u.
        steps: of the integrator.
        step: its length.
        every: steps from one look at the output to the next.

    Returns:
        The problem: inputs (N, 1), targets (N, steps // every).

    Raises:
        SpecError: If a number makes no sense, or the coupling is none of those.
    """
    for option, count in (("modules", modules), ("size", size), ("inputs", inputs), ("every", every)):
        at_least("skew-network", option, count)
    at_least("skew-network", "steps", steps, every)
    if not 0 < least < 1:
        raise SpecError(f"least of skew-network is {least}; give a rate between 0 and 1.")
    if not 0 < step < 1:
        raise SpecError(f"step of skew-network is {step}; give a positive one below 1, the integrator's limit is 2.")
    kinds = ("skew", "free")
    if coupling not in kinds:
        raise SpecError(f"coupling of skew-network cannot be {coupling!r}.{nearest(coupling, kinds)}")
    times = step * every * torch.arange(1, steps // every + 1, dtype=torch.float64)

    def made(u: Tensor) -> Split:
        u = u.unsqueeze(1)
        return u, oscillator(u, times)

    grid = torch.linspace(-1, 1, 2 * inputs + 1, dtype=torch.float64)
    return Problem(
        name="skew-network",
        make_model=seeded(
            lambda: Network(
                modules=modules, size=size, least=least, coupling=coupling, steps=steps, step=step, every=every
            )
        ),
        train=made(grid[1::2]),
        test=made(grid[::2]),
        criterion=nn.MSELoss(),
        dtype=torch.float64,
        test_metric="rmse",
        targets=(1e-2, 1e-3),
        description=f"{modules} contracting modules with {coupling} couplings, step response of an oscillator",
    )
