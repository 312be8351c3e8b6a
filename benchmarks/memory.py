"""Peak memory of a step against the gradient's, for the cases of floor.py and for growing R.

The gradient's is a forward and a backward pass and a step of Adam. Every measurement runs in a fresh process, twice:
once under torch's profiler, which sees every tensor that is made and freed, to the byte ("tensors"); once bare, for
the growth of the process's largest resident size, which also sees the scratch space of BLAS and LAPACK and is only good
to a megabyte or two ("process"). Both count what comes on top of the model and the data. The first step also times the
ways to sweep and checks the rows, so that it is counted apart. One thread:

    python benchmarks/memory.py [--out benchmarks/results/memory.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pullback
from floor import CASES, mlp, step_of
from pullback.problems import machine

Problem = tuple[nn.Module, Tensor, Tensor, nn.Module]


def digits(N: int) -> Problem:
    return mlp(64, 64, 32, 10), torch.randn(N, 64), torch.randint(0, 10, (N,)), nn.CrossEntropyLoss()


GROWING = [f"mlp digits, N={N}" for N in (32, 64, 256, 512)]
PROBLEMS: dict[str, Callable[[], Problem]] = {
    **CASES, **{name: (lambda name=name: digits(int(name.rpartition("=")[2]))) for name in GROWING}
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda m, c: torch.optim.Adam(m.parameters(), 1e-3),
    "LayerwiseMetric": pullback.LayerwiseMetric,
    "GaussNewton": pullback.GaussNewton,
    "GaussNewton, Sampled(1)": lambda m, c: pullback.GaussNewton(m, c, metric=pullback.Sampled(m=1)),
    "GaussNewton, cg": lambda m, c: pullback.GaussNewton(m, c, solver="cg"),
}
STEPS = 4
#: Size in bytes of a tensor that nobody else makes: its appearance in the profile says that a step begins.
MARK = 12_347


def steps(problem: Problem, optimizer: str) -> torch.optim.Optimizer:
    model, x, y, criterion = problem
    opt = OPTIMIZERS[optimizer](model, criterion)
    for _ in range(STEPS):
        torch.empty(MARK, dtype=torch.uint8)
        step_of(opt, model, x, y, criterion)
    return opt


def tensors(case: str, optimizer: str) -> dict[str, Any]:
    """Bytes of tensors above model and data at the most: in the first step, and in those after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        opt = steps(PROBLEMS[case](), optimizer)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, base, peaks = 0, 0, list[int]()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.nbytes() == MARK:
            base = base if peaks else held
            peaks.append(held)
        held += event.nbytes()
        if peaks:
            peaks[-1] = max(peaks[-1], held)
    assert len(peaks) == STEPS
    found: dict[str, Any] = {"first": peaks[0] - base, "later": max(peaks[1:]) - base}
    if isinstance(opt, pullback.GaussNewton | pullback.LayerwiseMetric):
        found |= {"R": opt.last.rank, "spaces": opt.last.spaces}
    return found


def process(case: str, optimizer: str) -> dict[str, Any]:
    """Bytes by which the largest resident size grew above a process that has done a little of everything."""
    steps(digits(4), optimizer)
    problem = PROBLEMS[case]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(problem, optimizer)
    # Kilobytes on Linux, bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit}


def fresh(case: str, optimizer: str, way: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", case, optimizer, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured() -> list[dict[str, Any]]:
    rows = []
    titles = f"{'R':>5} {'first':>8} {'later':>8} {'/ Adam':>7} {'process':>8}"
    print(f"{'MB above model and data':<24} {'optimizer':<24} {titles}")
    for case in PROBLEMS:
        adam = 0
        for optimizer in OPTIMIZERS:
            found = {name: value for way in WAYS for name, value in fresh(case, optimizer, way).items()}
            adam = adam or found["later"]
            row = {"case": case, "optimizer": optimizer, **found, "ratio": found["later"] / adam}
            figures = f"{found['first'] / 1e6:>8.2f} {found['later'] / 1e6:>8.2f} {row['ratio']:>7.1f}"
            print(
                f"{case:<24} {optimizer:<24} {found.get('R', ''):>5} {figures} {found['process'] / 1e6:>8.1f}",
                flush=True,
            )
            rows.append(row)
    return rows


WAYS = {"tensors": tensors, "process": process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("CASE", "OPTIMIZER", "WAY"), help="one measurement, as JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.one:
        case, optimizer, way = options.one
        print(json.dumps(WAYS[way](case, optimizer)))
        return
    result = {"machine": machine(1), "bytes": measured()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
