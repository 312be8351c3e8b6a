"""One case from a seed: a model, a loss, batches, options of an optimizer, and a fault."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from injuries import FAULTS, Injury
from torch import Tensor, nn

import pullback
from cases import CASES, LOSSES, Case, Loss, inputs, seq
from closed import CLOSED
from pullback import Damping, Momentum, Sampled

#: Seeds whose outcome is not as it should be for reasons outside this library, with the reason.
KNOWN: dict[int, str] = {}

MORE = [
    Case("regressor", lambda: nn.Linear(3, 2), inputs(3)),
    Case("deep regressor", lambda: seq(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)),
         inputs(3)),
    Case("classifier", lambda: seq(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), inputs(4)),
    Case("dropout classifier", lambda: seq(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)), inputs(4)),
    Case("image classifier", lambda: seq(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                         nn.Linear(12, 4)), inputs(1, 6, 6)),
    Case("batch norm in training", lambda: seq(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
         inputs(3)),
]  # fmt: skip

Batch = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@dataclass
class Draw:
    """Everything that is drawn.

    Attributes:
        seed: what it was drawn from.
        case: the model and its inputs.
        loss: the criterion and its targets.
        optimizer: the class.
        options: its options.
        dtype: of the model.
        n: rows of a batch.
        fresh: whether every step has a batch of its own.
        closure: None for the loop, else whether the closure calls backward.
        functional: whether the loss is functional, with a stated metric.
        steps: healthy steps before and after the fault.
        frozen: number of parameters that do not require grad from the start.
        dense: whether healthy steps are compared with the dense twin.
        fault: name of the fault.
        injury: the fault.
    """

    seed: int
    case: Case
    loss: Loss
    optimizer: Callable[..., Any]
    options: dict[str, Any]
    dtype: torch.dtype
    n: int
    fresh: bool
    closure: bool | None
    functional: bool
    steps: tuple[int, int]
    frozen: int
    dense: bool
    fault: str
    injury: Injury

    def build(self) -> tuple[nn.Module, nn.Module, Callable[[int], Batch]]:
        """Model, criterion, and a maker of batches of a given size."""
        model, args, kwargs = self.case.build(self.seed, 2)
        d = self.loss.head(copy.deepcopy(model).eval()(*args, **kwargs)).shape[1]
        model = model.to(self.dtype)
        criterion = self.loss.criterion(d).to(self.dtype)

        def batch(n: int) -> Batch:
            cast = lambda t: t.to(self.dtype) if t.is_floating_point() else t  # noqa: E731
            args = tuple(map(cast, self.case.inputs(n)))
            kwargs = {key: cast(t) for key, t in self.case.side(n).items()}
            # An empty batch is cut from another one: not every target can be drawn for no rows.
            return args, kwargs, self.loss.target(torch.randn(max(n, 1), d, dtype=self.dtype))[:n]

        return model, criterion, batch

    def describe(self) -> str:
        """One line."""
        way = "loop" if self.closure is None else f"closure(backward={self.closure})"
        return (
            f"{self.fault} ({self.injury}); {named(self.optimizer)} {self.options} on {self.case.name}, "
            f"{self.loss.name}{' functional' if self.functional else ''}, {self.dtype}, n={self.n}, {way}, "
            f"fresh={self.fresh}, steps={self.steps}, frozen={self.frozen}"
        )


def named(optimizer: Any) -> str:
    """Name of an optimizer class, or of one with options."""
    return next((name for name, closed in CLOSED.items() if closed is optimizer), getattr(optimizer, "__name__", ""))


def draw(seed: int) -> Draw:
    """The case of a seed."""
    r = random.Random(seed)
    fault = r.choice(list(FAULTS))
    injury = FAULTS[fault](r)
    case = _pick(seed, [*CASES, *MORE])
    loss = _pick(seed, LOSSES)
    closure = r.choice([None, None, None, True, False])
    if closure is False and injury.needs_backward:
        closure = True
    functional = closure is not None and loss.name == "mse" and r.random() < 0.5
    optimizer = r.choice([pullback.LayerwiseMetric, pullback.GaussNewton, *CLOSED.values()])
    if case.name == "batch norm in training" and optimizer in CLOSED.values():
        optimizer = pullback.GaussNewton  # with feedback it is refused at the first loss
    options = _options(r, case, functional, optimizer in CLOSED.values())
    if optimizer is CLOSED["geodesic"]:
        options.pop("partition", None)  # all modules move jointly
    return Draw(
        seed=seed,
        case=case,
        loss=loss,
        optimizer=optimizer,
        options=options,
        dtype=r.choice([torch.float32, torch.float64]),
        n=r.randint(3, 7),
        fresh=r.random() < 0.5,
        closure=closure,
        functional=functional,
        steps=(r.choice([0, 1, 1, 2, 3]), r.choice([1, 2])),
        frozen=r.choice([0, 0, 0, 1, 2]),
        dense=r.random() < 0.1,
        fault=fault,
        injury=injury,
    )


def _pick(seed: int, rows: list[Any]) -> Any:
    """One row of a table by its name, such that a row more in the table leaves most seeds as they were."""
    return max(rows, key=lambda row: random.Random(f"{seed} {row.name}").random())


def _options(r: random.Random, case: Case, functional: bool, closed: bool) -> dict[str, Any]:
    inner = pullback.Gaussian() if functional else None
    control = r.choice(["gain", "gain", "slope", "fixed"])
    options: dict[str, Any] = {
        "partition": r.choice([None, "layerwise", "global", [["*"]]]),
        "solver": r.choice(["dual", "primal", "auto"] if closed else ["dual", "primal", "cg", "auto"]),
        "momentum": r.choice([None, None, None if closed else Momentum(), Momentum(kind="spring", decay=0.7)]),
        "mass": r.choice(["identity", "identity", "module", "marquardt"]),
        "damping": Damping(control=control, initial=r.choice([0.1, 1.0, 10.0]), trials=r.choice([1, 3, 6])),
        "sweep": r.choice(["loop", "loop", "vmap", "auto"]),
        "metric": Sampled(inner, m=r.randint(1, 3), seed=r.randint(0, 9)) if r.random() < 0.25 else inner,
        "lr": r.choice([1.0, 1.0, 0.5]),
        "weight_decay": r.choice([0.0, 0.0, 0.0, 1e-3]),
    }
    if case.name == "batch norm in training":
        options["batch_norm"] = "frozen"
    return {key: value for key, value in options.items() if value is not None}
