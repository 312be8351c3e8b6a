r"""Series observed at irregular times: ODE-RNNs and latent ODEs (Rubanova, Chen & Duvenaud 2019).

A row of inputs is :math:`(x_1, \Delta_1, \dots, x_k, T)`: what was observed, how long until the next observation, and
how long after the last one the forecast is asked for. A model is an `Observed`: an encoder of the observations as its
``start``, and the flow from the last of them on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pullback.ode import ODEBlock
from pullback.problems.problem import Split


class ODERNN(nn.Module):
    r"""The state flows from one observation to the next, where a cell updates it (Rubanova et al., algorithm 1).

    .. math:: h_1 = \mathrm{cell}(x_1, 0), \qquad h_{i+1} = \mathrm{cell}(x_{i+1}, \Phi_{\Delta_i}(h_i))

    Args:
        cell: Called with an observation (N, 1) and a state (N, d); gives the next state.
        block: The flow of an `OwnClock`, whose rows run as long as each has to: :math:`\Phi`.
    """

    def __init__(self, cell: nn.GRUCell, block: ODEBlock) -> None:
        super().__init__()
        self.cell, self.block = cell, block

    def forward(self, rows: Tensor) -> Tensor:
        """The state at the last observation.

        Args:
            rows: Observations and the times between them, shape (N, 2 k - 1).

        Returns:
            Shape (N, d).
        """
        h = rows.new_zeros(len(rows), self.cell.hidden_size)
        for k in range(0, rows.shape[1], 2):
            if k:
                h = self.block(torch.cat([h, rows[:, k - 1 : k]], 1))[:, :-1]
            h = self.cell(rows[:, k : k + 1], h)
        return h


class PairRNN(nn.Module):
    """An encoder that is told of the times: a recurrent layer over pairs of an observation and the time before it.

    Args:
        rnn: From pairs (N, k, 2), batch first.
        out: From its last state to the state of the flow.
    """

    def __init__(self, rnn: nn.GRU, out: nn.Linear) -> None:
        super().__init__()
        self.rnn, self.out = rnn, out

    def forward(self, rows: Tensor) -> Tensor:
        """The state at the last observation.

        Args:
            rows: Observations and the times between them, shape (N, 2 k - 1).

        Returns:
            Shape (N, d).
        """
        before = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1::2]], 1)
        states, _ = self.rnn(torch.stack([rows[:, ::2], before], 2))
        state: Tensor = self.out(states[:, -1])
        return state


def kept(count: int, missing: float, generator: torch.Generator) -> Tensor:
    """Which of some equally spaced values are observed.

    Args:
        count: How many there are.
        missing: The share that is not.
        generator: Decides which.

    Returns:
        Ascending indices.
    """
    return torch.randperm(count, generator=generator)[: count - round(missing * count)].sort().values


def interleaved(values: Tensor, times: Tensor) -> Tensor:
    """Observations and the times between them.

    Args:
        values: At times 0, 1, 2, ..., shape (n,).
        times: Of k observations, ascending.

    Returns:
        Shape (2 k - 1,).
    """
    gaps = torch.diff(times, append=times[-1:]).to(values.dtype)
    return torch.stack([values[times], gaps], 1).flatten()[:-1]


def forecasts(values: Tensor, seen: Tensor, asked: Tensor, window: int, ahead: int) -> Split:
    """Rows of the last observations before a time, and the values that are asked for.

    Args:
        values: At times 0, 1, 2, ..., shape (n,).
        seen: Ascending times of the observations.
        asked: Times whose values are targets.
        window: k, observations that are read.
        ahead: How long after the last of them at most.

    Returns:
        Inputs (N, 2 k) and targets (N, 1), sorted by the last observation.
    """
    inputs, targets = [], []
    for end in range(window, len(seen) + 1):
        times = seen[end - window : end]
        row = interleaved(values, times)
        for time in asked[(asked > times[-1]) & (asked <= times[-1] + ahead)]:
            inputs.append(torch.cat([row, (time - times[-1]).to(row.dtype)[None]]))
            targets.append(values[time : time + 1])
    return torch.stack(inputs), torch.stack(targets)


def ends(seen: Tensor, window: int, ahead: int) -> list[int]:
    """Where to end windows so that their forecasts follow each other.

    Args:
        seen: Ascending times of the observations.
        window: Observations of a window.
        ahead: How far a forecast reaches at least.

    Returns:
        Numbers of observations, `window` at first.
    """
    found = [window]
    for end in range(window + 1, len(seen) + 1):
        if seen[end - 1] >= seen[found[-1] - 1] + ahead:
            found.append(end)
    return found
