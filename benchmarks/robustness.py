"""How far from its best learning rate may an optimizer be run? Test accuracy from a tenth to ten times that rate.

The five-layer tanh networks of the papers on optimal control: digits (32 wide, batches of 32) and wine (10 wide,
batches of 8). Every method runs over a grid of half decades, all with equal epochs and the same seeds; each seed draws
which of the training rows are kept for validation. By these alone every method takes its best rate: rates whose mean
accuracy is within a standard error of the highest one cannot be told from it, and of them the middle one is taken. The
simpler rule, the highest mean, is reported beside it. Test rows are scored once, with the weights at the end of a run.
A run ends early, and counts as failed, where a loss is not finite or a step is refused; its accuracy is that of the
weights it left. The rate of Kronecker is a factor on its own length of a step. e-msa has one where it climbs by
gradients; with L-BFGS it is run over the weight of its penalties, which is shown and not counted. Exit code 1 if ours
are not above all baselines with a rate:

    python benchmarks/robustness.py [--sets digits wine] [--methods Adam ...] [--seeds 10] [--processes 1]
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pullback import StepError
from pullback.problems import Problem, load_problem, machine
from pullback.problems.optimizer_spec import parse_optimizer
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.problem import Split
from pullback.problems.runner import batches


@dataclass(frozen=True)
class Method:
    """An optimizer with a rate to be filled in, and the first and last half decade of its grid."""

    spec: str
    first: int
    last: int
    ours: bool = False
    counts: bool = True  # as a baseline: what is varied is a learning rate

    @property
    def grid(self) -> range:
        """Exponents k of the rates 10^(k / 2)."""
        return range(self.first, self.last + 1)

    def at(self, k: int) -> str:
        """The optimizer at the rate 10^(k / 2)."""
        return self.spec.replace("RATE", f"{rate(k):g}")


@dataclass(frozen=True)
class Setting:
    """A problem, the training rows that are kept for validation, and how long to train."""

    problem: str
    held: int
    epochs: int


@dataclass(frozen=True)
class Task:
    """One run."""

    setting: Setting
    optimizer: str
    seed: int


METHODS = {
    "SGD, momentum 0.9": Method("sgd:momentum=0.9,lr=RATE", -6, 1),
    "RMSprop": Method("rmsprop:lr=RATE", -8, 0),
    "Adam": Method("adam:lr=RATE", -8, 0),
    "e-msa, gradients": Method("e-msa:inner=2,maximiser=gradient,inner_lr=RATE", -6, 2),
    "e-msa, L-BFGS, weight": Method("e-msa:inner=2,rho=RATE", -4, 4, counts=False),
    "Kronecker": Method("kronecker:lr=RATE", -4, 3, True),
    "OCNOpt on SGD, momentum 0.9": Method("ocnopt:host=sgd,momentum=0.9,lr=RATE", -6, 2, True),
    "OCNOpt on RMSprop": Method("ocnopt:host=rmsprop,lr=RATE", -8, 1, True),
    "OCNOpt on Adam": Method("ocnopt:host=adam,lr=RATE", -8, 1, True),
    "OCNOpt on Kronecker": Method("ocnopt:host=kronecker,lr=RATE", -4, 3, True),
}
SETTINGS = {
    "digits": Setting("digits:depth=5,width=32,batch_size=32", 337, 8),
    "wine": Setting("wine:depth=5,width=10,batch_size=8", 46, 20),
}
AROUND = range(-2, 3)  # half decades: a tenth to ten times
Runs = dict[int, list[dict[str, Any]]]  # by the exponent of the rate


def rate(k: int) -> float:
    """10^(k / 2), with two digits."""
    return float(f"{10 ** (k / 2):.2g}")


@functools.cache
def loaded(name: str) -> Problem:
    """The problem as it comes."""
    return load_problem(name)


@functools.lru_cache(maxsize=1)
def prepared(setting: Setting, seed: int) -> Problem:
    """The problem without the training rows that are for validation, which a seed draws.

    Where it has no test rows, its own validation rows are the test rows.
    """
    problem = loaded(setting.problem)
    x, y = problem.train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rest, held = order[setting.held :], order[: setting.held]
    return replace(
        problem,
        train=(x[rest], y[rest]),
        validation=(x[held], y[held]),
        test=problem.validation if problem.test is None else problem.test,
        reported=None,
    )


def train(task: Task) -> dict[str, Any]:
    """One run: at its end validation loss and accuracy, and test accuracy."""
    problem = prepared(task.setting, task.seed)
    model, criterion = problem.build_model(task.seed), copy.deepcopy(problem.criterion)
    spec = parse_optimizer(task.optimizer)
    optimizer = optimizer_entry(spec.name).make(spec.options, model, criterion)
    torch.manual_seed(task.seed)
    source, failure = batches(problem, task.seed), None
    try:
        for _ in range(task.setting.epochs * problem.steps_per_epoch):
            x, y = next(source)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            if not math.isfinite(loss.item()):
                failure = f"the loss is {loss.item()}"
                break
            loss.backward()
            optimizer.step()
    except StepError as error:
        failure = f"refused: {error}"
    assert problem.validation is not None
    assert problem.test is not None
    loss_, score = scored(problem, model, problem.validation)
    if failure is None and not math.isfinite(loss_):
        failure = f"the validation loss is {loss_}"
    return {
        "optimizer": task.optimizer,
        "seed": task.seed,
        "validation_loss": loss_ if math.isfinite(loss_) else None,
        "validation": score,
        "test": scored(problem, model, problem.test)[1],
        "failure": failure,
    }


@torch.no_grad()
def scored(problem: Problem, model: nn.Module, split: Split) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    outputs = torch.cat([model(x) for x in split[0].split(1000)])
    return problem.loss(outputs, split[1]).item(), problem.score(outputs, split[1])


def runs_of(tasks: Sequence[Task], processes: int) -> list[dict[str, Any]]:
    """All runs, in the order of the tasks, one thread each."""
    if processes == 1:
        alone()
        return [train(task) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(processes, alone) as pool:
        return pool.map(train, tasks, chunksize=1)


def alone() -> None:
    """One thread, and no denormal numbers."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def ranked(runs: Runs) -> dict[int, tuple[float, float]]:
    """Mean validation accuracy and its standard error over the seeds, for rates with a decade on either side."""
    inner = [k for k in runs if min(runs) <= k + AROUND[0] and k + AROUND[-1] <= max(runs)]
    scores = {k: [run["validation"] for run in runs[k]] for k in inner}
    # Rounded, so that equal numbers of right answers are equal.
    return {k: (round(statistics.fmean(v), 9), statistics.stdev(v) / math.sqrt(len(v))) for k, v in scores.items()}


