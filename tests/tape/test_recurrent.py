"""Recurrent modules: options that torch itself warns of, and starts given from outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oracle import assert_close, dense, jacobian, linearise
from sequences import Recurrent


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("way", ["loop", "fold"])
def test_projected_states(batch_first, way):
    """An LSTM whose states are mapped once more (not in the list of cases: torch warns of it in float32)."""
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM, num_layers=2, proj_size=2, batch_first=batch_first).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.zeros(4, 2, dtype=torch.float64))], sweep=way)
    J = jacobian(model, (x,), {}).reshape(8, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 8))
    assert {block.rule for block in lin.blocks} == {"linear", "recurrent (LSTM)"}


class Started(nn.Module):
    """Given its initial state with the layers in front, as torch wants it; as many layers as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 3, num_layers=4, batch_first=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x, start):
        return self.out(self.cell(x, hx=start)[0][:, -1])


def test_an_initial_state_has_the_samples_second():
    model = Started().double()
    args = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 4, 3, dtype=torch.float64)
    lin = linearise(model, nn.MSELoss(), [(args, {}, torch.zeros(4, 2, dtype=torch.float64))])
    J = jacobian(model, args, {}).reshape(8, -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ J * (2 / 8))


def test_packed_sequences_are_given_to_the_model_around_them():
    """Their module sees no batch axis; the model does, and its rows are exact."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(2, 3, batch_first=True)
            self.out = nn.Linear(3, 2)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.out(self.cell(packed)[1][0])

    model = Packed().double()
    args = torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor([3, 1, 2, 3])
    lin = linearise(model, nn.MSELoss(), [(args, {}, torch.zeros(4, 2, dtype=torch.float64))])
    J = torch.zeros(4, 2, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for n, row in enumerate(model(*args)):
        for a in range(2):
            grads = torch.autograd.grad(row[a], list(model.parameters()), retain_graph=True)
            J[n, a] = torch.cat([g.reshape(-1) for g in grads])
    U, J = dense(model, lin.blocks), J.reshape(8, -1)
    assert_close(U.T @ U, J.T @ J * (2 / 8))
