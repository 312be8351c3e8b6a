"""Test RMSE and seconds on UCI regressions, beside scikit-learn's MLPRegressor.

One hidden layer of 50 tanh units for both, the standard splits, a tenth of each split's training rows kept for
validation; data standardised by the rest. scikit-learn: solvers adam (its default) and lbfgs, each with alpha from
four values; solver and alpha are those with the least error on the validation rows. Ours: ``GaussNewton`` with
geodesic acceleration for all sets, all rows at once, or batches of 300 on naval and of 8000 on protein; weight decay
from four values and the step at which to stop, chosen on the validation rows too. The test rows are scored once per
method and split, with what was chosen.

Seconds (of the processor, one thread) are those to a training loss: of each of scikit-learn's solvers with its chosen
alpha the loss its fit ended with, and ours without decay the first evaluation at or below it. Adam is granted the
first epoch within two percent of its last loss. On two shared cores concrete and
energy took less than 20 minutes with 20 splits, naval half an hour, protein with five splits a quarter of one;
--splits takes fewer:

    PULLBACK_DATA=DATA python benchmarks/uci.py [--sets concrete,energy] [--splits K] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pullback
from pullback.problems import Problem, load_problem, machine, measuring
from pullback.problems.runner import batches

ALPHAS = (1e-4, 1e-2, 1e-1, 1.0)
DECAYS = (0.0, 1e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Set:
    """One data set.

    Attributes:
        splits: How many there are.
        batch_size: Rows per step of ours, or None for all.
        steps: Most steps of ours.
        epochs: Most iterations of scikit-learn.
    """

    splits: int
    batch_size: int | None
    steps: int
    epochs: int


SETS = {
    "concrete": Set(20, None, 100, 1000),
    "energy": Set(20, None, 100, 1000),
    "naval-propulsion-plant": Set(20, 300, 600, 200),
    "protein-tertiary-structure": Set(5, 8000, 150, 200),
}


@dataclass
class Fit:
    """What training left behind: validation error, the predictor's weights, and the path of the training loss."""

    validation: float
    weights: dict[str, Tensor]
    path: list[tuple[float, float]]


