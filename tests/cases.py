"""The one list of cases: a new layer is one row.

Every case builds a float64 model with its inputs and a target-maker; oracles run over the whole list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class InPlaceSkip(nn.Module):
    """Adds the skip in place, right after a captured output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += x
        return self.b(F.relu_(y))


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.cell(torch.tanh(self.cell(x)))))


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.mid = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.table.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mid(self.table(t))).mean(1))


class FunctionalTie(nn.Module):
    """A weight used by its module and once more by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) @ self.a.weight)


class Owner(nn.Module):
    """A container with parameters of its own beside those of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.shift = nn.Parameter(torch.randn(3))
        self.inner = nn.Linear(3, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x) * self.scale) + self.shift)


class Branches(nn.Module):
    """Two inputs by keyword, two branches, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(2, 3)
        self.right = nn.Linear(3, 3)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor, *, side: Tensor) -> Tensor:
        return self.out(torch.cat([torch.tanh(self.left(x)), torch.sigmoid(self.right(side))], 1))


class Positions(nn.Module):
    """Tokens, a table of positions called without a batch, a norm, attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, t: Tensor) -> Tensor:
        h = self.tokens(t) + self.places(torch.arange(t.shape[1]))
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v)
        return self.out(h.mean(1))


class Attention(nn.Module):
    """nn.MultiheadAttention, whose out_proj is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """A module that vmap cannot enter and that returns a nest of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 3, batch_first=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.cell(x)
        return self.out(states[:, -1] + last[0])


class Flat(nn.Module):
    """A model that folds time into the batch inside, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        return self.out(torch.tanh(self.a(x.reshape(n * t, d))).view(n, t, -1).sum(1))


def inputs(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def tokens(length: int, words: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(0, words, (n, length)),)


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    side: Callable[[int], dict[str, Tensor]] = field(default=lambda n: {})

    def build(self, seed: int = 0, n: int = 4) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
        torch.manual_seed(seed)
        model = self.model().double()
        return model, self.inputs(n), self.side(n)


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def conv(**options: Any) -> Callable[[], nn.Module]:
    """A convolution and a head that fits whatever it returns."""

    def make() -> nn.Module:
        first = nn.Conv2d(2, 4, **options)
        out = first(torch.zeros(1, 2, 6, 5)).flatten(1).shape[1]
        return seq(first, nn.Tanh(), nn.Flatten(), nn.Linear(out, 2))

    return make


CASES = [
    Case("mlp", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), inputs(3)),
    Case("mlp without bias", lambda: seq(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)), inputs(3)),
    Case("in-place relu", lambda: seq(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), inputs(3)),
    Case("in-place skip", InPlaceSkip, inputs(4)),
    Case("residual", lambda: seq(Residual(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(3, 2)), inputs(3)),
    Case("called twice", Twice, inputs(3)),
    Case("tied", Tied, tokens(3, 5)),
    Case("functional tie", FunctionalTie, inputs(3)),
    Case("bare parameters", Owner, inputs(3)),
    Case("branches", Branches, inputs(2), lambda n: {"side": torch.randn(n, 3, dtype=torch.float64)}),
    Case("linear on sequences", lambda: seq(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)),
         inputs(5, 2)),
    Case("folded time", Flat, inputs(3, 2)),
    Case("conv", conv(kernel_size=3), inputs(2, 6, 5)),
    Case("conv stride padding", conv(kernel_size=3, stride=2, padding=1), inputs(2, 6, 5)),
    Case("conv dilation", conv(kernel_size=2, dilation=2, bias=False), inputs(2, 6, 5)),
    Case("conv same", conv(kernel_size=(1, 3), padding="same"), inputs(2, 6, 5)),
    Case("conv circular", conv(kernel_size=3, padding=1, padding_mode="circular"), inputs(2, 6, 5)),
    Case("conv groups", conv(kernel_size=3, groups=2), inputs(2, 6, 5)),
    Case("embedding", lambda: seq(nn.Embedding(6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)), tokens(4, 6)),
    Case("layer norm", lambda: seq(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), inputs(3)),
    Case("layer norm 2d", lambda: seq(nn.LayerNorm((3, 2)), nn.Flatten(), nn.Linear(6, 2)), inputs(3, 2)),
    Case("batch norm", lambda: seq(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval(), inputs(3)),
    Case("batch norm 2d", lambda: seq(nn.BatchNorm2d(2), nn.Conv2d(2, 1, 2), nn.Flatten(), nn.Linear(4, 2)).eval(),
         inputs(2, 3, 3)),
    Case("prelu", lambda: seq(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), inputs(3)),
    Case("prelu shared", lambda: seq(nn.Conv2d(2, 3, 2), nn.PReLU(), nn.Flatten(), nn.Linear(12, 2)),
         inputs(2, 3, 3)),
    Case("prelu channels", lambda: seq(nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.Flatten(), nn.Linear(12, 2)),
         inputs(2, 3, 3)),
    Case("group norm", lambda: seq(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), inputs(3)),
    Case("bilinear weight norm", lambda: seq(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(),
                                             nn.Linear(4, 2)), inputs(3)),
    Case("positions", Positions, tokens(5, 7)),
    Case("attention", Attention, inputs(3, 4)),
    Case("recurrent", Recurrent, inputs(4, 2)),
]  # fmt: skip


def soft(z: Tensor) -> Tensor:
    return torch.softmax(torch.randn_like(z), 1)


def labels(z: Tensor) -> Tensor:
    return torch.randint(0, z.shape[1], (z.shape[0], *z.shape[2:]))


def ignoring(z: Tensor) -> Tensor:
    y = labels(z)
    y[0] = -100
    return y


@dataclass(frozen=True)
class Loss:
    name: str
    criterion: Callable[[int], nn.Module]
    target: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] = field(default=lambda z: z)


def weights(k: int) -> Tensor:
    return torch.linspace(0.5, 2.0, k, dtype=torch.float64)


LOSSES = [
    Loss("mse", lambda k: nn.MSELoss(), torch.randn_like),
    Loss("mse sum", lambda k: nn.MSELoss(reduction="sum"), torch.randn_like),
    Loss("mse none", lambda k: nn.MSELoss(reduction="none"), torch.randn_like),
    Loss("cross entropy", lambda k: nn.CrossEntropyLoss(), labels),
    Loss("cross entropy sum", lambda k: nn.CrossEntropyLoss(reduction="sum"), labels),
    Loss("cross entropy none", lambda k: nn.CrossEntropyLoss(reduction="none"), labels),
    Loss("cross entropy weights", lambda k: nn.CrossEntropyLoss(weight=weights(k)), labels),
    Loss("cross entropy ignore", lambda k: nn.CrossEntropyLoss(weight=weights(k)), ignoring),
    Loss("cross entropy smooth", lambda k: nn.CrossEntropyLoss(weight=weights(k), label_smoothing=0.2), ignoring),
    Loss("cross entropy soft", lambda k: nn.CrossEntropyLoss(weight=weights(k), label_smoothing=0.1), soft),
    Loss("nll", lambda k: nn.NLLLoss(weight=weights(k)), labels, lambda z: torch.log_softmax(z, 1)),
    Loss("bce", lambda k: nn.BCEWithLogitsLoss(), torch.rand_like),
    Loss("bce pos_weight", lambda k: nn.BCEWithLogitsLoss(weight=weights(k), pos_weight=3 * weights(k)),
         torch.rand_like),
]  # fmt: skip

by_name = {case.name: case for case in CASES}
loss_by_name = {loss.name: loss for loss in LOSSES}
