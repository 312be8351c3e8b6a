"""The model run again, watched at the cuts: what reaches a module, just before it is called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import StepError
from pullback.tape.call import Entry, wide, without_autocast
from pullback.tape.nest import tensors
from pullback.tape.ports import Ports, by_sample
from pullback.tape.term import Term

#: which call of the model, which module, which of its turns
_Key = tuple[int, int, int]


class _Stop:
    """What is wanted of one call of a module.

    Attributes:
        given: tensors to be seen among those it is given, as (term, number, index).
        returned: likewise among those it returns.
        cut: number of the cut in front of it.
    """

    __slots__ = ("cut", "given", "returned")

    def __init__(self) -> None:
        self.given: list[tuple[int, int, int]] = []
        self.returned: list[tuple[int, int, int]] = []
        self.cut: int | None = None


class Passage:
    """Watches one run of the model for a list of cuts.

    Args:
        terms: the terms of the linearisation, with their ports.
        moments: for every cut the entry it lies in front of; None for before everything.
        arrived: called at each cut, with its number, just before the module runs.
        roots: serial numbers of the calls of the model that are run again, in order; or the first of them, if
            all that record gradients are.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        moments: Sequence[Entry | None],
        arrived: Callable[[int], None],
        roots: Sequence[int] | int,
    ) -> None:
        self.ports: list[Ports] = [term.ports for term in terms if term.ports is not None]
        self.moments = moments
        self._arrived = arrived
        self._roots = roots
        self._runs = -1
        self._root: int | None = None
        self._open: list[tuple[int, _Stop | None]] = []
        self._device = terms[0].e0.device.type
        self._turns: dict[int, int] = {}
        self._heard: set[int] = {id(entry.module) for entry in moments if entry is not None}
        self.deviations: list[dict[int, Tensor]] = [{} for _ in self.ports]
        self.reached = [moment is None for moment in moments]
        self._stops: defaultdict[_Key, _Stop] = defaultdict(_Stop)
        for k, entry in enumerate(moments):
            if entry is not None:
                self._stops[entry.root, id(entry.module), entry.turn].cut = k
        for t, ports in enumerate(self.ports):
            for v, (call, place) in ports.sources.items():
                entry = call.entry
                serial, turn = (call.serial, 0) if entry is None else (entry.root, entry.turn)  # type: ignore[attr-defined]
                stop = self._stops[serial, id(call.module), turn]
                (stop.returned if place.side == "out" else stop.given).append((t, v, place.index))
                self._heard.add(id(call.module))

    # -- told by the recorder ----------------------------------------------------------------------------

    def begins(self) -> None:
        """The model is called."""
        self._turns, self._open = {}, []
        if isinstance(self._roots, int):
            # A user's closure: calls without gradients were not recorded either.
            self._runs += torch.is_grad_enabled()
            self._root = self._roots + self._runs if torch.is_grad_enabled() else None
            return
        self._runs += 1
        self._root = self._roots[self._runs] if self._runs < len(self._roots) else None

    def enters(self, module: nn.Module, given: Any) -> None:
        """A module is called, with a nest of tensors."""
        if self._root is None or id(module) not in self._heard:
            return
        turn = self._turns.get(id(module), 0)
        self._turns[id(module)] = turn + 1
        stop = self._stops.get((self._root, id(module), turn))
        self._open.append((id(module), stop))
        if stop is None:
            return
        self._note(stop.given, given)
        cut = stop.cut
        if cut is not None:
            self.reached[cut] = True
            if not all(self.reached[:cut]):
                self.check()
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled(self._device):
                self._arrived(cut)
                return
            # Not in the user's modes: a residual may be differentiated inside the model, a forward pass autocast.
            with torch.no_grad(), without_autocast(self._device):
                self._arrived(cut)

    def leaves(self, module: nn.Module, returned: Any) -> None:
        """A module has returned a nest of tensors."""
        if self._root is None or id(module) not in self._heard:
            return
        # The call entered last, if its entry was heard; others in between were left by an exception.
        for k in range(len(self._open) - 1, -1, -1):
            if self._open[k][0] == id(module):
                stop = self._open[k][1]
                del self._open[k:]
                break
        else:
            stop = self._stops.get((self._root, id(module), 0))
        if stop is not None:
            self._note(stop.returned, returned)

    def _note(self, wanted: Sequence[tuple[int, int, int]], nest: Any) -> None:
        values = tensors(nest) if wanted else []
        for t, v, index in wanted:
            ports = self.ports[t]
            value = values[index] if index < len(values) else None
            found = () if value is None else value.shape
            if value is None or found != ports.shapes[v]:
                raise StepError(
                    f"Run again, the model made a tensor of shape {tuple(found)} where it was {ports.shapes[v]}; model "
                    "and closure must do the same each time they are called."
                )
            axis = ports.wires.axes[v]
            assert axis is not None
            self.deviations[t][v] = by_sample(wide(value.detach()), ports.N, axis) - ports.values[v]

    # -- asked by the sweep ------------------------------------------------------------------------------

    def measured(self, term: int, rank: int) -> Tensor:
        """What the tensors across a cut carry into a term, shape (r N,).

        Args:
            term: number of the term.
            rank: rank of a cut that can be had.

        Raises:
            StepError: if some of them were not met.
        """
        across = self.ports[term].wires.cut(rank).carriers
        if not all(v in self.deviations[term] for v, _ in across):
            raise _other_way()
        return self.ports[term].measure(rank, self.deviations[term]).reshape(-1)

    def still(self) -> bool:
        """Whether nothing deviates by more than round-off."""
        for ports, deviations in zip(self.ports, self.deviations, strict=True):
            for v, d in deviations.items():
                value = ports.values[v]
                if d.numel() and not float(d.abs().max()) <= 1e3 * torch.finfo(d.dtype).eps * float(value.abs().max()):
                    return False
        return True

    def check(self) -> None:
        """Refuse a run that took another way than the recorded one.

        Raises:
            StepError: if a module in front of which a cut lies was not called.
        """
        if not all(self.reached):
            raise _other_way()


def _other_way() -> StepError:
    return StepError(
        "Run again, the model did not call the modules it called before; model and closure must do the same each time "
        "they are called."
    )
