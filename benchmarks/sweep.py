"""One feedback sweep over its own floor, for R = 256..2048 and depths 3, 9, 15.

The sweep: tail Grams, one factorisation per stage, and the run of the model in which every stage is moved as it is
reached. Its floor at the same sizes, timed bare in the same run: the L Grams (one product S S^T and one X X^T each, one
elementwise product; the faster of whole and of strips on and above the diagonal), L Cholesky factorisations (the
fastest of LAPACK as it is, inside a border, and there with one tensor for input and output), one forward pass. As in a
sweep each stage has matrices of its own, so that the floor too finds them in memory and not in the cache. tanh networks
of width 20, float64, one thread; processor time, medians, interleaved; about 4 minutes:

    python benchmarks/sweep.py [--out benchmarks/results/sweep.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pullback.control import Course, Loop, Route
from pullback.curvature import Linearisation, Tails, Workspace
from pullback.metric import resolve
from pullback.problems import machine
from pullback.tape import Tape, replay


def mlp(depth: int) -> nn.Sequential:
    widths = [2, *[20] * (depth - 1), 1]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def padded(A: Tensor, once: bool) -> Callable[[], object]:
    """A Cholesky factorisation inside a border; with one object for input and output nothing is copied onto itself."""
    n = A.shape[0]
    memory = torch.eye(n + 8, dtype=A.dtype)
    info = torch.empty((), dtype=torch.int32)

    def run() -> object:
        memory[:n, :n].copy_(A).diagonal().add_(1.0)
        L = memory.mT
        return torch.linalg.cholesky_ex(L, out=(L if once else memory.mT, info))

    return run


def measure(R: int, depth: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, x, y = mlp(depth), torch.rand(R, 2, dtype=torch.float64), torch.rand(R, 1, dtype=torch.float64)
    criterion = nn.MSELoss()
    tape = Tape(model, criterion, resolve(criterion, None), "loop", wiring="all")
    criterion(model(x), y).backward()
    lin = Linearisation(tape.terms)
    workspace = Workspace()
    stages = [[block] for block in lin.blocks]
    route = Route(lin.terms, stages)
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]

    def run(passage: object) -> float:
        with torch.no_grad(), tape.recorder.paused(), tape.recorder.heard(passage):  # type: ignore[arg-type]
            return float(replay(model, lin.terms))

    @torch.no_grad()
    def sweep() -> None:
        tails = Tails(stages, "auto", None, workspace)
        tails.factorise(0.1)
        course = Course(route, lin.terms, stages)
        roots = [root.serial for root in lin.terms[0].roots]
        Loop(course, tails, lin.e0, None, scales=None, rates=[1.0] * depth, roots=roots, run=run).sweep()
        torch._foreach_copy_(params, before)

    S, X = torch.randn(depth, R, 20, dtype=torch.float64), torch.randn(depth, R, 20, dtype=torch.float64)
    K, other = torch.empty(depth, R, R, dtype=torch.float64), torch.empty(R, R, dtype=torch.float64)
    A = [S[k] @ S[k].T + R * torch.eye(R, dtype=torch.float64) for k in range(depth)]

    def gram() -> None:
        for k in range(depth):
            torch.mm(S[k], S[k].T, out=K[k])
            torch.mm(X[k], X[k].T, out=other)
            K[k].mul_(other)

    def strips() -> None:
        step = -(-R // 4)
        for k in range(depth):
            for a in range(0, R, step):
                out = K[k][a : a + step, a:]
                inner = other.view(-1)[: out.numel()].view(out.shape)
                torch.mm(S[k][a : a + step], S[k][a:].T, out=out)
                torch.mm(X[k][a : a + step], X[k][a:].T, out=inner)
                out.mul_(inner)

    def cholesky() -> None:
        for own in A:
            torch.linalg.cholesky_ex(own)

    borders = {once: [padded(own, once) for own in A] for once in (False, True)}

    def bordered(once: bool) -> None:
        for own in borders[once]:
            own()

    @torch.no_grad()
    def forward() -> None:
        model(x)

    parts: dict[str, Callable[[], None]] = {
        "sweep": sweep,
        "gram": gram,
        "strips": strips,
        "cholesky": cholesky,
        "bordered": lambda: bordered(False),
        "in place": lambda: bordered(True),
        "forward": forward,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for k in range(repeats + 2):
        for name, part in parts.items():
            start = time.thread_time()
            part()
            if k >= 2:
                times[name].append(1e3 * (time.thread_time() - start))
    found = {name: statistics.median(own) for name, own in times.items()}
    grams = min(found["gram"], found["strips"])
    fastest = min(found[name] for name in ("cholesky", "bordered", "in place"))
    floor = grams + fastest + found["forward"]
    return {
        "R": R,
        "depth": depth,
        "sweep_ms": found["sweep"],
        "floor_ms": floor,
        "ratio": found["sweep"] / floor,
        "gram_ms": grams,
        "cholesky_ms": fastest,
        "forward_ms": found["forward"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 512, 1024, 2048])
    parser.add_argument("--depths", type=int, nargs="*", default=[3, 9, 15])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found = []
    print("   R  depth  sweep ms  floor ms  ratio   gram, cholesky, forward ms")
    for R, depth in itertools.product(options.rows, options.depths):
        own = measure(R, depth, max(7, 10**7 // R**2))
        found.append(own)
        print(
            f"{R:>4}  {depth:>5}  {own['sweep_ms']:>8.2f}  {own['floor_ms']:>8.2f}  {own['ratio']:>5.2f}   "
            f"{own['gram_ms']:.2f}, {own['cholesky_ms']:.2f}, {own['forward_ms']:.2f}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(1), "sweep": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
