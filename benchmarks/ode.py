"""Neural ODEs: processor seconds to the training loss that the best Adam ends with, and learned integration times.

Adam, SGD with momentum 0.9 and SNOpt's rule take the best of four rates, by the training loss after ``limit`` processor
seconds on a seed of its own; then all methods run on three other seeds, turn by turn. The level is the median of the
losses that Adam has after ``limit`` seconds. A run ends at the level or after ``limit`` seconds (Adam's go on to the
end), and reaching no level counts as later than all; a run whose ODE cannot be solved any more ends there. The test
score is that at the level, of Adam that at its end. One thread; evaluations and a first step on a throw-away copy are
not counted. Where a race has a ridge c, the loss that all minimise and reach is that of the problem and c/2 |w|^2.

``times``: evaluations of the field in the forward pass, over the last third of the steps, with the integration time
fixed at 1 and with it learned under a quadratic penalty, same optimizer, seeds and steps.

``rules``: who solves for a learned time: nobody, its module alone (open loop), all jointly, or the time in answer to
what the step in the field really did (feedback). Same problem, seeds and steps.

On two shared cores about half an hour:

    PULLBACK_DATA=DATA python benchmarks/ode.py [--races spirals,...] [--times digits-ode,...]
        [--no-rules] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pullback import PullbackError
from pullback.problems import Problem, load_problem, machine, measuring
from pullback.problems.odes import end_time, evaluations
from pullback.problems.optimizer_spec import parse_optimizer
from pullback.problems.optimizers import optimizer_entry
from pullback.problems.runner import batches

SEEDS, TUNING = (0, 1, 2), 100
#: Of every run.
KEPT = ("seed", "steps", "seconds", "last", "test", "failure")
SMALL = ("gauss-newton", "feedback")
LARGE = ("kronecker", "kronecker:form=ekfac")


@dataclass(frozen=True)
class Race:
    """One comparison.

    Attributes:
        problem: Its name.
        limit: Processor seconds of a run.
        ours: Optimizers at their defaults.
        every: Steps between readings.
        adam, sgd, snopt: Rates to choose from.
        lbfgs: Whether L-BFGS runs too: full batch, no random numbers.
        ridge: c of a cost c/2 |w|^2 that all minimise with the loss.
    """

    problem: str
    limit: float
    ours: tuple[str, ...] = SMALL
    every: int = 1
    adam: tuple[str, ...] = ("3e-3", "1e-2", "3e-2", "1e-1")
    sgd: tuple[str, ...] = ("3e-3", "1e-2", "3e-2", "1e-1")
    snopt: tuple[str, ...] = ("1e-3", "3e-3", "1e-2", "3e-2")
    lbfgs: bool = True
    ridge: float = 0.0


RACES = {
    "lynx-hare": Race("lynx-hare", 5.0, adam=("3e-2", "1e-1", "2e-1", "3e-1")),
    "lynx-hare-neural": Race("lynx-hare:field=neural,ahead=5,solver=dopri5", 5.0),
    "spirals": Race("spirals", 5.0),
    "circles": Race("circles", 12.0),
    "moons": Race("moons", 12.0),
    "italy-power": Race("italy-power", 4.0, ridge=1e-2),
    "japanese-vowels": Race("japanese-vowels", 3.0, LARGE, 4, adam=("3e-3", "1e-2", "2e-2", "3e-2"), lbfgs=False),
    "japanese-vowels-cde": Race(
        "japanese-vowels:field=cde", 3.0, LARGE, 4, adam=("3e-3", "1e-2", "2e-2", "3e-2"), lbfgs=False
    ),
    "articulary-words": Race("articulary-words", 4.0, LARGE, 5, adam=("3e-3", "1e-2", "2e-2", "3e-2"), lbfgs=False),
    "arrow-head": Race("arrow-head", 4.0, ridge=1e-2),
    "digits-ode": Race("digits-ode", 4.0, LARGE, 6, lbfgs=False),
    "miniboone": Race("miniboone", 5.0, LARGE, 6, adam=("1e-3", "3e-3", "1e-2", "3e-2"), lbfgs=False),
    "sunspots": Race("sunspots", 5.0),
    "sunspots-irregular": Race("sunspots:model=ode-rnn,missing=0.5", 8.0),
}
#: Name: problem with the time fixed, what learns it, optimizer, steps.
TIMES = {
    "digits-ode": ("digits-ode:solver=dopri5,tolerance=1e-4", "learn_t1=true", "kronecker", 150),
    "circles": ("circles", "learn_t1=true,penalty=0.1", "feedback", 60),
    "japanese-vowels": (
        "japanese-vowels:field=driven,solver=dopri5,tolerance=1e-4", "learn_t1=true", "kronecker", 300,
    ),
}  # fmt: skip
#: Who solves for the time: what the problem learns, optimizer.
RULES = {
    "fixed": ("false", "feedback"),
    "open loop": ("true", "layerwise-metric"),
    "joint": ("true", "gauss-newton"),
    "feedback": ("true", "feedback"),
}
RULED, RULED_STEPS = "circles:penalty=0.1", 40


def cost(ridge: float, model: nn.Module) -> float:
    """c/2 |w|^2."""
    return 0.5 * ridge * sum(float(p.detach().square().sum()) for p in model.parameters()) if ridge else 0.0


def reading(problem: Problem, model: nn.Module, ridge: float = 0.0) -> float:
    """The training loss and the cost of the weights."""
    x, y = problem.reported or problem.train
    model.eval()
    with torch.no_grad():
        loss = float(problem.loss(model(x), y))
    model.train()
    return loss + cost(ridge, model)


def score(problem: Problem, model: nn.Module) -> float | None:
    """The test metric."""
    if problem.test is None:
        return None
    model.eval()
    with torch.no_grad():
        value = problem.score(model(problem.test[0]), problem.test[1])
    model.train()
    return value


def run(
    problem: Problem, spec: str, seed: int, *, limit: float = math.inf, level: float = -math.inf, every: int = 1,
    steps: float = math.inf, ridge: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """One run to the level or to a limit; the readings as (seconds, loss), evaluations of the field at every step."""
    problem = problem.for_seed(seed)
    own = ridge > 0 and spec.partition(":")[0] in ("layerwise-metric", "gauss-newton", "feedback")
    if own:
        spec += f"{',' if ':' in spec else ':'}ridge={ridge}"
    chosen = parse_optimizer(spec)
    model, criterion = problem.build_model(seed), type(problem.criterion)()
    entry = optimizer_entry(chosen.name)
    optimizer = entry.make(chosen.options, model, criterion)
    torch.manual_seed(seed)
    seconds, count, value, failure = 0.0, 0, reading(problem, model, ridge), None
    history, fields, times = [(0.0, value)], [], []
    source = batches(problem, seed)
    while value > level and seconds < limit and count < steps:
        x, y = next(source)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss(model(x), y, criterion)
            fields.append(evaluations(model))
            loss.backward()
            if own or not ridge:
                return loss
            with torch.no_grad():
                for p in model.parameters():
                    p.grad.add_(p, alpha=ridge)
            return loss.detach() + cost(ridge, model)

        start = time.process_time()
        try:
            if entry.closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        except PullbackError as error:
            failure = str(error)
        seconds += time.process_time() - start
        count += 1
        times.append(end_time(model))
        if failure is None and (count % every == 0 or count >= steps):
            try:
                value = reading(problem, model, ridge)
            except PullbackError as error:
                failure = str(error)
            else:
                history.append((seconds, value))
        if failure is not None or not math.isfinite(value):
            break
    found = {"seed": seed, "steps": count, "seconds": seconds, "last": history[-1][1], "failure": failure}
    found |= {"ms": 1e3 * seconds / max(1, count), "fields": fields, "times": times, "history": history}
    found["test"] = None if failure else score(problem, model)
    return found


def warmed(problem: Problem, spec: str) -> None:
    """One step of a throw-away run, which takes torch's lazy initialisation, as races do."""
    run(problem, spec, TUNING, steps=1)


