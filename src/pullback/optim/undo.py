"""Taking back a step that no trial had guarded, once the next batch has judged it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pullback.manifolds import Manifold
from pullback.optim.damping import DampingControl


def untouched(groups: Iterable[dict[str, Any]], control: DampingControl, held: Mapping[int, Manifold]) -> bool:
    """Whether the weights are still what the last step left; a checkpoint loaded since is not ours to undo.

    Args:
        groups: the optimizer's param_groups.
        control: the damping, with the step that waits for its judgement.
        held: manifolds by id of the parameter, of those that live on one.
    """
    taken = control.taken
    if taken is None or not taken.before:
        return False
    for group in groups:
        for p in group["params"]:
            if id(p) in taken.before:
                before, step = taken.before[id(p)], taken.step[id(p)]
                left = held[id(p)].retract(before, step) if id(p) in held else before + step
                if group["weight_decay"]:
                    left *= 1 - group["lr"] * group["weight_decay"]
                if not torch.equal(p, left):
                    return False
    return True


def take_back(groups: Iterable[dict[str, Any]], control: DampingControl) -> float:
    """Put the weights before the last step back, bit for bit, and raise the damping.

    Args:
        groups: the optimizer's param_groups.
        control: the damping, with the step to undo.

    Returns:
        The loss before that step.
    """
    taken = control.taken
    assert taken is not None
    for group in groups:
        for p in group["params"]:
            if id(p) in taken.before:
                p.copy_(taken.before[id(p)])
    control.taken = None
    control.fail()
    return taken.start
