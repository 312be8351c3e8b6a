"""Rows of modules of any kind: many calls mapped together, against call by call and dense Jacobians."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import pullback.tape.rules.generic as generic
from oracle import assert_close, jacobian, linearise


@dataclass
class Setting:
    """An argument that cannot be hashed."""

    shift: Tensor
    power: int


class Part(nn.Module):
    """Parameters used by hand; how it is called is what the cases differ in. Counts how often it is run."""

    def __init__(self, read: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2))
        self.b = nn.Parameter(torch.randn(2))
        self.read = read
        self.runs = 0

    def forward(self, x, t=None, given=None, power=1, setting=None):
        self.runs += 1
        y = torch.tanh(x @ self.w + self.b)
        if t is not None:
            y = y * (math.cos(float(t)) if self.read else torch.cos(t)) + self.b * t
        if given is not None:
            y = y + x @ given @ self.w
        if setting is not None:
            y, power = y + setting.shift * self.b, setting.power
        return y**power


class Branches(Part):
    """Two outputs."""

    def forward(self, x):
        return super().forward(x), torch.sin(x @ self.w)


class Choosing(Part):
    """Looks at its input, which vmap cannot."""

    def forward(self, x):
        self.runs += 1
        y = super().forward(x)
        return y if len(x) != 1 or float(x.detach().abs().sum()) > 0 else 2 * y


def times(part, x):
    for t in torch.linspace(0, 1, 7, dtype=x.dtype):
        x = x + 0.1 * part(x, t)
    return x


def read(part, x):
    for t in torch.linspace(0, 1, 4, dtype=x.dtype):
        x = x + 0.1 * part(x, t)
    return x


def matrices(part, x):
    """One matrix for all calls, or one for each, square as the batch is long."""
    same = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for k in range(3):
        x = part(x, given=same.clone()) + part(x, given=(same + k).T) + part(x, given=same)
    return x


def numbers(part, x):
    """Other arguments than tensors: calls with equal ones belong together, 1 is not True."""
    return part(x, power=1) + part(x, power=2) + part(x, power=True) + part(torch.sin(x), power=2)


def settings(part, x):
    for k in range(3):
        x = x + part(x, setting=Setting(torch.tensor(0.1 * k, dtype=x.dtype), 1 + k % 2))
    return x


def outputs(part, x):
    """Calls of which one output or both are used."""
    a, b = part(x)
    c, _ = part(a)
    _, d = part(b)
    e, f = part(c + d)
    return e + f + part(e)[0]


def plain(part, x):
    for _ in range(4):
        x = x + 0.1 * part(x)
    return x


#: name, part, what is done with it, how often a batch of calls is to be run
CASES = {
    "times": (Part, times, 1),
    "reads the time": (lambda: Part(read=True), read, None),
    "matrices": (Part, matrices, 1),
    "numbers": (Part, numbers, 3),
    "settings": (Part, settings, 3),
    "outputs": (Branches, outputs, 3),
    "choosing": (Choosing, plain, None),
}


class Model(nn.Module):
    def __init__(self, part, way) -> None:
        super().__init__()
        self.part, self.way = part, way

    def forward(self, x):
        return self.way(self.part, x)


def recorded(name, N=4):
    """A model, its inputs and the factors at the calls of the part."""
    torch.manual_seed(0)
    make, way, runs = CASES[name]
    model = Model(make(), way).double()
    x = torch.randn(N, 2, dtype=torch.float64)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.zeros(N, 2).double())])
    return model, x, lin.terms[0].factors[id(model.part)], runs


@pytest.mark.parametrize("together", [generic.TOGETHER, 120])
@pytest.mark.parametrize("name", CASES)
def test_calls_mapped_together_are_those_one_by_one(name, together, monkeypatch):
    monkeypatch.setattr(generic, "TOGETHER", together)
    model, x, calls, runs = recorded(name)
    model.part.runs = 0
    found = generic.generic_rows(model.part, calls, ("w", "b"), 4).U
    if together > 120:
        assert runs is None or model.part.runs == runs
    else:
        assert model.part.runs >= len(calls)
    slow = sum(generic.generic_rows(model.part, [call], ("w", "b"), 4).U for call in calls)
    assert_close(found, slow)
    S = torch.eye(2).double()[:, None] * (2 / 8) ** 0.5  # of a mean over 8 numbers
    assert_close(found, torch.einsum("anc,ncw->anw", S.expand(2, 4, 2), jacobian(model, (x,), {})))


def test_a_mask_as_long_as_the_batch_is_not_mapped():
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.MultiheadAttention(2, 1, batch_first=True)

        def forward(self, x):
            for k in range(3):
                mask = torch.ones(4, 4, dtype=torch.bool).triu(1 + k)
                x = self.part(x, x, x, attn_mask=mask, need_weights=False)[0]
            return x.sum(1)

    model, x = Attends().double(), torch.randn(4, 4, 2, dtype=torch.float64)
    lin = linearise(model, nn.MSELoss(), [((x,), {}, torch.zeros(4, 2).double())])
    calls, names = lin.terms[0].factors[id(model.part)], tuple(n for n, _ in model.part.named_parameters())
    found = generic.generic_rows(model.part, calls, names, 4).U
    S = torch.eye(2).double()[:, None] * (2 / 8) ** 0.5
    assert_close(found, torch.einsum("anc,ncw->anw", S.expand(2, 4, 2), jacobian(model, (x,), {})))
