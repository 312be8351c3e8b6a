"""The optimizers that have a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import pullback
from pullback.control.games import Information
from pullback.problems.emsa import ExtendedMSA
from pullback.problems.errors import SpecError, missing_extra, nearest
from pullback.problems.least_squares import LeastSquares, require_scipy
from pullback.problems.muon import MuonWithAdamW
from pullback.problems.optimizer_entry import OptimizerEntry, Option, Stepper
from pullback.problems.snopt import SNOpt

_Source = Callable[[], Callable[..., Any]]
_Build = Callable[[nn.Module, nn.Module, dict[str, Any]], Stepper]


def optimizer_entries() -> Iterator[OptimizerEntry]:
    """The optimizers that have a name, ours first.

    Yields:
        One entry per optimizer; nothing optional is imported.
    """
    yield from _ENTRIES.values()


def optimizer_entry(name: str) -> OptimizerEntry:
    """Finds an optimizer by its name.

    Args:
        name: For instance "adam".

    Returns:
        The entry.

    Raises:
        SpecError: If there is none of that name.
    """
    if name not in _ENTRIES:
        raise SpecError(f"there is no optimizer called {name!r}.{nearest(name, _ENTRIES)}")
    return _ENTRIES[name]


def _our_options(default: pullback.Damping, options: dict[str, Any]) -> dict[str, Any]:
    """Makes the option objects of our optimizers from the numbers of the command line."""
    options = dict(options)
    samples, damping, control = options.pop("samples"), options.pop("damping"), options.pop("control")
    arc = options.pop("arc")
    momentum, decay = options.pop("momentum"), options.pop("decay")
    if samples is not None:
        if samples < 1:
            raise ValueError(f"samples is {samples}; give 1 or more.")
        # The seed of the run, so that seeds differ in the draws as well.
        options["metric"] = pullback.Sampled(m=samples, seed=torch.initial_seed())
    chosen = {
        key: value for key, value in {"initial": damping, "control": control, "arc": arc}.items() if value is not None
    }
    if chosen:
        # What is not chosen stays the optimizer's own default.
        options["damping"] = dataclasses.replace(default, **chosen)
    if momentum is not None:
        options["momentum"] = pullback.Momentum(kind=momentum, decay=decay)
    return options


def _damping_of(source: type[pullback.optim.PullbackOptimizer], options: dict[str, Any]) -> pullback.Damping:
    """The damping where nothing is chosen; Gauss-Newton has two."""
    return (pullback.FeedbackGaussNewton if options.get("geodesic") else source).default_damping


def _our_entry(name: str, source: type[pullback.optim.PullbackOptimizer], summary: str) -> OptimizerEntry:
    return OptimizerEntry(
        name,
        summary,
        source=lambda: source,
        build=lambda model, criterion, options: source(
            model, criterion, **_our_options(_damping_of(source, options), options)
        ),
        extra={
            "samples": Option(int | None, None),
            "damping": Option(float | None, None),
            "control": Option(str | None, None),
            "arc": Option(bool | None, None),
            "momentum": Option(str | None, None),
            "decay": Option(float, pullback.Momentum().decay),
            "partition": Option(str | None, None),
            "mass": Option(str, "identity"),
        },
    )


def _kronecker(
    model: nn.Module,
    criterion: nn.Module,
    options: dict[str, Any],
    make: Callable[..., Stepper] = pullback.Kronecker,
) -> Stepper:
    options = dict(options)
    every, trust = options.pop("refresh"), options.pop("trust")
    if every is not None:
        options["refresh"] = pullback.Refresh(every=every)
    if not trust:
        options["trust"] = None
    # The seed of the run, so that seeds differ in the draws as well.
    return make(model, criterion, **options, seed=torch.initial_seed())


_GAME = {
    name: Option(hint, getattr(pullback.Game, name))
    for name, hint in {
        "structure": Information, "hold": int, "exploration": float, "cut": float, "renew": int,
    }.items()
}  # fmt: skip


def _kronecker_game(model: nn.Module, criterion: nn.Module, options: dict[str, Any]) -> Stepper:
    options = dict(options)
    game = pullback.Game(**{name: options.pop(name) for name in _GAME}, seed=torch.initial_seed())
    return _kronecker(model, criterion, options | {"game": game}, pullback.KroneckerGame)


def _ocnopt(model: nn.Module, criterion: nn.Module, options: dict[str, Any]) -> Stepper:
    options = dict(options)
    for name in ("weight_decay", "momentum"):
        if options.get(name) is None:
            options.pop(name)  # a host need not have it
    # The seed of the run, so that seeds differ in the draws as well.
    return pullback.OCNOpt(model, criterion, **options, seed=torch.initial_seed())


def _least_squares() -> Callable[..., Any]:
    require_scipy()
    return LeastSquares


def _soap() -> Callable[..., Any]:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise missing_extra("the optimizer soap", "pytorch_optimizer", "peers") from error
    source: Callable[..., Any] = SOAP
    return source


def _on_parameters(source: _Source) -> _Build:
    return lambda model, _criterion, options: source()(model.parameters(), **options)


def _peer(name: str, summary: str, source: _Source, **others: Any) -> OptimizerEntry:
    return OptimizerEntry(name, summary, source, _on_parameters(source), **others)


_ENTRIES = {
    entry.name: entry
    for entry in (
        _our_entry(
            "layerwise-metric",
            pullback.LayerwiseMetric,
            "ours: the output metric pulled back, one block per layer",
        ),
        _our_entry(
            "gauss-newton",
            pullback.GaussNewton,
            "ours: the output metric pulled back to all parameters at once",
        ),
        _our_entry(
            "feedback",
            pullback.FeedbackGaussNewton,
            "ours: every module answers to what the modules before it really did",
        ),
        OptimizerEntry(
            "kronecker",
            "ours: K-FAC and EKFAC from the same pulled-back metric, amortised, for mini-batches and large layers",
            source=lambda: pullback.Kronecker,
            build=_kronecker,
            extra={"refresh": Option(int | None, None), "trust": Option(bool, True)},
        ),
        OptimizerEntry(
            "kronecker-game",
            "ours: kronecker whose parallel modules are players, open-loop, cooperative or in coalitions of a bandit",
            # The game is made of the options below, all others are of Kronecker.
            source=lambda: pullback.Kronecker,
            build=_kronecker_game,
            extra={"refresh": Option(int | None, None), "trust": Option(bool, True), **_GAME},
        ),
        OptimizerEntry(
            "ocnopt",
            "ours: SGD, RMSprop, Adam or kronecker, whose layers answer sample by sample to what those before them did",
            source=lambda: pullback.OCNOpt,
            build=_ocnopt,
            extra={"weight_decay": Option(float | None, None), "momentum": Option(float | None, None)},
        ),
        _peer("sgd", "torch.optim.SGD", lambda: torch.optim.SGD),
        _peer("adam", "torch.optim.Adam", lambda: torch.optim.Adam),
        _peer("adamw", "torch.optim.AdamW", lambda: torch.optim.AdamW),
        _peer("rmsprop", "torch.optim.RMSprop", lambda: torch.optim.RMSprop),
        _peer(
            "lbfgs",
            "torch.optim.LBFGS, here with its line search; one step is up to max_iter iterations",
            lambda: torch.optim.LBFGS,
            extra={"line_search_fn": Option(str | None, "strong_wolfe")},
            closure=True,
        ),
        OptimizerEntry(
            "muon",
            "torch.optim.Muon for the 2-D weights, AdamW for what is not a matrix",
            source=lambda: torch.optim.Muon,
            build=lambda model, _criterion, options: MuonWithAdamW(model, **options),
            extra={"adamw_lr": Option(float, 1e-3), "adamw_weight_decay": Option(float, 1e-2)},
        ),
        OptimizerEntry(
            "least-squares",
            "scipy.optimize.least_squares on all training data, for MSELoss; one step is one of its iterations",
            source=_least_squares,
            build=lambda model, criterion, options: LeastSquares(model, criterion, **options),
        ),
        OptimizerEntry(
            "e-msa",
            "extended successive approximations: each layer maximises its own augmented Hamiltonian, by L-BFGS",
            source=lambda: ExtendedMSA,
            build=lambda model, criterion, options: ExtendedMSA(model, **options),
        ),
        OptimizerEntry(
            "snopt",
            "SNOpt's rule for neural ODEs: EKFAC of one costate column, eigenbases every 100 steps",
            source=lambda: SNOpt,
            build=lambda model, criterion, options: SNOpt(model, criterion, **options),
        ),
        _peer("soap", "SOAP of pytorch_optimizer (an optional package)", _soap),
    )
}
