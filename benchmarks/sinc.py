"""Seconds to a mean squared error of 3e-6 on sinc, beside torch-levenberg-marquardt (an optional peer).

20,000 points, 61 parameters, batches of 1000, float64, the same initial weights and batches for all; interleaved, one
thread, medians of five seeds. Charged are the steps alone (drawing the batch, passes, step); after each of them the
error on all points is computed outside of the clock. Two curves: sin(10 x) / (10 x), and ``torch.sinc(10 x)`` =
sin(10 pi x) / (10 pi x) of the peer's own example. Ours run with their defaults, on the batches and, marked "all", on
all 20,000 rows at once (61 parameters are the small side: six to eight times the time of a step on 1000). Without the
peer its rows are left out. About 6 minutes on one core:

    python benchmarks/sinc.py [--seeds 5] [--limit 6] [--out benchmarks/results/sinc.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pullback
from pullback.problems import Problem, load_problem, machine, measuring
from pullback.problems.runner import batches

LEVEL = 3e-6
Step = Callable[[Tensor, Tensor], Any]
Make = Callable[[nn.Module], Step]


def ours(make: Callable[[nn.Module, nn.Module], torch.optim.Optimizer]) -> Make:
    """The ordinary loop."""

    def made(model: nn.Module) -> Step:
        criterion = nn.MSELoss()
        opt = make(model, criterion)

        def step(x: Tensor, y: Tensor) -> None:
            opt.zero_grad()
            criterion(model(x), y).backward()
            opt.step()

        return step

    return made


def peer(method: str) -> Make:
    """torch-levenberg-marquardt with its defaults and one of its solvers."""
    training = importlib.import_module("torch_levenberg_marquardt.training")
    return lambda model: training.LevenbergMarquardtModule(model, solve_method=method).training_step


def contestants() -> dict[str, tuple[Make, bool]]:
    """Name: how a step is made, and whether it takes all rows at once."""
    feedback = ours(pullback.FeedbackGaussNewton)
    newton = ours(pullback.GaussNewton)
    geodesic = ours(lambda model, criterion: pullback.GaussNewton(model, criterion, geodesic=True))
    spring = ours(
        lambda model, criterion: pullback.FeedbackGaussNewton(
            model, criterion, momentum=pullback.Momentum(kind="spring")
        )
    )
    found = {
        "feedback": (feedback, False),
        "geodesic": (geodesic, False),
        "gauss-newton": (newton, False),
        "feedback, spring": (spring, False),
        "feedback, all": (feedback, True),
        "geodesic, all": (geodesic, True),
        "gauss-newton, all": (newton, True),
    }
    try:
        found |= {f"peer, {method}": (peer(method), False) for method in ("qr", "cholesky", "solve")}
    except ImportError as error:
        print(f"torch-levenberg-marquardt is left out: {error}")
    return found


def race(problem: Problem, make: Make, seed: int, limit: float) -> dict[str, Any]:
    """One run to the level, or to the limit of processor seconds."""
    x, y = problem.train
    torch.manual_seed(seed)
    make(problem.build_model(seed))(*next(batches(problem, seed)))
    model = problem.build_model(seed)
    step, source = make(model), batches(problem, seed)
    seconds = cpu = 0.0
    steps, loss, best = 0, math.nan, math.inf
    reached = False
    while not reached and cpu < limit and not (steps and not math.isfinite(loss)):
        wall, processor = time.perf_counter(), time.process_time()
        step(*next(source))
        seconds += time.perf_counter() - wall
        cpu += time.process_time() - processor
        steps += 1
        with torch.no_grad():
            loss = float((model(x) - y).square().mean())
        best = min(best, loss)
        reached = loss <= LEVEL
    return {"seed": seed, "reached": reached, "steps": steps, "seconds": seconds, "cpu_seconds": cpu, "best": best}


def row_of(curve: str, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds; a run that did not arrive counts as later than all."""

    def median(key: str) -> float | None:
        value = statistics.median(run[key] if run["reached"] else math.inf for run in runs)
        return value if math.isfinite(value) else None

    return {"curve": curve, "name": name, "reached": sum(run["reached"] for run in runs),
            **{key: median(key) for key in ("steps", "seconds", "cpu_seconds")},
            "best": statistics.median(run["best"] for run in runs), "runs": runs}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    titles = ("steps", 6), ("seconds", 8), ("cpu s", 7), ("/ peer", 7), ("best", 9)
    yield f"{'curve':<11} {'optimizer':<18} {'reached':>7} {' '.join(f'{name:>{width}}' for name, width in titles)}"
    for row in rows:
        times = [r["cpu_seconds"] for r in rows if r["curve"] == row["curve"] and r["name"].startswith("peer")]
        fastest = min((t for t in times if t is not None), default=None)
        share = row["cpu_seconds"] / fastest if fastest and row["cpu_seconds"] else None
        cells = [f"{'-' if v is None else format(v, spec):>{width}}" for v, spec, width in (
            (row["steps"], "g", 6), (row["seconds"], ".2f", 8), (row["cpu_seconds"], ".2f", 7), (share, ".2f", 7),
            (row["best"], ".1e", 9))]  # fmt: skip
        yield f"{row['curve']:<11} {row['name']:<18} {row['reached']:>5}/{len(row['runs'])} {' '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=6.0, help="processor seconds of a run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sinc.json")
    options = parser.parse_args()
    makers = contestants()
    rows = []
    with measuring(1):
        for curve, spec in {"sin(10x)": "sinc", "sinc(10x)": "sinc:normalised=true"}.items():
            whole = load_problem(spec)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in makers}
            for seed in range(10, 10 + options.seeds):
                for name, (make, every) in makers.items():
                    problem = replace(whole, batch_size=None) if every else whole
                    runs[name].append(race(problem, make, seed, options.limit))
            rows += [row_of(curve, name, found) for name, found in runs.items()]
    print("\n".join(table(rows)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(1), "level": LEVEL, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
