"""A closed loop around one linearisation, without an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.control import Course, Loop, Route
from pullback.curvature import Linearisation, Tails, divide
from pullback.metric import resolve
from pullback.tape import Tape, replay


@dataclass
class Looped:
    loop: Loop
    route: Route
    lin: Linearisation
    tape: Tape
    model: nn.Module

    def flat(self, steps: list[list[Tensor]]) -> dict[int, Tensor]:
        """Steps by id of the parameter."""
        out = {}
        for blocks, own in zip(self.loop.course.stages, steps, strict=True):
            for block, packed in zip(blocks, own, strict=True):
                out.update(zip(map(id, block.params), block.unpack(packed), strict=True))
        return out


def looped(
    model: nn.Module,
    criterion: nn.Module,
    uses: list[tuple[tuple[Any, ...], dict[str, Any], Any]],
    mu: float = 0.1,
    *,
    metric: Any = None,
    partition: Any = "layerwise",
    space: str = "auto",
    relative: bool = True,
) -> Looped:
    """Record, linearise and factorise; ``mu`` is relative to the mean diagonal of the Gram."""
    tape = Tape(model, criterion, resolve(criterion, metric), "loop", wiring="all")
    model.zero_grad()
    for args, kwargs, target in uses:
        z = model(*args, **kwargs)
        criterion(z, target(z.detach()) if callable(target) else target).mean().backward()
    lin = Linearisation(tape.terms)
    names = tape.names.full
    groups = divide(lin.blocks, partition, names)
    route = Route(lin.terms, groups)
    stages = [groups[k] for k in route.order]
    tails = Tails(stages, space)
    tails.factorise(mu * tails.trace() / lin.R if relative else mu)
    gradient = lin.gradient(lin.blocks)
    rest = None
    if gradient.rest is not None:
        by_block = {id(block): h for block, h in zip(lin.blocks, gradient.rest, strict=True)}
        rest = [[by_block[id(block)] for block in blocks] for blocks in stages]

    def run(passage: Any) -> float:
        with torch.no_grad(), tape.recorder.paused(), tape.recorder.heard(passage):
            return float(replay(model, lin.terms))

    roots = list({id(r): r.serial for term in lin.terms for r in term.roots}.values())
    e0 = gradient.e0 if lin.exact else torch.zeros_like(lin.e0)
    loop = Loop(
        Course(route, lin.terms, stages), tails, e0, rest, scales=None, rates=[1.0] * len(stages), roots=roots, run=run
    )
    return Looped(loop, route, lin, tape, model)
