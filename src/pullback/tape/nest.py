"""Tensors in whatever a module takes or returns: tuples, lists, dicts, and data classes without registration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists, dicts (also subclasses) and data classes, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind is tuple or kind is list:
        # By far the most common nests, and pytree takes ten times as long for them.
        return [leaf for part in tree for leaf in tensors(part)]
    if kind is dict:
        return [leaf for part in tree.values() for leaf in tensors(part)]
    if tree is None or isinstance(tree, int | float | str):
        return []
    return list(_walk(tree))


def _walk(tree: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            for _, part in _parts(leaf):
                yield from _walk(part)


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same nest with every tensor replaced by ``function`` of it; containers are copied.

    Args:
        function: called once per tensor, in the order of :func:`tensors`.
        tree: the nest.
    """

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        parts = _parts(leaf)
        if not parts:
            return leaf
        out = copy.copy(leaf)
        for key, part in parts:
            _put(out, key, mapped(function, part))
        return out

    return pytree.tree_map(replace, tree)


def rebuilt(tree: Any, values: Iterable[Any]) -> Any:
    """The same nest with other tensors.

    Args:
        tree: the nest.
        values: one per tensor, in the order of :func:`tensors`.
    """
    following = iter(values)
    return mapped(lambda _: next(following), tree)


def _parts(leaf: Any) -> list[tuple[Any, Any]]:
    """Keys and values of what pytree does not open: data classes and unregistered mappings."""
    if isinstance(leaf, MutableMapping):
        return list(leaf.items())
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [(f.name, getattr(leaf, f.name)) for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)]
    return []


def _put(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, MutableMapping):
        owner[key] = value
    else:
        object.__setattr__(owner, key, value)  # a frozen data class has no other way
