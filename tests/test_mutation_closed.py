"""Do the oracles of the closed loops see? One place at a time is made wrong, and the check for it must fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import pullback
from cases import by_name
from closed import CLOSED, along, chain, compare, weights
from oracle import assert_close
from pullback import Damping, Momentum
from pullback.control import Course, Route
from pullback.curvature import Linearisation, divide
from pullback.tape import Tape
from test_mutation import Mutation, instead, then, times


def arc() -> None:
    """A step from halfway down the arc."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pullback.optim.closed_loop.ARC", (0.5,))
        compare(alpha=0.5)


def measured(case: str) -> Callable[[], None]:
    """A small move of all modules arrives at every cut as products with U say."""

    def check() -> None:
        model, args, kwargs = by_name[case].build()
        tape = Tape(model, nn.MSELoss(), None, "loop", wiring="all")
        z = model(*args, **kwargs)
        tape.losses[0][0](z, torch.sin(z.detach())).backward()
        lin = Linearisation(tape.terms)
        groups = divide(lin.blocks, "layerwise", tape.names.full)
        route = Route(lin.terms, groups)
        course = Course(route, lin.terms, [groups[k] for k in route.order])
        directions = [[torch.randn(block.n, dtype=torch.float64) for block in own] for own in course.stages]
        along(model, tape, course, directions, lambda _, found, true: assert_close(found, true, 1e-3), 1e-6)
        tape.close()

    return check


def in_any_order() -> None:
    """The trial loss is that of the weights that are left, whichever loss was taken back first."""
    model, x, y = chain()
    opt = CLOSED["plain feedback"](model, nn.MSELoss())
    parts = [opt.criterion(model(a), b) / 2 for a, b in zip(x[:8].chunk(2), y[:8].chunk(2), strict=True)]
    for part in parts[::-1]:
        part.backward()
    opt.step()
    with torch.no_grad():
        after = float(opt.criterion(model(x[:8]), y[:8]))
    assert after == pytest.approx(opt.last.loss - opt.last.actual, rel=1e-10)


def unscaled() -> None:
    """GradScaler changes nothing."""
    moved = []
    for scale in (None, 1024.0):
        model, x, y = chain()
        opt = CLOSED["plain feedback"](model, nn.MSELoss(), damping=Damping(control="fixed"))
        loss = opt.criterion(model(x), y)
        if scale is None:
            loss.backward()
            opt.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(opt)
        moved.append(weights(model))
    assert_close(moved[1], moved[0], 1e-9)


def deterministic() -> None:
    """A closure with other targets each time is refused."""
    model, x, y = chain()
    opt = pullback.FeedbackGaussNewton(model, nn.MSELoss())
    count = itertools.count()
    with pytest.raises(pullback.StepError):
        opt.step(lambda: opt.criterion(model(x), y + next(count)))


def reversed_order(true: Any) -> Any:
    return lambda blocks, *a: true(list(blocks)[::-1], *a)


def arc_without_square(true: Any) -> Any:
    def sweep(self: Any, rho: Any = None, alpha: float = 1.0) -> Any:
        return true(self, None if rho is None else [r / alpha for r in rho], alpha)

    return sweep


def total_factor(true: Any) -> Any:
    return lambda self, rank, v, parts: self.totals[v]


spring = partial(compare, 3, momentum=Momentum(kind="spring", decay=0.7))

MUTATIONS = [
    Mutation("sign of e_l", "control.realised:Course.deviation", times(-1.0), compare),
    Mutation("e_l dropped", "control.realised:Course.deviation", times(0.0), partial(compare, anticipate=False)),
    Mutation("later calls dropped", "control.realised:Course._behind", times(0.0), measured("tied")),
    Mutation("later members of a coalition dropped", "control.realised:Course._behind", times(0.0),
             partial(compare, partition="ends together")),
    Mutation("total for remaining factor", "tape.ports:Ports._factor", total_factor, measured("encoder eval")),
    Mutation("arc without its square", "control.feedback:Loop.sweep", arc_without_square, arc),
    Mutation("sign of rho", "control.feedback:Loop.anticipate", then(lambda rho: [-r for r in rho]), compare),
    Mutation("sign of the acceleration", "control.feedback:Loop.anticipate", then(lambda rho: [-r for r in rho]),
             partial(compare, geodesic=True, partition="global")),
    Mutation("remainder of the next cut", "control.feedback:Loop.anticipate", then(lambda rho: [*rho[1:], rho[0]]),
             compare),
    Mutation("tail without its stage", "curvature.tails:Tails._cumulated", then(lambda sums: [*sums[1:], sums[-1]]),
             partial(compare, solver="dual")),
    Mutation("primal in the order of the calls", "curvature.tails:Primal", reversed_order,
             partial(compare, solver="primal")),
    Mutation("mass not applied on the way back", "control.feedback:Loop._real", instead(lambda self, k, steps:
             list(steps)), partial(compare, mass="marquardt")),
    Mutation("shift not seen by the tails", "control.feedback:Loop._tail_sums", then(lambda sums:
             [0 * s for s in sums]), spring),
    Mutation("remainder of the gradient at full rate", "control.feedback:Loop._rest", instead(lambda self, far:
             self.rest), partial(compare, penalty=0.05, lr=0.3)),
    Mutation("scale left in the factors at the cuts", "tape.ports:Ports.divide", instead(lambda *a: None), unscaled),
    Mutation("calls repeated in the order of backward", "tape.replay:root_of", instead(lambda term: type(
             "Root", (), {"__getattr__": lambda self, name: getattr(term.use.path.root, name),
                          "serial": -term.use.path.root.serial})()), in_any_order),
    Mutation("nothing verified", "optim.closed_loop:ClosedLoop.verify", instead(lambda self: None), deterministic),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_oracle_sees(mutation, monkeypatch):
    torch.manual_seed(0)
    mutation.check()
    mutation.apply(monkeypatch)
    torch.manual_seed(0)
    with pytest.raises((AssertionError, pullback.PullbackError, pytest.fail.Exception)):
        mutation.check()
