"""Calling a module with other parameters, where parameters or whole modules stand at several places in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def places_of(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Every place of some parameters once: its name, and which of the names it is.

    Args:
        module: the module.
        names: names of distinct parameters in it.
    """
    wanted = {id(module.get_parameter(name)): name for name in names}
    out = {}
    for prefix, owner in module.named_modules():  # a shared module is met once
        for leaf, p in owner._parameters.items():
            if p is not None and id(p) in wanted:
                out[f"{prefix}.{leaf}" if prefix else leaf] = wanted[id(p)]
    return out


def called(
    module: nn.Module,
    places: Mapping[str, str],
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Any:
    """The module's output with other values of parameters; the module is left as it was.

    torch ties names that belong to one parameter by itself, but puts a module that stands at two places back with the
    values it was called with (torch 2.13); so the places are told one by one.

    Args:
        module: the module.
        places: see :func:`places_of`.
        values: values by name.
        args: positional arguments.
        kwargs: keyword arguments.
        buffers: buffers by name, to be used in place of its own.
    """
    given = {**(buffers or {}), **{place: values[name] for place, name in places.items()}}
    return functional_call(module, given, args, kwargs, tie_weights=False)
