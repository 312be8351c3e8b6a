r"""The mass D of the metric :math:`M = \mu D + U^\top U`: parameters measured in units of their own.

With :math:`U \to U D^{-1/2}`, :math:`g \to D^{-1/2} g` everything else stays as it is, and the step is
:math:`D^{-1/2}` times the step found (theory 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pullback.curvature.block import Block
from pullback.tape.rules.base import Rows

#: "identity"; "module" (every module in units of its own curvature); "marquardt" (every parameter); or
#: numbers or tensors by parameter name.
Mass = str | Mapping[str, float | Tensor]


class ScaledRows(Rows):
    """Rows U diag(scale).

    Args:
        inner: the rows U.
        scale: one number, or one per column, shape (n,).
    """

    def __init__(self, inner: Rows, scale: float | Tensor) -> None:
        super().__init__(inner.params, inner.r, inner.N)
        self.n = inner.n
        self.inner = inner
        self.scale = scale
        self.rule = inner.rule

    def gram(self) -> Tensor:
        """A number keeps the inner rule's way; a vector takes dense rows. See the base class."""
        if not isinstance(self.scale, Tensor):
            return self.inner.gram().mul_(self.scale**2)
        flat = self.dense().reshape(-1, self.n)
        return flat @ flat.T

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        return self.gram() if isinstance(self.scale, Tensor) else self.inner.gram_into(out, half).mul_(self.scale**2)

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return self.inner.matvec(self.scale * delta)

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.inner.rmatvec(v) * self.scale

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return self.inner.dense(start, stop) * self.scale

    def primal(self) -> Tensor:
        """See the base class."""
        H = self.inner.primal()
        if isinstance(self.scale, Tensor):
            return H.mul_(self.scale).mul_(self.scale[:, None])
        return H.mul_(self.scale**2)

    def gram_flops(self) -> float:
        """See the base class."""
        return float(self.R) ** 2 * self.n if isinstance(self.scale, Tensor) else self.inner.gram_flops()

    def primal_flops(self) -> float:
        """See the base class."""
        return self.inner.primal_flops()

    def diagonal(self) -> Tensor:
        """See the base class."""
        return self.inner.diagonal() * self.scale**2

    def to(self, dtype: torch.dtype) -> ScaledRows:
        """See the base class."""
        scale = self.scale.to(dtype) if isinstance(self.scale, Tensor) else self.scale
        return ScaledRows(self.inner.to(dtype), scale)


def weigh(block: Block, scale: float | Tensor) -> Block:
    """The block with columns scaled by ``scale = D^{-1/2}``."""
    return block.like({t: ScaledRows(r, scale) for t, r in block.rows.items()})


def check_mass(mass: Mass) -> Mass:
    """A mass of a known form.

    Raises:
        ValueError: if it is not, or a given mass is not positive.
    """
    if isinstance(mass, str):
        if mass not in ("identity", "module", "marquardt"):
            raise ValueError(
                f"mass must be 'identity', 'module', 'marquardt' or numbers by parameter name, got {mass!r}."
            )
        return mass
    for name, value in mass.items():
        if not bool((torch.as_tensor(value) > 0).all()):
            raise ValueError(f"The mass of '{name}' must be positive.")
    return dict(mass)


def scales_of(
    blocks: Sequence[Block], mass: Mass, names: Mapping[int, str], largest: Callable[[Block, Tensor], Tensor]
) -> list[float | Tensor] | None:
    r"""The scales :math:`D^{-1/2}` of every block; None for the identity.

    Args:
        blocks: the blocks.
        mass: see :data:`Mass`.
        names: name of every parameter by id.
        largest: keeps the largest diagonal seen so far for a block, as MINPACK does, and returns it.

    Raises:
        ValueError: if a named mass does not fit its parameter, or one by coordinates meets a parameter on a manifold.
    """
    if mass == "identity":
        return None
    if mass == "module":
        means = [float(block.diagonal().mean()) for block in blocks]
        floor = torch.finfo(blocks[0].params[0].dtype).eps * max(means)
        return [max(mean, floor) ** -0.5 if mean > 0 or floor > 0 else 1.0 for mean in means]
    if mass == "marquardt":
        if any(block.curved for block in blocks):
            raise ValueError(
                "mass='marquardt' keeps a mass for every coordinate, and those of a parameter on a manifold turn from "
                "step to step; take 'identity', 'module' or one number for the parameter."
            )
        diagonals = [largest(block, block.diagonal()) for block in blocks]
        # A parameter that does nothing yet gets the smallest mass that keeps its scale finite.
        floor = torch.finfo(diagonals[0].dtype).eps * max(float(d.max()) for d in diagonals)
        return [d.clamp_min(floor or 1.0).rsqrt() for d in diagonals]
    assert not isinstance(mass, str)
    return [_named(block, mass, names) for block in blocks]


def _named(block: Block, mass: Mapping[str, float | Tensor], names: Mapping[int, str]) -> Tensor:
    parts = []
    for p, width in zip(block.params, block.widths, strict=True):
        value = torch.as_tensor(mass.get(names[id(p)], 1.0), dtype=p.dtype, device=p.device)
        if value.ndim and value.shape != p.shape:
            raise ValueError(
                f"The mass of '{names[id(p)]}' has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}; give "
                "one number or the same shape."
            )
        if block.curved and value.ndim and width != p.numel():
            raise ValueError(
                f"The mass of '{names[id(p)]}' has one entry for every number, but the parameter lives on a manifold, "
                "whose coordinates turn from step to step; give it one number."
            )
        parts.append(value.expand(p.shape).reshape(-1) if value.ndim else value.expand(width))
    return torch.cat(parts).rsqrt()
