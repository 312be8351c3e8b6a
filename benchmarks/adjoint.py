"""How exact the adjoint of an ODE block is, and what a step through it costs (docs/ode.md).

Relative errors of gradients (adjoint and unrolled) and of U^T U against the unrolled solver at tolerance 1e-13, for a
linear layer, a block of 32 parameters and a linear layer, float64. Then processor seconds of a step of Kronecker over
one of Adam through the same block, looks every tenth step, at weights that stay where they are, medians of interleaved
rounds of ten steps after a warm-up; and the peak of resident memory of
two steps of each, every one in a process of its own:

    python benchmarks/adjoint.py [--rounds 12] [--out benchmarks/results/adjoint.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pullback
from pullback.curvature import Linearisation
from pullback.ode import ODEBlock
from pullback.problems import machine, measuring
from pullback.tape import Tape

f64 = torch.float64
SOLVERS: tuple[dict[str, Any], ...] = (
    *({"solver": "dopri5", "rtol": tol, "atol": tol} for tol in (1e-5, 1e-9, 1e-11)),
    *({"solver": "adaptive_heun", "rtol": tol, "atol": tol} for tol in (1e-3, 1e-5, 1e-7)),
    *({"solver": "rk4", "step": step, "rtol": 1e-10, "atol": 1e-10} for step in (1 / 4, 1 / 8, 1 / 16)),
)


class Field(nn.Module):
    """A tanh net of the state and the time."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d + 1, width), nn.Tanh(), nn.Linear(width, d))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt."""
        return self.layers(torch.cat([x, t.expand(len(x), 1)], 1))


class Pictures(nn.Module):
    """Two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt."""
        return self.layers(x)


def small(**options: Any) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Model, inputs, targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), ODEBlock(Field(3, 4), **options), nn.Linear(3, 2)).double()
    return model, torch.randn(8, 2, dtype=f64), torch.randn(8, 2, dtype=f64)


def linearised(**options: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Gradient, U^T U of all parameters, evaluations forwards and backwards."""
    model, x, y = small(**options)
    criterion = nn.MSELoss()
    tape = Tape(model, criterion)
    try:
        criterion(model(x), y).backward()
        lin = Linearisation(tape.terms)
    finally:
        tape.close()
    order = {id(p): k for k, p in enumerate(model.parameters())}
    pieces: dict[int, Tensor] = {}
    for block in lin.blocks:
        for p, part in zip(block.params, block.dense().split([p.numel() for p in block.params], 1), strict=True):
            pieces[order[id(p)]] = part
    U = torch.cat([pieces[k] for k in sorted(pieces)], 1)
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    flow = model[1].flow
    return gradient, U.T @ U, (flow.nfe, flow.nfe_backward)


def errors() -> list[dict[str, Any]]:
    """One row per solver."""
    true, metric, _ = linearised(solver="dopri8", rtol=1e-13, atol=1e-13, adjoint=False)
    rows = []
    for options in SOLVERS:
        own, found, count = linearised(**options)
        steps = linearised(**options, adjoint=False)[0]
        rows.append(options | {
            "adjoint": float((own - true).norm() / true.norm()), "unrolled": float((steps - true).norm() / true.norm()),
            "metric": float((found - metric).abs().max() / metric.abs().max()), "evaluations": count,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def timed(field: nn.Module, shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Milliseconds of a step of Kronecker and of Adam, both through the adjoint."""
    runs = {}
    for name in ("kronecker", "adam"):
        torch.manual_seed(0)
        model = nn.Sequential(ODEBlock(copy.deepcopy(field), rtol=1e-3, atol=1e-4), nn.Flatten(), nn.LazyLinear(10))
        x, y, criterion = torch.randn(shape), torch.randint(10, (shape[0],)), nn.CrossEntropyLoss()
        model(x)
        # Both stay where they are: a field that has learned takes more evaluations than one that has not.
        opt: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-9)
        if name == "kronecker":
            opt = pullback.Kronecker(model, criterion, lr=1e-9)
        runs[name] = (model, criterion, opt, x, y)

    def steps(name: str, count: int) -> float:
        model, criterion, opt, x, y = runs[name]
        start = time.process_time()
        for _ in range(count):
            opt.zero_grad()
            criterion(model(x), y).backward()
            opt.step()
        return 1e3 * (time.process_time() - start) / count

    for name in runs:
        steps(name, 40)  # what looks at every step, and settles
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in runs:
            found[name].append(steps(name, 10))
    medians = {name: statistics.median(own) for name, own in found.items()}
    return medians | {"ratio": medians["kronecker"] / medians["adam"]}


def peak(name: str) -> float:
    """Peak of resident memory in MiB over two steps, in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(ODEBlock(Pictures(16), rtol=1e-3, atol=1e-4), nn.Flatten(), nn.Linear(16 * 144, 10))
    x, y, criterion = torch.randn(512, 16, 12, 12), torch.randint(10, (512,)), nn.CrossEntropyLoss()
    opt = pullback.Kronecker(model, criterion) if name == "kronecker" else torch.optim.Adam(model.parameters())
    for _ in range(2):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adjoint.json")
    parser.add_argument("--peak", choices=["kronecker", "adam"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with measuring(1):
        if options.peak:
            print(peak(options.peak))
            return
        rows = errors()
        torch.manual_seed(0)
        times = {
            "field 33-64-32 on 256 samples": timed(Field(32, 64), (256, 32), options.rounds),
            "field of two convolutions, 16 channels, 128 pictures of 8 x 8": timed(
                Pictures(16), (128, 16, 8, 8), options.rounds
            ),
        }
        print(times, flush=True)
    peaks: dict[str, list[float]] = {name: [] for name in ("kronecker", "adam")}
    for _ in range(3):
        for name, own in peaks.items():
            out = subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True)
            own.append(float(out.stdout))
    print(peaks)
    record = {"machine": machine(1), "errors": rows, "milliseconds": times, "peak_mib": peaks}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
