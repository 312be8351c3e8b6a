r"""Costates of single samples, picked up on the way of the user's own backward pass.

A factor's columns need a sweep of their own. The costate passes the outputs of the calls anyhow: it is noted there by a
hook on the node, set when the pass is at the prediction and everything in front of it is still to come. Beside the
factor it makes one more column, the rows of which are the gradient sample by sample,
:math:`g = \sum_n g_n` with :math:`g_n = B_n^\top \lambda_n`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.errors import StepError
from pullback.tape.call import CallFactor, wide
from pullback.tape.graph import Reached
from pullback.tape.recorder import Recorder
from pullback.tape.tape import Tape
from pullback.tape.term import LossUse, Term

#: by id of the call and number of its output
Costates = dict[tuple[int, int], Tensor]


@dataclass
class CostateTerm(Term):
    """A term that also knows the costate at the outputs of its calls.

    Attributes:
        costates: by id of the call and number of its output, in the shape of that output; complete once the backward
            pass is through.
    """

    costates: Costates = dataclasses.field(default_factory=dict)

    def beside(self, scale: float = 1.0, without: Container[int] = frozenset()) -> Term:
        """The same term with the costate as one more column, the last.

        Args:
            scale: what the loss was multiplied by when it was taped; factors are in true units already.
            without: ids of parameters whose modules may be left out, if they hold no others.

        Raises:
            StepError: if the backward pass did not go through one of the calls.
        """
        units = [unit for unit in self.plan.units if not all(id(p) in without for p in unit.parameters())]
        factors = {
            key: [CallFactor(factor.call, self.r + 1, self._columns(factor, scale)) for factor in self.factors[key]]
            for key in (id(unit.module) for unit in units)
        }
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Term)}
        fields |= {"r": self.r + 1, "factors": factors, "e0": self.e0.new_zeros((self.r + 1) * self.N)}
        fields["plan"] = dataclasses.replace(self.plan, units=units)
        return Term(**fields)

    def _columns(self, factor: CallFactor, scale: float) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for index, part in enumerate(factor.parts):
            if part is None:
                out.append(None)
                continue
            costate = self.costates.get((id(factor.call), index))
            if costate is None:
                raise StepError(
                    "The backward pass did not go through every module that the factors went through, so gradients of "
                    "single samples are not known; call loss.backward() with all parameters."
                )
            costate = wide(costate) if scale == 1 else wide(costate) / scale
            out.append(torch.cat([part, costate[None]]))
        return out


class CostateTape(Tape):
    """A tape whose terms are :class:`CostateTerm`; arguments as of :class:`~pullback.tape.Tape`."""

    def _pull_back(self, use: LossUse, found: Reached, costate: Tensor) -> CostateTerm:
        term = super()._pull_back(use, found, costate)
        return CostateTerm(**vars(term), costates=listen(found.only(term.plan.modules), self.recorder))


def listen(found: Reached, recorder: Recorder) -> Costates:
    """Note what the backward pass that is under way brings to the outputs of calls.

    Args:
        found: the calls.
        recorder: says when factors are swept, which is not the user's pass.

    Returns:
        A dictionary that fills as the pass goes on.
    """
    noted: Costates = {}
    ears = weakref.ref(recorder)
    nodes: dict[Any, list[tuple[int, int, int]]] = {}
    for call, edges in found.calls:
        for index, edge in edges.items():
            nodes.setdefault(edge.node, []).append((id(call), index, edge.output_nr))
    for node, places in nodes.items():
        node.register_prehook(_ear(noted, places, ears))
    return noted


def _ear(
    noted: Costates, places: Iterable[tuple[int, int, int]], recorder: weakref.ref[Recorder]
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook for a node. It lives in the node, so it must not know it."""
    waiting = list(places)

    def arrived(grads: tuple[Tensor | None, ...]) -> None:
        owner = recorder()
        if not waiting or owner is None or owner.sweeping:
            return
        for call, index, number in waiting:
            g = grads[number]
            if g is not None:
                noted[call, index] = g.detach()
        waiting.clear()  # a second pass through a retained graph has a term of its own

    return arrived
