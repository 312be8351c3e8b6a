"""Fields, models with blocks of them, and the dense twin: Jacobians row by row through the solver's own steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Moving
from pullback.ode import ODEBlock

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


class Bare(nn.Module):
    """Parameters used by hand, one of them twice, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(2, 2))
        self.rate = nn.Parameter(torch.tensor(0.3))
        self.out = nn.Linear(2, 2)

    def forward(self, t, x):
        h = torch.tanh(x @ self.w)
        return self.out(h) @ self.w.T - self.rate * x


class Tied(nn.Module):
    """One layer called twice, and its weight by hand once more."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.by_hand = by_hand

    def forward(self, t, x):
        x = self.a(torch.tanh(self.a(x)))
        return F.linear(x, self.a.weight) if self.by_hand else x


class Summands(nn.Module):
    """Layers of the state and of the time, added: autograd hands both one and the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.time, self.out = nn.Linear(2, 3, bias=False), nn.Linear(1, 3), nn.Linear(3, 2)

    def forward(self, t, x):
        return self.out(torch.tanh(self.state(x) + self.time(t.expand(len(x), 1))))


class Pictures(nn.Module):
    """A convolutional field with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)

    def forward(self, t, x):
        time = t.expand(len(x), 1, *x.shape[2:])
        return self.last(torch.tanh(self.norm(self.conv(torch.cat([x, time], 1)))))


class Beside(nn.Module):
    """Two blocks side by side, one more behind them, and ways around all of them."""

    def __init__(self, block: Callable[..., ODEBlock]) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.left, self.right, self.after = block(Moving()), block(Moving()), block(Moving(), -0.5, 0.25)
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y = self.left(x) + 0.5 * self.right(x) * x
        return self.last(self.after(y) + x) + y


class Twice(nn.Module):
    """A block that is called twice."""

    def __init__(self, block: Callable[..., ODEBlock]) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(3, 2), block(Moving()), nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.block(torch.tanh(self.block(self.first(x)))))


def chain(field: Callable[[], nn.Module]) -> Callable[[Callable[..., ODEBlock]], nn.Module]:
    return lambda block: nn.Sequential(nn.Linear(3, 2), block(field()), nn.Linear(2, 2))


#: name, model of a maker of blocks, shape of a sample
MODELS: dict[str, tuple[Callable[[Callable[..., ODEBlock]], nn.Module], tuple[int, ...]]] = {
    "chain": (chain(Moving), (3,)),
    "backwards": (lambda block: nn.Sequential(nn.Linear(3, 2), block(Moving(), 0.5, -0.25)), (3,)),
    "first": (lambda block: nn.Sequential(block(Moving(3)), nn.Linear(3, 2)), (3,)),
    "alone": (lambda block: nn.Sequential(block(Moving(2))), (2,)),
    "by hand": (chain(Bare), (3,)),
    "summands": (chain(Summands), (3,)),
    "called twice inside": (chain(Tied), (3,)),
    "tied inside": (chain(lambda: Tied(True)), (3,)),
    "beside": (Beside, (3,)),
    "called twice": (Twice, (3,)),
    "pictures": (lambda block: nn.Sequential(block(Pictures()), nn.Flatten(), nn.Linear(24, 2)), (2, 3, 4)),
    "pair": (lambda block: nn.Sequential(block(Moving(3)), nn.Linear(3, 2), nn.Tanh(), block(Moving())), (3,)),
}


def build(name: str, n: int = 4, seed: int = 0, **options) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and targets, float64."""
    make, shape = MODELS[name]
    torch.manual_seed(seed)
    model = make(lambda *args: ODEBlock(*args, **options)).double()
    return model, torch.randn(n, *shape).double(), torch.randn(n, 2).double()


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """dz/dw, (numbers of z, n), one backward pass each."""
    z = model(x).flatten()
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for one in z:
        grads = torch.autograd.grad(one, params, retain_graph=True, allow_unused=True)
        both = zip(grads, params, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten() for g, p in both]))
    return torch.stack(rows)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    nn.MSELoss()(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def miss(a: Tensor, b: Tensor) -> float:
    """Relative difference."""
    return float((a - b).norm() / b.norm())