def highest(runs: Runs) -> int:
    """The rate with the highest mean validation accuracy; of equal ones that with the lowest median loss."""
    found = ranked(runs)

    def loss(k: int) -> float:
        return statistics.median(math.inf if (one := r["validation_loss"]) is None else one for r in runs[k])

    return max(found, key=lambda k: (found[k][0], -loss(k)))


def middle(runs: Runs) -> int:
    """The middle of the rates within a standard error of the highest mean; of two middle ones the higher mean."""
    found = ranked(runs)
    mean, error = found[highest(runs)]
    equal = sorted(k for k, (own, _) in found.items() if own >= mean - error)
    return max(equal[(len(equal) - 1) // 2 : len(equal) // 2 + 1], key=lambda k: found[k][0])


def plateau(runs: Runs) -> list[float]:
    """The rates whose median test accuracy is within 5 points of the method's highest: a description, not a choice."""
    medians = {k: statistics.median(run["test"] for run in own) for k, own in runs.items()}
    return [rate(k) for k, own in sorted(medians.items()) if own >= max(medians.values()) - 0.05]


def summary(name: str, runs: Runs, best: int) -> dict[str, Any]:
    """Median and worst seed of the test accuracy at each rate around the best one, and over all these rates."""
    rows = []
    for k in (best + j for j in AROUND):
        own = [run["test"] for run in runs[k]]
        rows.append({"rate": rate(k), "median": statistics.median(own), "worst": min(own)})
    return {
        "method": name,
        "ours": METHODS[name].ours,
        "best_rate": rate(best),
        "at_grid_end": best in (min(ranked(runs)), max(ranked(runs))),
        "around": rows,
        "worst_median": min(row["median"] for row in rows),
        "worst_seed": min(row["worst"] for row in rows),
        "plateau": plateau(runs),
        "failed": sum(run["failure"] is not None for j in AROUND for run in runs[best + j]),
    }


def curve(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What is kept of the runs at one rate, by seed."""
    keys = ("validation", "validation_loss", "test", "failure")
    return {key: [round(v, 12) if isinstance(v := run[key], float) else v for run in runs] for key in keys}


def again(curves: dict[str, dict[str, list[Any]]], grid: range, seeds: int) -> Runs:
    """The runs that were kept, of the first seeds."""
    kept = {k: curves[f"{rate(k):g}"] for k in grid}
    return {k: [{key: own[key][n] for key in own} for n in range(seeds)] for k, own in kept.items()}


def shown(rows: Sequence[dict[str, Any]]) -> bool:
    """Prints the rows; whether ours are above all baselines, by their medians and by their worst seeds."""
    for row in rows:
        cells = "  ".join(f"{100 * at['median']:>5.1f} / {100 * at['worst']:>5.1f}" for at in row["around"])
        worst = f"{100 * row['worst_median']:>5.1f} / {100 * row['worst_seed']:>5.1f}"
        end = "  end of the grid" if row["at_grid_end"] else ""
        failed = f"  {row['failed']} failed" if row["failed"] else ""
        wide = f"   {row['plateau'][0]:g} to {row['plateau'][-1]:g}"
        print(f"  {row['method']:<28} {row['best_rate']:>7g}   {cells}   {worst}{wide}{failed}{end}")
    above = True
    for key in ("worst_median", "worst_seed"):
        ours = min(row[key] for row in rows if row["ours"])
        others = max(row[key] for row in rows if not row["ours"] and METHODS[row["method"]].counts)
        above &= ours > others
        print(f"  {key}: ours at least {100 * ours:.1f} %, baselines at most {100 * others:.1f} %", flush=True)
    return above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=[*METHODS], help="others are as they were")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "robustness.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["sets"] if options.out.exists() else {}
    above, seeds = True, range(10, 10 + options.seeds)
    for name in options.sets:
        setting = SETTINGS[name]
        tasks = {
            (method, k, seed): Task(setting, METHODS[method].at(k), seed)
            for seed in seeds
            for method in options.methods
            for k in METHODS[method].grid
        }
        found = dict(zip(tasks, runs_of([*tasks.values()], options.processes), strict=True))
        runs = {
            key: {k: [found[key, k, seed] for seed in seeds] for k in method.grid}
            if key in options.methods
            else again(kept[name]["curves"][key], method.grid, options.seeds)
            for key, method in METHODS.items()
        }
        curves = {method: {f"{rate(k):g}": curve(own[k]) for k in sorted(own)} for method, own in runs.items()}
        kept[name] = {"setting": asdict(setting), "seeds": options.seeds, "curves": curves}
        for rule in (middle, highest):
            print(f"{name}, {rule.__name__} rate; test accuracy in %: 0.1 to 10 times it, least of them, plateau")
            rows = [summary(method, own, rule(own)) for method, own in runs.items()]
            good = shown(rows)
            above &= good or rule is highest
            kept[name][rule.__name__] = {"rows": rows, "ours_above": good}
        options.out.write_text(json.dumps({"machine": machine(1), "sets": kept}) + "\n")
    return int(not above)


if __name__ == "__main__":
    raise SystemExit(main())
