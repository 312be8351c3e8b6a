"""Our optimizers on mini-batches of digits: as they come, and as SPRING with a step that decays.

With defaults every batch is solved as an episode of its own: each step lowers the loss of its batch, mu follows the
slope on the next one. ``spring`` damps towards 0.8 of the step before, ``Damping(control="fixed")``, and a scheduler
takes lr linearly from 0.2 to 0, which averages over batches. MLP 64-16-8-10, batches of 64, 6 epochs, one thread,
interleaved, seeds 10 to 14; the loss is that on all training rows:

    python benchmarks/batches.py [--seeds 5] [--epochs 6] [--out benchmarks/results/batches.json]
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
from pullback import Damping, Momentum
from pullback.problems import Problem, load_problem, machine, measuring
from pullback.problems.runner import batches

Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
SPRING: dict[str, Any] = {"momentum": Momentum(kind="spring"), "damping": Damping(control="fixed"), "lr": 0.2}

#: Name: how it is made, and whether lr decays.
OPTIMIZERS: dict[str, tuple[Make, bool]] = {
    "feedback": (pullback.FeedbackGaussNewton, False),
    "feedback, spring": (lambda m, c: pullback.FeedbackGaussNewton(m, c, **SPRING), True),
    "feedback, spring, constant lr": (lambda m, c: pullback.FeedbackGaussNewton(m, c, **SPRING), False),
    "gauss-newton": (pullback.GaussNewton, False),
    "gauss-newton, spring": (lambda m, c: pullback.GaussNewton(m, c, **SPRING), True),
    "adam, lr 3e-3": (lambda m, c: torch.optim.Adam(m.parameters(), 3e-3), False),
    "adam, lr 1e-2": (lambda m, c: torch.optim.Adam(m.parameters(), 1e-2), False),
}


def train(problem: Problem, make: Make, decays: bool, seed: int, epochs: int) -> dict[str, Any]:
    """One run: loss after every epoch, accuracy on the test rows at the end."""
    model, criterion = problem.build_model(seed), nn.CrossEntropyLoss()
    torch.manual_seed(seed)
    opt, source = make(model, criterion), batches(problem, seed)
    total = epochs * problem.steps_per_epoch
    decay = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 - k / total if decays else 1.0)
    assert problem.test is not None
    losses, seconds = list[float](), 0.0
    for k in range(total):
        x, y = next(source)
        start = time.process_time()
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        decay.step()
        seconds += time.process_time() - start
        if (k + 1) % problem.steps_per_epoch == 0:
            with torch.no_grad():
                losses.append(nn.functional.cross_entropy(model(problem.train[0]), problem.train[1]).item())
    with torch.no_grad():
        accuracy = (model(problem.test[0]).argmax(1) == problem.test[1]).double().mean().item()
    return {"seed": seed, "losses": losses, "accuracy": accuracy, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batches.json")
    options = parser.parse_args()
    problem = load_problem("digits:width=16,batch_size=64")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIMIZERS}
    with measuring(1):
        for seed in range(10, 10 + options.seeds):
            for name, (make, decays) in OPTIMIZERS.items():
                runs[name].append(train(problem, make, decays, seed, options.epochs))
    print(f"{'optimizer':<30} {'loss':>8} {'worst':>8} {'test':>6} {'cpu s':>6}")
    rows = []
    for name, found in runs.items():
        last = [run["losses"][-1] for run in found]
        row = {"name": name, "loss": statistics.median(last), "worst": max(last),
               "accuracy": statistics.median(run["accuracy"] for run in found),
               "cpu_seconds": statistics.median(run["cpu_seconds"] for run in found), "runs": found}  # fmt: skip
        rows.append(row)
        print(f"{name:<30} {row['loss']:>8.4f} {row['worst']:>8.4f} {row['accuracy']:>6.3f} {row['cpu_seconds']:>6.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(1), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
