"""Leaves: a module of torch, or a map the user writes, as a Riemannian module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn

from pullback.modules.base import ModuleMass, RiemannianModule
from pullback.modules.local import LeafLocal, Local
from pullback.modules.shape import Shape, shape_of, shapes_of

#: a shape as the user writes it
Given = int | tuple[int | EllipsisType, ...] | None


class Leaf(RiemannianModule):
    """Any module of one tensor argument, as a Riemannian module.

    Args:
        module: the module, called with a batch of states.
        mass: see :class:`~pullback.modules.RiemannianModule`; names are those of ``module``.
        inputs: shape of one sample's state at the input; None for what the module's type tells.
        outputs: likewise at the output.
    """

    def __init__(self, module: nn.Module, mass: ModuleMass = 1.0, inputs: Shape = None, outputs: Shape = None) -> None:
        own = shapes_of(module)
        if not isinstance(mass, (int, float, Tensor)):
            mass = {f"module.{name}": value for name, value in mass.items()}
        super().__init__(mass, inputs or own[0], outputs or own[1])
        self.module = module

    def map(self, x: Tensor) -> Tensor:
        """See the base class."""
        y: Tensor = self.module(x)
        return y

    def linearise(self, x: Tensor) -> Local:
        """See the base class."""
        self.check_input(x)
        found = LeafLocal(self, self.module, x)
        self.check_output(x, found.y)
        return found

    def _name(self) -> str:
        return type(self.module).__name__


class Map(nn.Module):
    """A function f(x, *params) as a module that owns its parameters.

    Args:
        f: the function; x is a batch (N, *in), the parameters come by position.
        params: their initial values, by name and in order.
    """

    def __init__(self, f: Callable[..., Tensor], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.f = f
        self.names = list(params)
        for name, value in params.items():
            taken = isinstance(getattr(self, name, None), nn.Parameter)
            if not name.isidentifier() or (hasattr(self, name) and not taken):
                raise ValueError(f"A parameter cannot be named {name!r} here; take another name.")
            self.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(_floats(value)))

    def forward(self, x: Tensor) -> Tensor:
        """The function at the present parameters."""
        return self.f(x, *(getattr(self, name) for name in self.names))


def riemannian(
    f: nn.Module | Callable[..., Tensor],
    params: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    mass: ModuleMass = 1.0,
    inputs: Given = None,
    outputs: Given = None,
) -> RiemannianModule:
    """Any module, or any differentiable map, as a Riemannian module.

    Args:
        f: a module of one tensor argument, or a function ``f(x, *params)`` of torch operations.
        params: for a function its initial parameters: by name, or in a sequence, named after the arguments of ``f``.
        mass: see :class:`~pullback.modules.RiemannianModule`.
        inputs: shape of one sample's state at the input: a number, a tuple, or None if it is not to be checked.
        outputs: likewise at the output.

    Raises:
        TypeError: if ``f`` is neither, or ``params`` do not belong to it.
        ValueError: if a name, a shape or a mass is not of its kind.

    Example:
        >>> import torch
        >>> from pullback.modules import riemannian
        >>> def spring(x, k, c):  # position and velocity, one Euler step
        ...     p, v = x[:, :1], x[:, 1:]
        ...     return torch.cat([p + 0.1 * v, v - 0.1 * (k * p + c * v)], 1)
        >>> module = riemannian(spring, [torch.tensor(2.0), torch.tensor(0.1)], inputs=2, outputs=2)
        >>> sorted(module.masses())
        ['module.c', 'module.k']
        >>> tuple(module.linearise(torch.zeros(5, 2)).A(torch.ones(5, 2)).shape)
        (5, 2)
    """
    shapes = shape_of(inputs), shape_of(outputs)
    if isinstance(f, RiemannianModule):
        raise TypeError("This is a Riemannian module already; give it its mass when it is made, or compose it.")
    if isinstance(f, nn.Module):
        if params is not None:
            raise TypeError(f"{type(f).__name__} has its own parameters; leave params= out.")
        return Leaf(f, mass, *shapes)
    if not callable(f):
        raise TypeError(f"riemannian takes a module or a function, got {type(f).__name__}.")
    if params is None:
        raise TypeError("A function needs its initial parameters: riemannian(f, {'k': torch.tensor(2.0)}), or {}.")
    if not isinstance(params, Mapping):
        params = dict(zip(_arguments(f, len(params)), params, strict=True))
    return Leaf(Map(f, params), mass, *shapes)


def _arguments(f: Callable[..., Tensor], n: int) -> list[str]:
    """Names of the arguments after the state."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, a in inspect.signature(f).parameters.items() if a.kind in kinds][1:]
    if len(names) != n:
        raise TypeError(f"The function takes {len(names)} parameters after the state ({', '.join(names)}), got {n}.")
    return names


def _floats(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"A parameter must be a floating tensor, got {value!r}; write torch.tensor(...).")
    if not bool(torch.isfinite(value).all()):
        raise ValueError("A parameter starts at a value that is not finite.")
    return value.detach().clone()