def ours(problem: Problem, seed: int, size: Set, decay: float, level: float = 0.0) -> Fit:
    """Trains until the validation loss has not fallen for a third of the steps, or to a training loss."""
    assert problem.validation is not None
    model, criterion = problem.build_model(seed), nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, geodesic=True, weight_decay=decay)
    source, mse = batches(problem, seed), nn.functional.mse_loss
    every = 1 if problem.batch_size is None else max(1, problem.steps_per_epoch // 4)
    best, chosen, last, seconds = math.inf, copy.deepcopy(model.state_dict()), 0, 0.0
    path: list[tuple[float, float]] = []
    for k in range(1, size.steps + 1):
        x, y = next(source)
        start = time.process_time()
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        seconds += time.process_time() - start
        if k % every and k != size.steps:
            continue
        with torch.no_grad():
            path.append((seconds, mse(model(problem.train[0]), problem.train[1]).item()))
            held = mse(model(problem.validation[0]), problem.validation[1]).item()
        if held < best:
            best, chosen, last = held, copy.deepcopy(model.state_dict()), k
        if path[-1][1] <= level or (not level and k - last > size.steps // 3):
            break
    opt.close()
    return Fit(best, chosen, path)


def theirs(problem: Problem, seed: int, size: Set, solver: str, alpha: float) -> tuple[float, Any, float, float]:
    """Validation error, the fitted regressor, processor seconds, and the training loss it ended with."""
    from sklearn.neural_network import MLPRegressor

    assert problem.validation is not None
    hidden = [m.out_features for m in problem.build_model(seed) if isinstance(m, nn.Linear)][:-1]
    found = MLPRegressor(
        hidden_layer_sizes=tuple(hidden),
        activation="tanh",
        solver=solver,
        alpha=alpha,
        max_iter=size.epochs,
        random_state=seed,
    )
    (x, y), (xv, yv) = ([part.numpy() for part in split] for split in (problem.train, problem.validation))
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that it may not have converged.
        found.fit(x, y.ravel())
    seconds = time.process_time() - start
    if solver == "adam":
        curve = found.loss_curve_
        seconds *= 1 + next(k for k, loss in enumerate(curve) if loss <= 1.02 * curve[-1])
        seconds /= len(curve)
    loss = float(((found.predict(x) - y.ravel()) ** 2).mean())
    return float(((found.predict(xv) - yv.ravel()) ** 2).mean()), found, seconds, loss


def split_of(name: str, number: int, size: Set) -> dict[str, Any]:
    """Everything about one split."""
    batch = "none" if size.batch_size is None else size.batch_size
    problem = load_problem(f"uci:name={name},batch_size={batch}").for_seed(number)
    fits = {decay: ours(problem, number, size, decay) for decay in DECAYS}
    decay = min(fits, key=lambda key: fits[key].validation)
    solvers = {
        solver: min(
            ((alpha, *theirs(problem, number, size, solver, alpha)) for alpha in ALPHAS), key=lambda fit: fit[1]
        )
        for solver in ("adam", "lbfgs")
    }
    out: dict[str, Any] = {"split": number, "decay": decay}
    for solver, (alpha, _, _, seconds, loss) in solvers.items():
        path = fits[0.0].path
        if path[-1][1] > loss and min(entry[1] for entry in path) > loss:
            path = ours(problem, number, size, 0.0, level=loss).path
        own = next((at for at, reached in path if reached <= loss), None)
        out[solver] = {"alpha": alpha, "seconds": seconds, "loss": loss, "ours": own}
    # The test rows, once.
    assert problem.test is not None
    x, y = problem.test
    model = problem.build_model(number)
    model.load_state_dict(fits[decay].weights)
    best = min(solvers, key=lambda solver: solvers[solver][1])
    predicted = torch.as_tensor(solvers[best][2].predict(x.numpy())).reshape(y.shape)
    with torch.no_grad():
        out |= {"rmse": problem.score(model(x), y), "rmse_sklearn": problem.score(predicted, y), "solver": best}
    return out


def summary(name: str, splits: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the RMSE with the standard error of their difference; medians of the speed-up."""
    ours_, other = ([s[key] for s in splits] for key in ("rmse", "rmse_sklearn"))
    gaps = [a - b for a, b in zip(ours_, other, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    row = {"set": name, "rmse": statistics.mean(ours_), "rmse_sklearn": statistics.mean(other),
           "difference": statistics.mean(gaps), "standard_error": error,
           "no_worse_on": sum(gap <= 0 for gap in gaps), "machine": machine(1)}  # fmt: skip
    for solver in ("adam", "lbfgs"):
        ratios = [0.0 if s[solver]["ours"] is None else s[solver]["seconds"] / s[solver]["ours"] for s in splits]
        row[f"sooner_than_{solver}"] = statistics.median(ratios)
        row[f"reached_{solver}"] = sum(ratio > 0 for ratio in ratios)
    return row | {"splits": splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(SETS), help="names, with commas; keeps the rows of others")
    parser.add_argument("--splits", type=int, help="fewer than all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "uci.json")
    options = parser.parse_args()
    from threadpoolctl import threadpool_limits

    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    print(
        f"{'set':<28} {'splits':>6} {'ours':>9} {'sklearn':>9} {'no worse':>9} {'adam / ours':>12} {'lbfgs / ours':>13}"
    )
    for name in options.sets.split(","):
        size = SETS[name]
        found = []
        for k in range(min(options.splits or size.splits, size.splits)):
            with threadpool_limits(1), measuring(1):
                # Denormals flushed make numpy warn; scikit-learn runs better with the same setting.
                found.append(split_of(name, k, size))
        row = summary(name, found)
        print(f"{name:<28} {len(found):>6} {row['rmse']:>9.4g} {row['rmse_sklearn']:>9.4g} {row['no_worse_on']:>9} "
              f"{row['sooner_than_adam']:>12.1f} {row['sooner_than_lbfgs']:>13.1f}", flush=True)  # fmt: skip
        rows = [old for old in rows if old["set"] != name] + [row]
        rows.sort(key=lambda entry: list(SETS).index(entry["set"]))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
