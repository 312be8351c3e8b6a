"""Shapes of states, one sample's, as far as they are known before a call."""

from __future__ import annotations

from types import EllipsisType

from torch import Size, Tensor, nn

#: shape of one sample's state; ``(..., 3)`` if only the last axes are known; None if nothing is
Shape = tuple[int | EllipsisType, ...] | None

#: modules that return what they were given the shape of
_KEEP = (
    nn.Identity,
    nn.Tanh,
    nn.Sigmoid,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Softplus,
    nn.LeakyReLU,
    nn.LayerNorm,
    nn.Dropout,
)


def shape_of(given: int | tuple[int | EllipsisType, ...] | None) -> Shape:
    """A shape as the user writes it: a number for vectors, a tuple, or None.

    Raises:
        ValueError: if it is none of those, or ``...`` stands elsewhere than in front.
    """
    shape = (given,) if isinstance(given, int) else given
    if shape is None:
        return None
    sizes = shape[1:] if shape and shape[0] is ... else shape
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"The shape of a state is a positive number, a tuple of them or (..., n), got {given!r}.")
    return shape


def fits(a: Shape, b: Shape) -> bool:
    """Whether two shapes can be those of one state, as far as they are known."""
    if a is None or b is None:
        return True
    (own, more), (other, most) = _tail(a), _tail(b)
    if (len(other) > len(own) and not more) or (len(own) > len(other) and not most):
        return False
    n = min(len(own), len(other))
    return own[len(own) - n :] == other[len(other) - n :]


def met(a: Shape, b: Shape) -> Shape:
    """What is known of a state from two shapes that fit."""
    if a is None or b is None:
        return b if a is None else a
    (own, more), (other, most) = _tail(a), _tail(b)
    if more != most:
        return b if more else a
    return a if len(own) >= len(other) else b


def _tail(shape: tuple[int | EllipsisType, ...]) -> tuple[tuple[int | EllipsisType, ...], bool]:
    """The sizes that are known, and whether there may be more in front."""
    return (shape[1:], True) if shape and shape[0] is ... else (shape, False)


def sample(x: Tensor) -> tuple[int, ...]:
    """Shape of one sample of a batch."""
    return tuple(x.shape[1:])


def shown(shape: Shape | Size) -> str:
    """A shape for a message."""
    if shape is None:
        return "unknown"
    inner = ", ".join("..." if size is ... else str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def shapes_of(module: nn.Module) -> tuple[Shape, Shape]:
    """Shapes that a module of torch takes and gives, where its type tells."""
    if isinstance(module, nn.Linear):
        return (..., module.in_features), (..., module.out_features)
    if isinstance(module, nn.Sequential):
        shapes = [shapes_of(child) for child in module if not isinstance(child, _KEEP)]
        if shapes:
            return shapes[0][0], shapes[-1][1]
    return None, None
