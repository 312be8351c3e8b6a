"""Who gives each parameter its rows: decided once per structure of calls, from what was observed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pullback.errors import CoverageError
from pullback.tape.call import Call, CallFactor
from pullback.tape.memory import Sizes
from pullback.tape.rules import Kind, Rows, find_rule, generic_rows
from pullback.tape.sweep import Strategy

if TYPE_CHECKING:
    from pullback.tape.wires import Wires


@dataclass
class Unit:
    """A module and those of its parameters that get their rows from its calls.

    Attributes:
        module: the module whose calls are read.
        name: its name in the model.
        wanted: names of the parameters, relative to the module.
    """

    module: nn.Module
    name: str
    wanted: list[str] = field(default_factory=list)

    def parameters(self) -> list[Tensor]:
        """The wanted parameters."""
        return [self.module.get_parameter(name) for name in self.wanted]

    @property
    def numbers(self) -> int:
        """Numbers in the wanted parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def dense(self) -> bool:
        """Whether its rows are formed one by one."""
        rule = self._rule()
        return rule is None or rule.dense

    def rows(self, calls: Sequence[CallFactor], N: int) -> Rows:
        """Rows of the wanted parameters from the module's calls in one term."""
        rule = self._rule()
        if rule is None:
            return generic_rows(self.module, calls, self.wanted, N)
        return rule.rule(self.module, calls, frozenset(self.wanted), N)

    def _rule(self) -> Kind | None:
        """The special rule, if it gives rows to all that is wanted."""
        rule = find_rule(self.module)
        return rule if rule is not None and rule.gives(self.wanted) else None


@dataclass
class Plan:
    """Everything decided once for a structure of calls.

    Attributes:
        units: who gives rows to whom.
        strategy: how columns are swept.
        seconds: what each strategy took when it was timed.
        sizes: what it holds per row.
        wires: the tensors between modules, where feedback needs them.
    """

    units: list[Unit]
    sizes: Sizes
    strategy: Strategy = "loop"
    seconds: dict[Strategy, float] = field(default_factory=dict)
    wires: Wires | None = None

    def __post_init__(self) -> None:
        self.modules = {id(unit.module) for unit in self.units}


def formed(units: Sequence[Unit]) -> dict[str, float]:
    """Numbers per row by name of the units whose rows are formed one by one.

    Units that share a parameter are among them: their rows are added up.
    """
    uses = Counter(id(p) for unit in units for p in unit.parameters())
    out = {}
    for unit in units:
        tied = any(uses[id(p)] > 1 for p in unit.parameters())
        if unit.dense or tied:
            out[unit.name or "(model)"] = float(unit.numbers) * (1 + tied)
    return out


class Names:
    """Where every parameter lives in a model, tied ones at each of their places.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.places: dict[int, list[tuple[str, str]]] = {}
        self.full: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            self.places.setdefault(id(p), []).append((owner, leaf))
            self.full.setdefault(id(p), name)

    def ancestors(self, places: Iterable[tuple[str, str]]) -> list[str]:
        """Modules that hold all the places, the nearest first; '' is the model.

        A module that stands at several places itself holds what is in it at all of them.
        """
        chains = [list(_upwards(owner)) for owner, _ in places]
        common = [{id(self.modules[name]) for name in chain} for chain in chains]
        return [name for name in chains[0] if all(id(self.modules[name]) in held for held in common)]


def _upwards(name: str) -> Iterator[str]:
    """A module's name and those of the modules it is in; '' is the model."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def usable_calls(calls: Iterable[Call], N: int, mixed: set[int]) -> dict[int, list[Call]]:
    """Calls by module id, of the modules every call of which treats N samples apart.

    Args:
        calls: the calls that reach the prediction.
        N: samples.
        mixed: ids of calls at whose output one sample's factor has entries for other samples.
    """
    good: dict[int, list[Call]] = {}
    bad: set[int] = set()
    for call in calls:
        kind = find_rule(call.module)
        batch = call.batch() if kind is None else kind.batch(call)
        folds = kind is not None and kind.folds
        fits = batch is not None and (batch == N or (folds and batch % N == 0))
        if not fits or id(call) in mixed:
            bad.add(id(call.module))
        good.setdefault(id(call.module), []).append(call)
    return {module: found for module, found in good.items() if module not in bad}


def assign(
    names: Names,
    usable: dict[int, list[Call]],
    reached: dict[int, Tensor],
    forced: Set[int] = frozenset(),
    strays: dict[int, str] | None = None,
) -> list[Unit]:
    """Give every reached parameter to the calls of the modules that own it.

    A parameter whose owners were not called as modules (``MultiheadAttention.out_proj``), or were called
    without a batch (a table of positions), goes to the nearest module above that was.

    Args:
        names: where parameters live.
        usable: calls that can be read, by module id.
        reached: trained parameters the prediction depends on, by id.
        forced: parameters to give to the model as a whole.
        strays: collects parameters that cannot be given rows, with the reason; None to refuse them.

    Raises:
        CoverageError: if a parameter has no module above it that can be read.
    """
    units: dict[str, Unit] = {}

    def give(owner: str, leaf: str) -> None:
        unit = units.setdefault(owner, Unit(names.modules[owner], owner))
        if leaf not in unit.wanted:
            unit.wanted.append(leaf)

    for key in (k for k in names.full if k in reached):  # in the model's own order
        places = names.places[key]
        # A module that stands at several places of the model is one module all the same.
        once = {(id(names.modules[owner]), leaf): (owner, leaf) for owner, leaf in reversed(places)}
        own = [once[k, leaf] for k, leaf in reversed(once) if k in usable]
        if own and key not in forced:
            for owner, leaf in own:
                give(owner, leaf)
            continue
        above = [""] if key in forced else names.ancestors(places)
        chosen = next((a for a in above if id(names.modules[a]) in usable), None)
        if chosen is None and strays is not None:
            strays[key] = "no call gives it one row per sample"
            continue
        if chosen is None:
            raise CoverageError(
                f"No call was seen that gives parameter '{names.full[key]}' one row per sample; call the "
                "module that owns it with the batch along the first axis, or freeze the parameter."
            )
        full = names.full[key]
        give(chosen, full.removeprefix(chosen + ".") if chosen else full)
    return list(units.values())
