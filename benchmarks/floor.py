"""Step time over its own floor, over Adam's step, and its growth with R, width and depth.

The floor of a step is what no implementation of the same mathematics could leave out: one forward and one backward
pass, r backward columns by the cheaper of loop and vmap, the Gram's products, one Cholesky factorisation per group and
one trial forward, each timed bare in the same run at the same sizes. (The factorisation is the faster of the plain
one and the one inside a slightly larger matrix, see curvature/cholesky.py; the column ``plain`` divides by the former.)

What is timed is one and the same step (after four of a run, in float32), repeated from the same weights and damping,
with every part of the floor once after it, on a model without hooks: medians of the one thread's processor time, so
that what else the machine does falls on both. Is the floor fair? Against us: each part's second run in a row counts, so
its memory is warm; parts leave out the loss, forming rows, elementwise passes, keeping the Gram for another trial (the
factor is written beside it), triangular solves, both products with U^T (one checks the gradient), the old weights
and all Python. For us: products are one full gemm of as many multiply-adds, though a Gram is symmetric and ours skips
up to three eighths; of a pairwise Gram with several positions the elementwise pass is counted in multiply-adds.

    python benchmarks/floor.py [--out benchmarks/results/floor.json]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pullback
from pullback.curvature import blocks_of
from pullback.curvature.cholesky import border_of
from pullback.problems import machine


class Block(nn.Module):
    """Attention and a small MLP, normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        q, k, v = self.qkv(self.norm1(h)).chunk(3, -1)
        h = h + self.out(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v)
        return h + self.down(torch.relu(self.up(self.norm2(h))))


class Transformer(nn.Module):
    """Tokens to one prediction per sequence."""

    def __init__(self, words: int = 30, width: int = 32, depth: int = 2, out: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, out)

    def forward(self, t: Tensor) -> Tensor:
        """(N, T) tokens to (N, out)."""
        return self.head(self.blocks(self.table(t)).mean(1))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 10),
    )


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor, nn.Module]]] = {
    "mlp regression, N=512": lambda: (mlp(8, 64, 64, 1), torch.randn(512, 8), torch.randn(512, 1), nn.MSELoss()),
    "mlp digits, N=128": lambda: (
        mlp(64, 64, 32, 10), torch.randn(128, 64), torch.randint(0, 10, (128,)), nn.CrossEntropyLoss()
    ),
    "cnn, N=64": lambda: (cnn(), torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,)), nn.CrossEntropyLoss()),
    "transformer, N=64": lambda: (
        Transformer(), torch.randint(0, 30, (64, 16)), torch.randint(0, 4, (64,)), nn.CrossEntropyLoss()
    ),
}  # fmt: skip

Part = Callable[[], object]


