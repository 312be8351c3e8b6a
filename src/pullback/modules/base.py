r"""What a Riemannian module is: a state map with parameters, a mass of its own, and its linearisation.

A module maps states x to states y = f(x, theta), samples along the first axis. The metric of its parameters is
:math:`M = \mu D + U^\top U` (theory 1): U comes from an output metric pulled back through what follows, D is the mass,
the module's own. Composites are modules again, their mass is that of their parts.
"""

from __future__ import annotations

import glob
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pullback.manifolds import manifolds_of
from pullback.modules.errors import CompositionError
from pullback.modules.local import Local
from pullback.modules.shape import Shape, fits, sample, shown

#: a positive number, or numbers and tensors by parameter name; what is not named has mass 1
ModuleMass = float | Mapping[str, float | Tensor]


class RiemannianModule(nn.Module):
    """A state map with parameters and a mass of its own.

    Args:
        mass: D of M = mu D + U^T U; for a composite a factor on the masses of its parts.
        inputs: shape of one sample's state at the input, None if unknown.
        outputs: likewise at the output.

    Attributes:
        mass: see above.
        inputs: see above.
        outputs: see above.

    Raises:
        ValueError: if a mass is not positive and finite.
        TypeError: if it is of no known form.
    """

    def __init__(self, mass: ModuleMass = 1.0, inputs: Shape = None, outputs: Shape = None) -> None:
        super().__init__()
        self.mass = _checked(mass)
        self.inputs = inputs
        self.outputs = outputs

    # -- the state map -----------------------------------------------------------------------------------

    @abstractmethod
    def map(self, x: Tensor) -> Tensor:
        """The state map without checks, (N, *in) to (N, *out)."""

    def forward(self, x: Tensor) -> Tensor:
        """The state map, (N, *in) to (N, *out).

        Raises:
            CompositionError: if a state is not of the declared shape, or the samples are lost.
        """
        self.check_input(x)
        y = self.map(x)
        self.check_output(x, y)
        return y

    def check_input(self, x: Tensor) -> None:
        """Refuse states of another shape than the declared one."""
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise CompositionError(f"{self._name()} takes one tensor with samples along its first axis, got {x!r}.")
        if not fits(sample(x), self.inputs):
            raise CompositionError(
                f"{self._name()} takes states of shape {shown(self.inputs)}, got {shown(sample(x))} (a batch of "
                f"{x.shape[0]}); change the module before it, or its inputs=."
            )

    def check_output(self, x: Tensor, y: Tensor) -> None:
        """Refuse what is not one state for every sample of x, of the declared shape."""
        if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[0] != x.shape[0]:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise CompositionError(
                f"{self._name()} was given {x.shape[0]} samples, states of shape {shown(sample(x))}, and returned "
                f"{found}; a state map returns one tensor with a state for every sample."
            )
        if not fits(sample(y), self.outputs):
            raise CompositionError(
                f"{self._name()} returned states of shape {shown(sample(y))}, declared are {shown(self.outputs)}."
            )

    @abstractmethod
    def linearise(self, x: Tensor) -> Local:
        """A, A^T, B and B^T at a batch of states, as operators.

        Args:
            x: the states, (N, *in).
        """

    # -- parameters --------------------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require grad, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def masses(self, prefix: str = "") -> dict[str, float | Tensor]:
        """The mass of every trained parameter by name, as the optimizers take it: ``mass=module.masses()``.

        Args:
            prefix: put in front of the names, for a module inside another model: ``"body."``.

        Raises:
            CompositionError: if a shared parameter has two masses.
        """
        found: dict[int, float | Tensor] = {}
        for name, p, value in self._weighed():
            known = found.setdefault(id(p), value)
            if not torch.equal(torch.as_tensor(known), torch.as_tensor(value)):
                raise CompositionError(
                    f"The parameter '{name}' is shared by modules that give it different masses; give them the same."
                )
        return {prefix + name: found.get(id(p), 1.0) for name, p in self.trained().items()}

    def mass_vector(self) -> Tensor:
        """D packed in the order of :meth:`trained`, (n,)."""
        masses = self.masses()
        parts = []
        for name, p in self.trained().items():
            value = torch.as_tensor(masses[name], dtype=p.dtype, device=p.device)
            parts.append(value.expand(p.shape).reshape(-1))
        return torch.cat(parts) if parts else torch.zeros(0)

    def partition(self, prefix: str = "") -> list[list[str]]:
        """Coalitions by module, as the optimizers take them: the parameters of each leaf move jointly.

        Args:
            prefix: put in front of the names, for a module inside another model.
        """
        groups: list[set[int]] = []
        for leaf in self.leaves():
            own = {id(p) for p in leaf.parameters() if p.requires_grad}
            apart = [group for group in groups if not group & own]
            groups = [*apart, own.union(*(group for group in groups if group & own))] if own else apart
        names = {id(p): prefix + name for name, p in self.trained().items()}
        order = {key: k for k, key in enumerate(names)}
        groups.sort(key=lambda group: min(order[key] for key in group))
        return [[glob.escape(names[key]) for key in sorted(group, key=order.__getitem__)] for group in groups]

    def leaves(self) -> Iterator[RiemannianModule]:
        """The modules it is composed of in the end, in order; a shared one once per place."""
        yield self

    @torch.no_grad()
    def update(self, step: Mapping[str, Tensor]) -> None:
        """Move the parameters: added, or retracted where one lives on a manifold. All of it or nothing.

        Args:
            step: changes by parameter name; those that are left out stay.

        Raises:
            CompositionError: if a name, a shape or a value is wrong, or a change on a manifold is not tangent.
        """
        named, held = dict(self.named_parameters()), manifolds_of(self)
        moved: list[tuple[nn.Parameter, Tensor]] = []
        for name, d in step.items():
            p = named.get(name)
            if p is None or d.shape != p.shape:
                found = "no such parameter" if p is None else str(tuple(p.shape))
                raise CompositionError(f"The step of '{name}' has shape {tuple(d.shape)}, the module has {found}.")
            if not bool(torch.isfinite(d).all()):
                raise CompositionError(f"The step of '{name}' is not finite; nothing was moved.")
            manifold = held.get(id(p))
            if manifold is None:
                moved.append((p, p + d))
                continue
            manifold.check(p, f"Parameter '{name}'")
            off = float((d - manifold.project(p, d)).norm())
            if off > torch.finfo(d.dtype).eps ** 0.5 * float(d.norm()):
                raise CompositionError(
                    f"The step of '{name}' leaves the tangent space of {manifold} by {off:.3g}; step along "
                    "E c of manifold.tangent(w), or project it if no metric is meant."
                )
            moved.append((p, manifold.retract(p, d)))
        for p, point in moved:
            p.copy_(point)

    # -- parts -------------------------------------------------------------------------------------------

    def _weighed(self, factor: float = 1.0) -> Iterator[tuple[str, nn.Parameter, float | Tensor]]:
        """Name, parameter and mass of everything inside that has one, shared ones once per place."""
        named = self.trained()
        if not isinstance(self.mass, float):
            for name in self.mass:
                if name not in dict(self.named_parameters(remove_duplicate=False)):
                    raise CompositionError(f"{self._name()} has a mass for '{name}' but no such parameter.")
        for name, p in named.items():
            value: float | Tensor = self.mass if isinstance(self.mass, float) else self.mass.get(name, 1.0)
            if isinstance(value, Tensor) and value.ndim and value.shape != p.shape:
                raise CompositionError(
                    f"The mass of '{name}' has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}; give one "
                    "number or the same shape."
                )
            yield name, p, factor * value

    def _name(self) -> str:
        return type(self).__name__


def _checked(mass: Any) -> ModuleMass:
    """A mass of a known form."""
    if isinstance(mass, Tensor) and mass.ndim:
        raise TypeError(
            f"A tensor of shape {tuple(mass.shape)} is no mass of a module: it is one positive number, or numbers and "
            "tensors by parameter name (a full matrix cannot be honoured by the optimizers)."
        )
    if not isinstance(mass, Mapping):
        number = float(mass)
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"The mass of a module must be positive and finite, got {number}.")
        return number
    for name, value in mass.items():
        t = torch.as_tensor(value)
        if not bool(((t > 0) & torch.isfinite(t)).all()):
            raise ValueError(f"The mass of '{name}' must be positive and finite.")
    return dict(mass)
