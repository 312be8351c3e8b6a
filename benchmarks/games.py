"""Kronecker metrics whose parallel modules play, beside Kronecker itself: seconds of a step, losses after equal steps.

The inception and the residual network of ``fashion-mnist-cnn`` on batches of 128, one thread. Steps that look at the
metric and steps that do not are timed apart, all structures in turn at the same batches, and weighted as they occur in
the steps 0 to 99 and from then on (every tenth looks). Losses are those on all training rows after 200 steps from one
start and one order of batches per seed. Needs Fashion-MNIST in the folder PULLBACK_DATA:

    python benchmarks/games.py [--seeds 3] [--steps 200] [--rows 10000] [--out benchmarks/results/games.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pullback
from pullback.problems import Problem, load_problem, machine, measuring
from pullback.problems.runner import batches

Make = Callable[[nn.Module, nn.Module, int], pullback.Kronecker]


def _game(structure: Any) -> Make:
    return lambda m, c, seed: pullback.KroneckerGame(
        m, c, game=pullback.Game(structure=structure, seed=seed), seed=seed
    )


OPTIMIZERS: dict[str, Make] = {
    "kronecker": lambda m, c, seed: pullback.Kronecker(m, c, seed=seed),
    "open-loop": _game("open-loop"),
    "cooperative": _game("cooperative"),
    "bandit": _game("bandit"),
}
NETS = ("inception", "residual")


def looks(steps: int) -> set[int]:
    """Numbers of the steps that look at the metric."""
    schedule, out, step = pullback.Refresh(), set[int](), 0
    while step < steps:
        out.add(step)
        step = schedule.after(step)
    return out


def seconds_of_steps(problem: Problem, steps: int) -> dict[str, dict[str, float]]:
    """Medians of steps with a look and without, and both weighted, of optimizers that take turns."""
    runs = {}
    for name, make in OPTIMIZERS.items():
        model, criterion = problem.build_model(0), nn.CrossEntropyLoss()
        runs[name] = (make(model, criterion, 0), batches(problem, 0), criterion)
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    schedule, share = looks(steps), len(looks(100)) / 100
    for k in range(steps):
        for name in [*runs][k % len(runs) :] + [*runs][: k % len(runs)]:
            opt, source, criterion = runs[name]
            x, y = next(source)
            start = time.process_time()
            opt.zero_grad()
            criterion(opt.model(x), y).backward()
            opt.step()
            if k > 2:  # the first looks find the way to sweep, and set up
                taken[name][k in schedule].append(time.process_time() - start)
    out = {}
    for name, (plain, look) in taken.items():
        without, at = statistics.median(plain), statistics.median(look)
        out[name] = {
            "plain": without,
            "look": at,
            "first_hundred": share * at + (1 - share) * without,
            "later": 0.1 * at + 0.9 * without,
        }
    return out


def train(problem: Problem, make: Make, seed: int, steps: int) -> dict[str, Any]:
    """One run: the loss on all training rows, accuracy on the test rows."""
    model, criterion = problem.build_model(seed), nn.CrossEntropyLoss()
    torch.manual_seed(seed)
    opt, source = make(model, criterion, seed), batches(problem, seed)
    for _ in range(steps):
        x, y = next(source)
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
    assert problem.test is not None
    with torch.no_grad():
        loss = statistics.fmean(
            criterion(model(x), y).item() for x, y in zip(*(part.split(1000) for part in problem.train), strict=True)
        )
        accuracy = (model(problem.test[0]).argmax(1) == problem.test[1]).double().mean().item()
    return {"seed": seed, "loss": loss, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--timed", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "games.json")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with measuring(1):
        for net in NETS:
            problem = load_problem(f"fashion-mnist-cnn:net={net},rows={options.rows},batch_size=128,test_rows=2000")
            seconds = seconds_of_steps(problem, options.timed)
            base = seconds["open-loop"]
            for name, own in seconds.items():
                ratio = {key: own[key] / base[key] for key in own}
                print(net, name, {k: f"{1e3 * v:.1f} ms ({ratio[k]:.2f})" for k, v in own.items()}, flush=True)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIMIZERS if name != "open-loop"}
            for seed in range(options.seeds):
                for name, own_runs in runs.items():
                    own_runs.append(train(problem, OPTIMIZERS[name], seed, options.steps))
                    print(net, name, own_runs[-1], flush=True)
            report[net] = {"seconds": seconds, "runs": runs}
    options.out.write_text(
        json.dumps({"machine": machine(1), "options": _plain(options), "nets": report}, indent=1) + "\n"
    )


def _plain(options: argparse.Namespace) -> dict[str, int]:
    return {name: value for name, value in vars(options).items() if isinstance(value, int)}


if __name__ == "__main__":
    main()
