"""The model run again, watched at the cuts: what reaches a module, just before it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pullback.errors import StepError
from pullback.tape.call import Entry, wide, without_autocast
from pullback.tape.term import Term
from pullback.tape.wires import Ports, by_sample

#: which call of the model, which module, which of its turns
_Key = tuple[int, int, int]


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
        self._open: list[_Key] = []
        self._device = terms[0].e0.device.type
        self._turns: dict[int, int] = {}
        self._heard: set[int] = {id(entry.module) for entry in moments if entry is not None}
        self.deviations: list[dict[int, Tensor]] = [{} for _ in self.ports]
        self.reached = [moment is None for moment in moments]
        self._watched: dict[tuple[str, _Key], list[tuple[int, int, int, int]]] = {}
        self._cuts: dict[_Key, int] = {
            (entry.root, id(entry.module), entry.turn): k for k, entry in enumerate(moments) if entry is not None
        }
        for t, ports in enumerate(self.ports):
            for v, (call, place) in ports.sources.items():
                side = "out" if place.side == "out" else "in"
                entry = call.entry
                serial, turn = (call.serial, 0) if entry is None else (entry.root, entry.turn)  # type: ignore[attr-defined]
                axis = ports.wires.axes[v]
                assert axis is not None
                self._watched.setdefault((side, (serial, id(call.module), turn)), []).append((t, v, place.index, axis))
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

    def enters(self, module: nn.Module, given: list[Tensor]) -> None:
        """A module is called."""
        if self._root is None or id(module) not in self._heard:
            return
        turn = self._turns.get(id(module), 0)
        self._turns[id(module)] = turn + 1
        key = (self._root, id(module), turn)
        self._open.append(key)
        self._note("in", key, given)
        cut = self._cuts.get(key)
        if cut is not None:
            self.reached[cut] = True
            if not all(self.reached[:cut]):
                self.check()
            # Not in the user's modes: a residual may be differentiated inside the model, a forward pass autocast.
            with torch.no_grad(), without_autocast(self._device):
                self._arrived(cut)

    def leaves(self, module: nn.Module, returned: list[Tensor]) -> None:
        """A module has returned."""
        if self._root is None or id(module) not in self._heard:
            return
        # The call entered last, if its entry was heard; others in between were left by an exception.
        key = (self._root, id(module), 0)
        for k in range(len(self._open) - 1, -1, -1):
            if self._open[k][1] == id(module):
                key = self._open[k]
                del self._open[k:]
                break
        self._note("out", key, returned)

    def _note(self, side: str, key: _Key, values: list[Tensor]) -> None:
        for t, v, index, axis in self._watched.get((side, key), ()):
            ports = self.ports[t]
            found = tuple(values[index].shape) if index < len(values) else ()
            if found != ports.shapes[v]:
                raise StepError(
                    f"Run again, the model made a tensor of shape {found} where it was {ports.shapes[v]}; model and "
                    "closure must do the same each time they are called."
                )
            new = by_sample(wide(values[index].detach()), ports.N, axis)
            self.deviations[t][v] = new - ports.values[v]

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
