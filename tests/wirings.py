"""Small networks of any wiring, drawn: a list of nodes, each fed by earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 3
SIDE = 2

#: How a node makes its value from earlier ones (a, b); every value has WIDTH numbers a sample.
KINDS = ("linear", "residual", "sum", "concatenated", "twice", "again", "tied", "norm", "scaled", "side", "prelu")


@dataclass(frozen=True)
class Node:
    """One node: its kind, the earlier values it reads, and what is done to its value."""

    kind: str
    a: int
    b: int
    activation: str

    def __str__(self) -> str:
        return f"{self.kind}({self.a}, {self.b}) {self.activation}"


@st.composite
def nodes(draw: Any, most: int = 5) -> tuple[Node, ...]:
    count = draw(st.integers(1, most))
    return tuple(
        Node(
            draw(st.sampled_from(KINDS)),
            draw(st.integers(0, k)),
            draw(st.integers(0, k)),
            draw(st.sampled_from(("tanh", "sigmoid", "softplus", "none"))),
        )
        for k in range(count)
    )


class Scaled(nn.Module):
    """Parameters of its own beside those of a child: rows by the generic rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) + self.scale


class Wired(nn.Module):
    """The network of some nodes.

    Args:
        plan: the nodes.
        skip: a value added to the last one on its way out, None for none.
        head: whether a second head reads the last value; the model then returns a dict.
    """

    def __init__(self, plan: tuple[Node, ...], skip: int | None = None, head: bool = False) -> None:
        super().__init__()
        self.plan = plan
        self.skip = skip
        self.layers = nn.ModuleList(self._layer(node, k) for k, node in enumerate(plan))
        self.out = nn.Linear(WIDTH, 2)
        self.head = nn.Linear(WIDTH, 2) if head else None
        with torch.no_grad():  # ones and zeros would hide mistakes
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def _layer(self, node: Node, k: int) -> nn.Module:
        if node.kind == "sum":
            return nn.Identity()
        if node.kind == "concatenated":
            return nn.Linear(2 * WIDTH, WIDTH)
        if node.kind == "side":
            return nn.Linear(SIDE, WIDTH, bias=False)
        if node.kind == "norm":
            return nn.LayerNorm(WIDTH)
        if node.kind == "scaled":
            return Scaled()
        if node.kind == "prelu":
            return nn.PReLU(WIDTH)
        return nn.Linear(WIDTH, WIDTH)

    def _earlier(self, k: int) -> nn.Linear | None:
        """The latest square linear layer before node k, called once more ("again") or used by hand ("tied")."""
        fit = [m for m in list(self.layers)[:k] if isinstance(m, nn.Linear) and m.weight.shape == (WIDTH, WIDTH)]
        return fit[-1] if fit else None

    def _value(self, k: int, node: Node, a: Tensor, b: Tensor, side: Tensor) -> Tensor:
        layer = self.layers[k]
        if node.kind == "sum":
            return a + 0.5 * b
        if node.kind == "concatenated":
            return layer(torch.cat([a, b], 1))
        if node.kind == "side":
            return a * torch.tanh(layer(side))
        if node.kind == "residual":
            return b + torch.tanh(layer(a))
        if node.kind == "twice":
            return layer(torch.tanh(layer(a)))
        if node.kind == "again":
            earlier = self._earlier(k)
            return layer(a) if earlier is None else layer(a) + earlier(b)
        if node.kind == "tied":
            earlier = self._earlier(k)
            return layer(a) if earlier is None else layer(a) + torch.tanh(b) @ earlier.weight
        return layer(a)

    def forward(self, x: Tensor, side: Tensor) -> Any:
        values = [x]
        for k, node in enumerate(self.plan):
            h = self._value(k, node, values[node.a], values[node.b], side)
            values.append({"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus}.get(
                node.activation, lambda t: t)(h))  # fmt: skip
        z = self.out(values[-1])
        if self.skip is not None:
            z = z + values[self.skip][:, :2]
        if self.head is None:
            return z
        return {"z": z, "more": (self.head(values[-1] * values[0]),)}
