"""Small models, each with one way of wiring that the tape must understand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


class Spare(nn.Module):
    """A layer that forward does not use, for losses that add a term of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.extra = nn.Linear(3, 2), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


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


class Wave(nn.Module):
    """No rule knows this module; its rows depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.w)


class Branches(nn.Module):
    """Two inputs by keyword, two branches, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(2, 3)
        self.right = nn.Linear(3, 3)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor, *, side: Tensor) -> Tensor:
        return self.out(torch.cat([torch.tanh(self.left(x)), torch.sigmoid(self.right(side))], 1))


class Across(nn.Module):
    """A skip that starts from a tensor which no module was given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return self.c(self.b(torch.sin(3 * y)) + y)


class Woven(nn.Module):
    """As before, and two of what is seen later reach the module between in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)
        self.d = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        h = self.b(torch.sin(3 * y))
        return self.d(self.c(torch.sin(h) * y) + y.square())


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


class Again(nn.Module):
    """One layer called on several inputs, of several sizes where it allows."""

    def __init__(self, layer: nn.Module, *views: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.views = views
        self.out = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(torch.cat([self.layer(view(x)).flatten(1) for view in self.views], 1)))


@dataclass
class Found:
    """What a module may return: a data class that pytree does not know."""

    z: Tensor
    name: str
    more: dict[str, Any]


class Nest(nn.Module):
    """Modules that return dicts, tuples and data classes."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))
            self.shift = nn.Parameter(torch.randn(3))

        def forward(self, given: Found) -> Found:
            return Found(given.z * self.scale, "inner", {"b": (given.more["h"] + self.shift, None)})

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.inner = Nest.Inner()
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        found = self.inner(Found(h, "outer", {"h": h.square()}))
        return self.out(found.z * found.more["b"][0])


class Feeds(nn.Module):
    """One output of a module is made from another, and both are used."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            c = x * self.scale
            return torch.tanh(c * self.scale), c

    def __init__(self) -> None:
        super().__init__()
        self.inner = Feeds.Inner()
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.inner(x)
        return self.out(h + c.square())


class TwoInputs(nn.Module):
    """nn.Bilinear, by the generic rule."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.pair = nn.Bilinear(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(torch.tanh(self.left(x)), x)


class Flat(nn.Module):
    """A model that folds time into the batch inside, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        return self.out(torch.tanh(self.a(x.reshape(n * t, d))).view(n, t, -1).sum(1))


class Moving(nn.Module):
    """A vector field that changes with time."""

    def __init__(self, d: int = 2, h: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d + 1, h), nn.Linear(h, d)

    def forward(self, t, x):
        return self.b(torch.tanh(self.a(torch.cat([x, t.expand(len(x), 1)], 1))))