def clock(run: Part, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def step_of(opt: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, criterion: nn.Module) -> None:
    opt.zero_grad()
    criterion(model(x), y).backward()
    opt.step()


def parts_of(opt: pullback.LayerwiseMetric, bare: nn.Module, x: Tensor, y: Tensor) -> list[tuple[str, list[Part]]]:
    """The bare parts at the sizes of the optimizer's next step; of several ways to do one the fastest will count."""
    model, criterion = opt.model, copy.deepcopy(opt.criterion)
    opt.zero_grad()
    opt.criterion(model(x), y).backward()
    term, blocks = opt._tape.terms[0], blocks_of(opt._tape.terms)
    opt.zero_grad()
    outputs: list[Tensor] = []
    modules = [bare.get_submodule(unit.name) for unit in term.plan.units]
    handles = [module.register_forward_hook(lambda m, a, out: outputs.append(out)) for module in modules]
    z = bare(x)
    for handle in handles:
        handle.remove()
    S = torch.randn(term.r, *z.shape)

    def columns() -> None:
        for column in S:
            torch.autograd.grad(z, outputs, column, retain_graph=True)

    def batched() -> None:
        torch.autograd.grad(z, outputs, S, retain_graph=True, is_grads_batched=True)

    sweeps: list[Part] = [columns]
    if term.r > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                batched()
                sweeps.append(batched)
            except RuntimeError:
                pass
    leaves, loss = list(bare.parameters()), criterion(z, y)
    parts: list[tuple[str, list[Part]]] = [
        ("forward", [lambda: bare(x)]),
        ("columns", sweeps),
        ("backward", [lambda: torch.autograd.grad(loss, leaves, retain_graph=True)]),
    ]
    alone = len(opt.last.spaces) > 1
    for block, space in zip(blocks, opt.last.spaces * (1 if alone else len(blocks)), strict=True):
        rows = block.rows[0]
        flops = rows.gram_flops() if space.startswith("dual") else rows.primal_flops()
        size = rows.R if space.startswith("dual") else block.n
        # One gemm with as many multiply-adds, giving a matrix of the same size.
        a = torch.randn(size, max(1, round(flops / size**2)))
        parts.append(("products", [lambda a=a: a @ a.T]))
        if alone or block is blocks[0]:
            side = size if alone else min(rows.R, sum(b.n for b in blocks))
            K = torch.randn(side, side)
            K = K @ K.T + side * torch.eye(side)
            bordered = torch.block_diag(K, torch.eye(border_of(side, K.device)))
            sizes = [K] if len(bordered) == side else [K, bordered]
            parts.append(("cholesky", [lambda A=A: torch.linalg.cholesky_ex(A) for A in sizes]))
    parts.append(("trial", [lambda: bare(x)]))
    return parts


def floors(repeats: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(
        f"{'case':<24} {'optimizer':<16} {'R':>5} {'step ms':>8} {'floor ms':>9} {'ratio':>6} {'plain':>6}   "
        "parts of the floor, ms"
    )
    for name, make in CASES.items():
        for Opt in (pullback.LayerwiseMetric, pullback.GaussNewton):
            torch.manual_seed(0)
            model, x, y, criterion = make()
            bare = copy.deepcopy(model)
            opt = Opt(model, criterion)
            for _ in range(4):
                step_of(opt, model, x, y, criterion)
            while True:  # a step of several trials is several steps
                state, control = copy.deepcopy(model.state_dict()), opt._control.copy()
                step_of(opt, model, x, y, criterion)
                if opt.last.trials == 1:
                    break
            bare.load_state_dict(state)
            parts = parts_of(opt, bare, x, y)
            taken: list[float] = []
            times: list[list[list[float]]] = [[[] for _ in ways] for _, ways in parts]
            for _ in range(2 * repeats):
                model.load_state_dict(state)
                opt._control = control.copy()
                start = time.thread_time()
                step_of(opt, model, x, y, criterion)
                taken.append(time.thread_time() - start)
                assert opt.last.trials == 1
                for (_, ways), own in zip(parts, times, strict=True):
                    for run, seconds in zip(ways, own, strict=True):
                        for _ in range(2):
                            start = time.thread_time()
                            run()
                        seconds.append(time.thread_time() - start)
            step = statistics.median(taken)
            floor: dict[str, float] = {}
            plain = 0.0
            for (part, _), own in zip(parts, times, strict=True):
                medians = [statistics.median(seconds) for seconds in own]
                floor[part] = floor.get(part, 0.0) + min(medians)
                plain += medians[0] if part == "cholesky" else min(medians)
            total = sum(floor.values())
            shown = ", ".join(f"{key} {1e3 * value:.2f}" for key, value in floor.items())
            print(f"{name:<24} {Opt.__name__:<16} {opt.last.rank:>5} {1e3 * step:>8.2f} {1e3 * total:>9.2f} "
                  f"{step / total:>6.2f} {step / plain:>6.2f}   {shown}", flush=True)  # fmt: skip
            rows.append({"case": name, "optimizer": Opt.__name__, "R": opt.last.rank, "spaces": opt.last.spaces,
                         "step": step, "floor": floor, "ratio": step / total, "ratio_plain": step / plain})  # fmt: skip
            opt.close()
    return rows


def over_adam(repeats: int) -> dict[str, float]:
    """Digits MLP, batch 128: our step with one sampled column over Adam's, interleaved."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 128, 64), torch.randint(0, 10, (40, 128))
    makers = {
        "adam": lambda m, c: torch.optim.Adam(m.parameters(), 3e-3),
        "fixed damping": lambda m, c: pullback.LayerwiseMetric(
            m, c, metric=pullback.Sampled(m=1), damping=pullback.Damping(control="fixed")
        ),
        "slope control": lambda m, c: pullback.LayerwiseMetric(
            m, c, metric=pullback.Sampled(m=1), damping=pullback.Damping(control="slope")
        ),
        "gain control": lambda m, c: pullback.LayerwiseMetric(m, c, metric=pullback.Sampled(m=1)),
    }
    runs = {}
    for name, make in makers.items():
        model, criterion = mlp(64, 64, 32, 10), nn.CrossEntropyLoss()
        runs[name] = (make(model, criterion), model, criterion)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(20 * repeats):
        for name, (opt, model, criterion) in runs.items():
            start = time.thread_time()
            step_of(opt, model, x[k % 40], y[k % 40], criterion)
            times[name].append(time.thread_time() - start)
    medians = {name: statistics.median(t[len(t) // 5 :]) for name, t in times.items()}
    for name, seconds in medians.items():
        print(f"digits, Sampled(1), {name:<14} {1e3 * seconds:7.2f} ms  {seconds / medians['adam']:5.2f} x Adam")
    return medians


def exponents(repeats: int) -> dict[str, float]:
    """Slopes of log time in R (GaussNewton, dual), width and depth at a size where the power shows."""

    def timed(N: int, width: int, depth: int) -> float:
        torch.manual_seed(0)
        model, criterion = mlp(width, *[width] * depth, 1), nn.MSELoss()
        opt = pullback.GaussNewton(model, criterion, solver="dual", damping=pullback.Damping(control="fixed"))
        x, y = torch.randn(N, width), torch.randn(N, 1)
        for _ in range(2):
            step_of(opt, model, x, y, criterion)
        return clock(lambda: step_of(opt, model, x, y, criterion), max(3, repeats // 3))

    def slope(sizes: list[int], times: list[float]) -> float:
        a, b = [math.log(s) for s in sizes], [math.log(t) for t in times]
        ma, mb = statistics.mean(a), statistics.mean(b)
        top = sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True))
        return top / sum((p - ma) ** 2 for p in a)

    out = {
        "R (512..2048; theory: 2 while products rule, 3 while Cholesky does)": slope(
            [512, 1024, 2048], [timed(N, 32, 2) for N in (512, 1024, 2048)]
        ),
        "width (256..1024 at R=512; theory 1 in the products)": slope(
            [256, 512, 1024], [timed(512, w, 2) for w in (256, 512, 1024)]
        ),
        "depth (8..32 at R=512; theory 1)": slope([8, 16, 32], [timed(512, 64, d) for d in (8, 16, 32)]),
    }
    for name, value in out.items():
        print(f"exponent in {name}: {value:.2f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "floor.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    result = {
        "machine": machine(1),
        "floors": floors(options.repeats),
        "over_adam": over_adam(options.repeats),
        "exponents": exponents(options.repeats),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
