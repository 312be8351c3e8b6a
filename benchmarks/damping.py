"""The default damping policy beside the plain gain-ratio rule, on every kind of problem.

The plain rule is Nielsen's: a step that raises the loss is undone and mu grows (``Damping(arc=False)``). The default
first tries other steps from the same factors while the batch stays the same; ``always`` does so on changing batches too
and is there to show why it is not the default. Both begin with the same mu and have the same bounds. The seeds begin at
10: none of them had a part in choosing the constants. Runs of one seed are compared in pairs: in the loss after the
given iterations (losses below the floor count as the floor) and in the iterations to the target. A row is worse where
in the median the default has more than 1.1 times the plain rule's and it has more on at least three seeds of four;
small losses differ by more than that between seeds. About 10 minutes of one core (8 of them charged steps):

    PULLBACK_DATA=DATA python benchmarks/damping.py [--only NAME] [--out benchmarks/results/damping.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinn import poisson
from pullback.problems import Budget, Comparison, Problem, Run, compare, load_problem, parse_optimizer

OURS = ("feedback", "gauss-newton:geodesic=true")
RULES = {"default": "", "plain": "arc=false", "always": "arc=true"}
TOLERANCE = 1.1


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        problem: Makes it.
        steps: Iterations of each run.
        target: The level whose time of arrival is compared.
        seeds: How many.
        floor: Losses below it are rounding.
        always: Whether batches change; the arc on changing batches is then measured too.
    """

    problem: Callable[[], Problem]
    steps: int
    target: float
    seeds: int = 5
    floor: float = 0.0
    always: bool = False


def _named(spec: str) -> Callable[[], Problem]:
    return lambda: load_problem(spec)


CASES = {
    "function-2d:depth=3": Case(_named("function-2d:depth=3"), 100, 1e-6, floor=1e-20),
    "function-2d:depth=9": Case(_named("function-2d:depth=9"), 100, 1e-6, floor=1e-20),
    "sinc": Case(_named("sinc"), 300, 1e-8, always=True),
    "sinc:batch_size=none": Case(_named("sinc:batch_size=none"), 100, 1e-10),
    "uci:name=concrete": Case(_named("uci:name=concrete"), 100, 1e-2),
    "uci:name=energy": Case(_named("uci:name=energy"), 100, 1e-3),
    "digits:width=16,batch_size=64": Case(_named("digits:width=16,batch_size=64"), 92, 0.3, seeds=9, always=True),
    "digits": Case(_named("digits"), 36, 0.3, always=True),
    "digits:width=8,batch_size=none": Case(_named("digits:width=8,batch_size=none"), 25, 0.3, seeds=3),
    "poisson 2-24x3-1": Case(poisson, 200, 1e-9),
    "poisson 2-32x5-1": Case(lambda: poisson((32,) * 5, 400, 80), 100, 1e-9, seeds=3),
}


def summary(result: Comparison, label: str, case: Case) -> dict[str, Any]:
    """Median and worst loss, iterations to the target, and what else is of interest, of one optimizer."""
    runs = [run for run in result.runs if run.label == label]
    failed = [run.failure for run in runs if run.failure]
    losses = [math.inf if run.failure else _last(run, case) for run in runs]
    arrivals = [run.arrival(case.target) for run in runs]
    steps = [math.inf if found is None else found.step for found in arrivals]
    found = {
        "loss": statistics.median(losses),
        "worst": max(losses),
        "steps": statistics.median(steps),
        "worst_steps": max(steps),
        "seconds": statistics.median(run.cpu_seconds for run in runs),
        "test": statistics.median(run.test for run in runs) if all(run.test is not None for run in runs) else None,
        "losses": losses,
        "steps_by_seed": steps,
        "failures": failed,
    }
    return {key: _plain(value) for key, value in found.items()}


def _last(run: Run, case: Case) -> float:
    """The last loss; on batches, where it is noisy, the median over the last quarter of the iterations."""
    losses = [entry.loss for entry in run.history if entry.step >= 0.75 * case.steps]
    return statistics.median(losses) if case.always else losses[-1]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ratios(default: dict[str, Any], plain: dict[str, Any], key: str, floor: float = 0.0) -> list[float]:
    """The default over the plain rule, seed by seed; 1 where neither arrived."""
    pairs = [
        [math.inf if value is None else max(value, floor) for value in pair]
        for pair in zip(default[key], plain[key], strict=True)
    ]
    return [1.0 if a == b else a / b for a, b in pairs]


def worse(found: list[float]) -> bool:
    """Whether the default loses, beyond what seeds differ by."""
    return statistics.median(found) > TOLERANCE and sum(ratio > 1 for ratio in found) >= 0.75 * len(found)


def measure(name: str, case: Case) -> list[dict[str, Any]]:
    """All optimizers on one problem."""
    rules = RULES if case.always else {rule: RULES[rule] for rule in ("default", "plain")}
    specs = {(ours, rule): parse_optimizer(_joined(ours, extra)) for ours in OURS for rule, extra in rules.items()}
    seeds = range(10, 10 + case.seeds)
    result = compare(case.problem(), list(specs.values()), seeds=seeds, budget=Budget(steps=case.steps))
    rows = []
    for ours in OURS:
        found = {rule: summary(result, specs[ours, rule].label, case) for rule in rules}
        pair = found["default"], found["plain"]
        by_loss, by_steps = ratios(*pair, "losses", case.floor), ratios(*pair, "steps_by_seed")
        row = {"problem": name, "optimizer": ours, "machine": result.machine, "iterations": case.steps,
               "target": case.target, "seeds": list(seeds), **found, "loss_ratio": _plain(statistics.median(by_loss)),
               "steps_ratio": _plain(statistics.median(by_steps)),
               "worse": worse(by_loss) or worse(by_steps)}  # fmt: skip
        rows.append(row)
        for rule, own in found.items():
            test = "" if own["test"] is None else f"{own['test']:.1e}"
            cells = "".join(f"{_shown(own[key]):>9}" for key in ("loss", "worst", "steps", "worst_steps"))
            mark = f"{_shown(row['loss_ratio'])} {_shown(row['steps_ratio'])}{' WORSE' * row['worse']}"
            print(f"{name:<31} {ours:<27} {rule:<8}{cells} {own['seconds']:>7.1f} {test:>8} "
                  f"{mark * (rule == 'default')}", flush=True)  # fmt: skip
    return rows


def _joined(name: str, option: str) -> str:
    return f"{name}{',' if ':' in name else ':'}{option}" if option else name


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value >= 0.1 else f"{value:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="cases that begin so; keeps other rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "damping.json")
    options = parser.parse_args()
    print(f"{'problem':<31} {'optimizer':<27} {'rule':<8}{'loss':>9}{'worst':>9}{'steps':>9}{'worst':>9} "
          f"{'cpu s':>7} {'test':>8} median ratios: loss, steps")  # fmt: skip
    rows: list[dict[str, Any]] = []
    if options.only is not None and options.out.exists():
        rows = json.loads(options.out.read_text())["rows"]
    for name, case in CASES.items():
        if options.only is None or any(name.startswith(start) for start in options.only):
            rows = [row for row in rows if row["problem"] != name] + measure(name, case)
            rows.sort(key=lambda row: (list(CASES).index(row["problem"]), OURS.index(row["optimizer"])))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return int(any(row["worse"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
