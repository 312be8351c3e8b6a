"""Kronecker at its defaults beside first-order methods, each at the best of several learning rates.

digits: MLP 64-64-32-10, batch 128, processor seconds and steps to a training loss of 1e-2 on all rows, read after every
step. fashion: MLP 784-256-128-10 to 88 % of 5000 rows kept for validation, read every 25 steps. cnn: four convolutions
and two linear layers, to 91 % of such rows, read every 50 steps. text: a character model of tiny Shakespeare, 4 blocks
of width 128, to the validation loss that AdamW has after 2000 steps, read every 50 steps.

The learning rates of the others are chosen by their seconds to the level on seeds of their own, those never used again
(for text by the validation loss after the last step, on the seed of the comparison: it favours AdamW). Test rows are
not looked at. One thread, seconds are those of the processor, evaluations are not counted; methods take turns, seed by
seed. Reaching no level within ``limit`` seconds counts as later than all. On two shared cores digits take 2 minutes,
fashion 10, cnn 30, text 30:

    PULLBACK_DATA=DATA python benchmarks/deep.py [--races digits,fashion,cnn,text] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pullback.problems import Problem, load_problem, machine, measuring
from pullback.problems.optimizer_spec import parse_optimizer
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.runner import batches

OURS = "kronecker"
#: Part of the limit that runs get while rates are chosen.
TUNING = 2 / 3
MUON = "muon:lr={r},weight_decay=0"


@dataclass(frozen=True)
class Race:
    """One comparison.

    Attributes:
        problem: Its name.
        what: "loss" of the training rows, or "score" or "validation loss" of those kept for validation.
        level: To reach; None takes what AdamW ends with.
        every: Steps between readings.
        seeds: How many, for the comparison.
        tuning: Seeds to choose rates with.
        limit: Processor seconds of a run.
        steps: Most steps of a run.
        others: Specifications with a rate left open, and the rates.
    """

    problem: str
    what: str
    level: float | None
    every: int
    seeds: int
    tuning: tuple[int, ...]
    limit: float
    steps: int
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)


RACES = {
    "digits": Race(
        "digits", "loss", 1e-2, 1, 5, (100, 101), 3.0, 600,
        {
            "sgd:lr={r},momentum=0.9": ("0.05", "0.1", "0.2", "0.5", "1"),
            "adam:lr={r}": ("3e-3", "1e-2", "2e-2", "3e-2", "5e-2"),
            "soap:lr={r}": ("3e-3", "1e-2", "3e-2", "1e-1"),
            MUON: ("1e-2", "3e-2", "1e-1", "3e-1"),
        },
    ),
    "fashion": Race(
        "fashion-mnist:validation_rows=5000", "score", 0.88, 25, 3, (100,), 15.0, 4000,
        {
            "sgd:lr={r},momentum=0.9": ("0.01", "0.03", "0.1", "0.3"),
            "adam:lr={r}": ("3e-4", "1e-3", "3e-3", "1e-2"),
            "soap:lr={r}": ("1e-3", "3e-3", "1e-2", "3e-2"),
            MUON: ("3e-3", "1e-2", "3e-2", "1e-1"),
        },
    ),
    "cnn": Race(
        "fashion-mnist-cnn:net=conv4,validation_rows=5000", "score", 0.91, 50, 3, (100,), 60.0, 4000,
        {
            "sgd:lr={r},momentum=0.9": ("0.01", "0.03", "0.1", "0.3"),
            "adam:lr={r}": ("3e-4", "1e-3", "3e-3", "1e-2"),
            "soap:lr={r}": ("1e-3", "3e-3", "1e-2", "3e-2"),
            MUON: ("3e-3", "1e-2", "3e-2", "1e-1"),
        },
    ),
    "text": Race(
        "shakespeare", "validation loss", None, 50, 1, (0,), 2000.0, 2000,
        {"adamw:lr={r}": ("5e-4", "1e-3", "2e-3", "4e-3")},
    ),
}  # fmt: skip


def reading(race: Race, problem: Problem, model: nn.Module) -> float:
    """What is raced for, so that less is better."""
    model.eval()
    with torch.no_grad():
        x, y = (problem.validation if race.what != "loss" else problem.reported) or problem.train
        outputs = torch.cat([model(part) for part in x.split(500)])
        value = problem.score(outputs, y) if race.what == "score" else float(problem.loss(outputs, y))
    model.train()
    return -value if race.what == "score" else value


def run(race: Race, problem: Problem, spec: str, seed: int, level: float, limit: float) -> dict[str, Any]:
    """One run to the level, or to the limits."""
    chosen = parse_optimizer(spec)
    model, criterion = problem.build_model(seed), nn.CrossEntropyLoss()
    optimizer = optimizer_entry(chosen.name).make(chosen.options, model, criterion)
    torch.manual_seed(seed)
    seconds, steps, value, pieces = 0.0, 0, math.inf, []
    source = batches(problem, seed)
    while value > level and seconds < limit and steps < race.steps:
        x, y = next(source)
        start = time.process_time()
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        pieces.append(time.process_time() - start)
        seconds += pieces[-1]
        steps += 1
        if steps % race.every == 0:
            value = reading(race, problem, model)
            if not math.isfinite(value):
                break
    return {"seed": seed, "reached": value <= level, "steps": steps, "seconds": seconds, "last": abs(value),
            "ms": 1e3 * seconds / steps}  # fmt: skip


def later(found: dict[str, Any], key: str = "seconds") -> float:
    """Seconds or steps to the level, infinite if it was not reached."""
    return float(found[key]) if found["reached"] else math.inf


def tuned(race: Race, problem: Problem, level: float) -> tuple[list[str], dict[str, Any]]:
    """The best rate of every method, and what all of them did."""
    best, tried = [], {}
    for pattern, rates in race.others.items():
        runs = {}
        for rate in rates:
            spec = pattern.replace("{r}", rate)
            limit = race.limit * TUNING
            runs[spec] = [run(race, problem, spec, seed, level, limit) for seed in race.tuning]
        by = {
            spec: (statistics.mean(map(later, each)), statistics.mean(r["last"] for r in each))
            for spec, each in runs.items()
        }
        better = max if race.what == "score" else min
        arrived = {spec: at for spec, (at, _) in by.items() if math.isfinite(at)}
        best.append(min(arrived, key=lambda s: arrived[s]) if arrived else better(by, key=lambda s: by[s][1]))
        tried |= runs
        print(f"  {pattern.split(':')[0]}: {best[-1]}", flush=True)
    return best, tried


def raced(race: Race) -> dict[str, Any]:
    """One comparison."""
    problem = load_problem(race.problem)
    specs, tried = tuned(
        race, problem, -math.inf if race.level is None else race.level * (1 - 2 * (race.what == "score"))
    )
    level = race.level
    if level is None:
        # The run that is the yardstick is the one that was chosen.
        level = tried[specs[0]][0]["last"]
    below = -level if race.what == "score" else level
    runs: dict[str, list[dict[str, Any]]] = {spec: [] for spec in (OURS, *specs)}
    for seed in range(race.seeds):
        for spec, found in runs.items():
            if race.level is None and spec != OURS:
                found.append({**tried[spec][0], "reached": True})
                continue
            found.append(run(race, problem, spec, seed, below, race.limit))
    rows = []
    for spec, found in runs.items():
        at, steps = (statistics.median(later(each, key) for each in found) for key in ("seconds", "steps"))
        rows.append({"optimizer": spec, "reached": sum(each["reached"] for each in found),
                     "seconds": at if math.isfinite(at) else None, "steps": steps if math.isfinite(steps) else None,
                     "ms": statistics.median(each["ms"] for each in found), "runs": found})  # fmt: skip
    return {"problem": race.problem, "what": race.what, "level": level, "limit": race.limit, "rows": rows,
            "tuning": {spec: [{k: each[k] for k in ("reached", "steps", "seconds", "last")} for each in found]
                       for spec, found in tried.items()}}  # fmt: skip


def table(name: str, result: dict[str, Any]) -> str:
    """One line for each method."""
    lines = [f"{name}, {result['what']} {result['level']:.4g}", f"{'optimizer':<36} reached  seconds   steps      ms"]
    for row in result["rows"]:
        cells = [f"{'-' if v is None else format(v, spec):>8}" for v, spec in (
            (row["seconds"], ".3g"), (row["steps"], "g"), (row["ms"], ".3g"))]  # fmt: skip
        lines.append(f"{row['optimizer']:<36} {row['reached']:>3}/{len(row['runs'])} {' '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", default=",".join(RACES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "deep.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    with measuring(1):
        for name in options.races.split(","):
            kept[name] = {**raced(RACES[name]), "machine": machine(1)}
            print(table(name, kept[name]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
