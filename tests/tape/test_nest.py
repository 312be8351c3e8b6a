"""Tensors in nests that pytree does and does not know."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pullback.tape.nest import mapped, rebuilt, tensors

Pair = namedtuple("Pair", ["a", "b"])


class Output(OrderedDict):
    """A dict subclass without registration, as libraries of models return."""


@dataclass(frozen=True)
class Frozen:
    z: torch.Tensor
    rest: Any = None


def nest() -> Any:
    t = [torch.full((2,), float(k)) for k in range(6)]
    return [t[0], {"x": Pair(t[1], None)}, Frozen(t[2], (t[3], "name")), Output(a=t[4], b=Frozen(t[5]))]


def test_every_tensor_is_found_in_order():
    assert [float(t[0]) for t in tensors(nest())] == [0, 1, 2, 3, 4, 5]
    assert tensors(None) == []
    assert len(tensors(torch.ones(1))) == 1


def test_a_mapped_nest_has_its_kinds_and_leaves_the_old_one_alone():
    old = nest()
    new = mapped(lambda t: t + 10, old)
    assert [float(t[0]) for t in tensors(new)] == [10, 11, 12, 13, 14, 15]
    assert [float(t[0]) for t in tensors(old)] == [0, 1, 2, 3, 4, 5]
    assert type(new[1]["x"]) is Pair
    assert type(new[2]) is Frozen
    assert new[2].rest[1] == "name"
    assert type(new[3]) is Output
    again = rebuilt(new, tensors(old))
    assert [float(t[0]) for t in tensors(again)] == [0, 1, 2, 3, 4, 5]


def test_nothing_is_registered():
    assert not any(kind in pytree.SUPPORTED_NODES for kind in (Frozen, Output))
