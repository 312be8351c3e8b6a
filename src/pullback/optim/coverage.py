"""The coverage report: from observed rows, not from module types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pullback.optim.fallback import Fallback
from pullback.optim.record import Coverage, Covered
from pullback.tape import Tape


@dataclass(frozen=True)
class Treated:
    """Parameters that had rows in the last step, and by which rule (the rows themselves are not kept).

    Attributes:
        params: the parameters of a block.
        rule: how its rows were made.
        linearised: with feedback, why the deviation that reaches it is not measured; None where it is.
    """

    params: tuple[nn.Parameter, ...]
    rule: str
    linearised: str | None = None


def report(
    model: nn.Module, treated: Sequence[Treated], tape: Tape, fallback: Fallback | None, mine: Sequence[int]
) -> Coverage:
    """How each parameter was treated in the last step.

    Args:
        model: the model.
        treated: what had rows in the last step; empty before the first.
        tape: the tape, for the sweep and the metric.
        fallback: the optimizer of the strays, if there is one.
        mine: ids of the parameters the optimizer was given.
    """
    by_parameter = {id(p): block for block in treated for p in block.params}
    own, entries = set(mine), []
    for name, p in model.named_parameters():
        block = by_parameter.get(id(p))
        if not p.requires_grad:
            entries.append(Covered(name, p.numel(), "frozen", "requires_grad is False"))
        elif id(p) not in own:
            entries.append(Covered(name, p.numel(), "frozen", "not among this optimizer's params"))
        elif fallback is not None and p in fallback:
            why = f"{type(fallback.optimizer).__name__}: {tape.strays.get(id(p), 'not on the tape')}"
            entries.append(Covered(name, p.numel(), "fallback", why))
        elif block is not None:
            if block.linearised is not None:
                why = f"{block.rule}; deviation by products with U: {block.linearised}"
                entries.append(Covered(name, p.numel(), "linearised", why))
            elif tape.metric.exact:
                entries.append(Covered(name, p.numel(), "exact", block.rule))
            else:
                why = f"{block.rule}, {tape.metric!r}"
                entries.append(Covered(name, p.numel(), "sampled", why))
        elif treated:
            entries.append(Covered(name, p.numel(), "unused", "the loss did not depend on it"))
        else:
            entries.append(Covered(name, p.numel(), "pending", "no step yet"))
    return Coverage(tuple(entries), _sweep(tape), tuple(tape.recorder.frozen))


def _sweep(tape: Tape) -> str:
    if not tape.plans:
        return "none yet"
    plan = list(tape.plans.values())[-1]
    if not plan.seconds:
        return plan.strategy
    timed = ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in sorted(plan.seconds.items(), key=lambda i: i[1]))
    return f"{plan.strategy} (timed once: {timed})"