def arrival(found: dict[str, Any], level: float) -> float:
    """Seconds to the first reading at the level, infinite if there is none."""
    return next((s for s, value in found["history"] if value <= level), math.inf)


def tuned(race: Race, problem: Problem, pattern: str, rates: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The specification whose loss is least at the limit, and the losses of all."""
    last = {}
    warmed(problem, pattern.format(rates[0]))
    for rate in rates:
        found = run(problem, pattern.format(rate), TUNING, limit=race.limit, every=race.every, ridge=race.ridge)
        last[rate] = found["last"] if found["failure"] is None and math.isfinite(found["last"]) else math.inf
    return pattern.format(min(last, key=lambda rate: last[rate])), last


def raced(race: Race) -> dict[str, Any]:
    """One comparison."""
    problem = load_problem(race.problem)
    patterns = {"adam:lr={}": race.adam, "sgd:lr={},momentum=0.9": race.sgd, "snopt:lr={}": race.snopt}
    chosen = {pattern: tuned(race, problem, pattern, rates) for pattern, rates in patterns.items()}
    adam, *others = (spec for spec, _ in chosen.values())
    runs: dict[str, list[dict[str, Any]]] = {
        adam: [run(problem, adam, seed, limit=race.limit, every=race.every, ridge=race.ridge) for seed in SEEDS]
    }
    level = statistics.median(each["last"] for each in runs[adam])
    specs = [*others, *(["lbfgs"] if race.lbfgs else []), *race.ours]
    for spec in specs:
        warmed(problem, spec)
    for seed in SEEDS:
        for spec in specs:
            found = run(problem, spec, seed, limit=race.limit, level=level, every=race.every, ridge=race.ridge)
            runs.setdefault(spec, []).append(found)
    rows = []
    for spec, found in runs.items():
        at = statistics.median(arrival(each, level) for each in found)
        tests = [each["test"] for each in found if each["test"] is not None]
        rows.append({
            "optimizer": spec, "reached": sum(arrival(each, level) < math.inf for each in found),
            "seconds": at if math.isfinite(at) else None, "ms": statistics.median(each["ms"] for each in found),
            "test": statistics.median(tests) if tests else None,
            "runs": [{key: each[key] for key in KEPT} for each in found],
        })  # fmt: skip
    return {"problem": race.problem, "level": level, "limit": race.limit, "ridge": race.ridge,
            "metric": problem.metric_name, "rows": rows,
            "tuning": {pattern: {rate: v if math.isfinite(v) else None for rate, v in last.items()}
                       for pattern, (_, last) in chosen.items()}}  # fmt: skip


def timed(name: str) -> dict[str, Any]:
    """Evaluations of the field with the time fixed and learned."""
    text, learns, spec, steps = TIMES[name]
    fixed, learned = load_problem(text), load_problem(text + ("," if ":" in text else ":") + learns)
    rows: dict[str, list[dict[str, Any]]] = {"fixed": [], "learned": []}
    for seed in SEEDS:
        for key, problem in (("fixed", fixed), ("learned", learned)):
            found = run(problem, spec, seed, steps=steps, every=10)
            late = found["fields"][-(steps // 3) :]
            own = {key: found[key] for key in ("seed", "last", "test", "seconds", "failure")}
            rows[key].append({**own, "evaluations": statistics.fmean(late), "t1": found["times"][-1]})
    medians = {
        key: {what: statistics.median(each[what] for each in found) for what in ("evaluations", "last", "test", "t1")}
        for key, found in rows.items()
    }
    return {"problem": text, "optimizer": spec, "steps": steps, "medians": medians, "runs": rows}


def ruled() -> dict[str, Any]:
    """Who solves for a learned time."""
    rows = {}
    for rule, (learns, spec) in RULES.items():
        problem = load_problem(f"{RULED},learn_t1={learns}")
        found = [run(problem, spec, seed, steps=RULED_STEPS, every=RULED_STEPS) for seed in SEEDS]
        late = [statistics.fmean(each["fields"][-(RULED_STEPS // 3) :]) for each in found]
        rows[rule] = {"optimizer": spec, "evaluations": statistics.median(late)} | {
            key: statistics.median(each[key] for each in found) for key in ("last", "test", "seconds")
        }
        rows[rule]["t1"] = [each["times"][-1] for each in found]
    return {"problem": RULED, "steps": RULED_STEPS, "rules": rows}


def table(name: str, result: dict[str, Any]) -> str:
    """One line for each method."""
    first = result["rows"][0]["seconds"]
    lines = [
        f"{name}: training loss {result['level']:.4g}",
        f"{'optimizer':<30} reached seconds   /Adam      ms    test",
    ]
    for row in result["rows"]:
        ratio = row["seconds"] / first if row["seconds"] is not None and first else None
        cells = [
            f"{'-' if v is None else format(v, '.3g'):>7}" for v in (row["seconds"], ratio, row["ms"], row["test"])
        ]
        lines.append(f"{row['optimizer']:<30} {row['reached']:>3}/{len(row['runs'])}  {' '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", default=",".join(RACES))
    parser.add_argument("--times", default=",".join(TIMES))
    parser.add_argument("--rules", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ode.json")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"races": {}, "times": {}}
    kept.setdefault("rules", {})

    def keep(part: str, name: str, result: dict[str, Any]) -> None:
        kept[part][name] = {**result, "machine": machine(1)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")

    with measuring(1):
        for name in filter(None, options.races.split(",")):
            keep("races", name, raced(RACES[name]))
            print(table(name, kept["races"][name]), flush=True)
        for name in filter(None, options.times.split(",")):
            keep("times", name, timed(name))
            print(name, json.dumps(kept["times"][name]["medians"]), flush=True)
        if options.rules:
            keep("rules", "circles", ruled())
            print(json.dumps(kept["rules"]["circles"]["rules"]), flush=True)


if __name__ == "__main__":
    main()
