"""Feedback on function-2d at every depth: iterations and seconds to 1e-6 and 1e-10, beside Gauss-Newton.

    python benchmarks/function2d.py [--depths 3 6 9 15] [--seeds 5] [--out benchmarks/results/function2d.json]

is `pullback compare function-2d:depth=D --optimizers feedback,gauss-newton:geodesic=true,gauss-newton --steps 100
--target 1e-6,1e-10` for each depth (150 steps, since geodesic acceleration needs more than 100 to 1e-10 in deep nets;
the loss after 100 is read from the history). With --first-order also Adam (4 rates), L-BFGS and scipy's least_squares,
60 s each, and how soon feedback reaches the best loss that any of them does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from pullback.problems import Budget, compare, load_problem

OURS = ("feedback", "gauss-newton:geodesic=true", "gauss-newton")
OTHERS = ("adam:lr=3e-4", "adam:lr=1e-3", "adam:lr=3e-3", "adam:lr=1e-2", "lbfgs", "least-squares")
LEVELS = (1e-6, 1e-10)


def arrival(run: dict[str, Any], level: float) -> tuple[float, float]:
    """Steps and seconds to a loss; infinite if it was not reached."""
    return next(((row[1], row[0]) for row in run["history"] if row[2] <= level), (math.inf, math.inf))


def after(run: dict[str, Any], steps: int) -> float:
    """Loss after so many steps; a run that ended before had reached round-off."""
    return [row[2] for row in run["history"] if row[1] <= steps][-1]


def depth_row(depth: int, seeds: list[int], steps: int) -> dict[str, Any]:
    problem = load_problem(f"function-2d:depth={depth}")
    result = compare(problem, ",".join(OURS), seeds=seeds, budget=Budget(steps=steps)).to_json()
    out: dict[str, Any] = {"depth": depth, "machine": result["machine"]}
    for number, name in enumerate(OURS):
        runs = result["runs"][number :: len(OURS)]  # seed by seed, in this order
        losses = [after(run, 100) for run in runs]
        own: dict[str, Any] = {"loss_100": losses, "trials_per_step": [run["trials_per_step"] for run in runs]}
        for level in LEVELS:
            own[f"steps_{level:g}"], own[f"seconds_{level:g}"] = map(
                list, zip(*(arrival(run, level) for run in runs), strict=True)
            )
        out[name] = own
    return out


def show(row: dict[str, Any]) -> None:
    for name in OURS:
        own = row[name]
        cells = [f"{statistics.median(own['loss_100']):.0e} ({max(own['loss_100']):.0e})"]
        for level in LEVELS:
            steps, seconds = own[f"steps_{level:g}"], own[f"seconds_{level:g}"]
            cells.append(f"{statistics.median(steps):>5.0f} {max(steps):>5.0f} {statistics.median(seconds):>6.2f}")
        print(f"{row['depth']:>5}  {name:<27} {cells[0]:>16}  {cells[1]}  {cells[2]}", flush=True)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Feedback over the better of the two, by median."""

    def middle(name: str, key: str) -> float:
        return statistics.median(row[name][key])

    rivals = OURS[1:]
    best = min(middle(name, "seconds_1e-10") for name in rivals)
    return {
        "steps_1e-06": middle("feedback", "steps_1e-06") / middle(OURS[1], "steps_1e-06"),
        "seconds_1e-10": middle("feedback", "seconds_1e-10") / best,
    }


def first_order(depth: int, seeds: list[int], seconds: float) -> dict[str, Any]:
    """Seconds of feedback to the best loss of the others, over the seconds the best of them took."""
    problem = load_problem(f"function-2d:depth={depth}")
    result = compare(problem, ",".join(OTHERS), seeds=seeds, budget=Budget(seconds=seconds)).to_json()
    ours = compare(problem, "feedback", seeds=seeds, budget=Budget(steps=150)).to_json()
    rows = []
    for seed in seeds:
        labelled = zip(itertools.cycle(OTHERS), result["runs"], strict=False)
        runs = [run | {"label": label} for label, run in labelled if run["seed"] == seed and run["loss"] is not None]
        best = min(runs, key=lambda run: min(row[2] for row in run["history"]))
        level = min(row[2] for row in best["history"])
        own = next(run for run in ours["runs"] if run["seed"] == seed)
        theirs, mine = arrival(best, level)[1], arrival(own, level)[1]
        losses = {run["label"]: min(row[2] for row in run["history"]) for run in runs}
        rows.append({"seed": seed, "best": best["label"], "loss": level, "seconds": theirs, "feedback": mine,
                     "ratio": mine / theirs, "losses": losses})  # fmt: skip
        print(f"seed {seed}: best {best['label']} {level:.1e} after {theirs:.1f} s, feedback {mine:.2f} s", flush=True)
    return {"depth": depth, "seconds": seconds, "rows": rows, "machine": result["machine"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="*", default=[3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 20])
    parser.add_argument("--seeds", type=int, default=5, help="how many, counted from 10: others chose the constants")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--first-order", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the others")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seeds = list(range(10, 10 + options.seeds))
    if options.first_order:
        kept: Any = [first_order(depth, seeds, options.seconds) for depth in options.depths]
    else:
        print("depth  optimizer                    loss after 100   to 1e-6: steps worst sec   to 1e-10")
        kept = []
        for depth in options.depths:
            row = depth_row(depth, seeds, options.steps)
            show(row)
            row["ratios"] = ratios(row)
            print(f"       feedback over the others: {row['ratios']}", flush=True)
            kept.append(row)
    if options.out:
        options.out.write_text(json.dumps(kept, indent=1).replace("Infinity", "null") + "\n")


if __name__ == "__main__":
    main()
