"""Which parameters of a model live on manifolds: declared on the module that owns them, by name.

A declaration is an attribute of the module, so that it follows copies and pickles; the entries of a ``state_dict`` are
plain tensors as ever. Parameters of geoopt (``geoopt.ManifoldParameter``) are read as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from pullback.errors import ManifoldError
from pullback.manifolds.base import Manifold
from pullback.manifolds.foreign import foreign

#: name of the attribute: manifolds by the names of a module's own parameters
_ATTRIBUTE = "_pullback_manifolds"

_editions = [0]


def edition() -> int:
    """A number that grows with every declaration: who has looked at a model knows when to look again."""
    return _editions[0]


def constrain(module: nn.Module, name: str, manifold: Manifold, *, project: bool = False) -> nn.Parameter:
    """Declare that a parameter lives on a manifold.

    ``LayerwiseMetric``, ``GaussNewton`` and ``FeedbackGaussNewton`` keep it there; other optimizers of this library
    refuse it. Optimizers from elsewhere do not know of it.

    Args:
        module: the module that owns the parameter, or one above it.
        name: the parameter's name in it, such as ``"weight"`` or ``"encoder.0.weight"``.
        manifold: the manifold.
        project: whether to put the parameter onto the nearest point first.

    Returns:
        The parameter.

    Raises:
        ManifoldError: if the parameter is not on the manifold, not finite or of another shape.
        AttributeError: if the module has no such parameter.
        TypeError: if ``manifold`` is none.
    """
    if not isinstance(manifold, Manifold):
        raise TypeError(f"constrain takes a manifold such as Sphere(), got {manifold!r}.")
    p = module.get_parameter(name)
    assert isinstance(p, nn.Parameter)
    what = f"Parameter '{name}'"
    if project:
        manifold.dimension(p.shape)
        point = manifold.nearest(p.detach())
        manifold.check(point, what)
        p.data.copy_(point)
    manifold.check(p.detach(), what)
    owner, _, leaf = name.rpartition(".")
    held: dict[str, Manifold] = module.get_submodule(owner).__dict__.setdefault(_ATTRIBUTE, {})
    held[leaf] = manifold
    _editions[0] += 1
    return p


def manifolds_of(model: nn.Module) -> dict[int, Manifold]:
    """Manifolds of a model's parameters by id; parameters without one are left out.

    Args:
        model: the model.

    Raises:
        ManifoldError: if a parameter has two, or geoopt says one that is not known here.
    """
    found: dict[int, Manifold] = {}
    for prefix, module in model.named_modules():
        declared: dict[str, Manifold] = module.__dict__.get(_ATTRIBUTE, {})
        for leaf, p in module._parameters.items():
            manifold = None if p is None else declared.get(leaf) or foreign(p)
            if p is None or manifold is None:
                continue
            if found.setdefault(id(p), manifold) != manifold:
                raise ManifoldError(
                    f"Parameter '{prefix}{'.' if prefix else ''}{leaf}' is tied to one on {found[id(p)]} and declared "
                    f"on {manifold}; declare it on one."
                )
    return found


def refuse_manifolds(who: str, model: nn.Module, params: set[int] | None = None) -> None:
    """Refuse a model with constrained parameters where they would be moved off their manifolds.

    Args:
        who: what refuses, for the message.
        model: the model.
        params: ids of the parameters that are trained; None for all that require grad.

    Raises:
        ManifoldError: if one of them has a manifold.
    """
    held = manifolds_of(model)
    for name, p in model.named_parameters():
        if id(p) in held and (_trained(p) if params is None else id(p) in params):
            raise ManifoldError(
                f"Parameter '{name}' lives on {held[id(p)]}, which {who} does not know how to keep; take "
                "LayerwiseMetric, GaussNewton or FeedbackGaussNewton, or freeze the parameter."
            )


def _trained(p: Tensor) -> bool:
    return p.requires_grad
