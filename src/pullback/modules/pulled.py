"""What pulling a metric of the output back through a module gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor


@dataclass(frozen=True)
class PulledBack:
    r"""A pulled-back metric.

    Attributes:
        factor: :math:`A^\top S` at the module's input, (r, N, *in).
        rows: U, (r N, n): column first, then sample; parameters packed in the order of ``shapes``.
        shapes: shape of every trained parameter by name.
        mass: D of the module's own mass, (n,).
    """

    factor: Tensor
    rows: Tensor
    shapes: Mapping[str, Size]
    mass: Tensor

    def metric(self, mu: float) -> Tensor:
        r"""The parameter metric :math:`\mu D + U^\top U`, (n, n), dense.

        Args:
            mu: damping, positive.
        """
        return mu * torch.diag(self.mass) + self.rows.T @ self.rows

    def apply(self, mu: float, d: Tensor) -> Tensor:
        r""":math:`(\mu D + U^\top U)\, d` of a packed vector (n,), nothing formed.

        Args:
            mu: damping, positive.
            d: the vector.
        """
        return mu * self.mass * d + self.rows.T @ (self.rows @ d)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector (n,) from tensors by parameter name."""
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def unpack(self, d: Tensor) -> dict[str, Tensor]:
        """Tensors by parameter name from one vector (n,)."""
        parts = d.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
