"""Rates of training systems beside dense eigenvalues, and what they cost; a thousand drawn compositions.

Nets of 200 to 2,000 parameters, float64, on 200 drawn points (regression) or 300 digits (ten classes), untrained and
after 200 and 3,000 steps of Adam on the full batch. The rate in the identity and in M = 0.1 D + U^T U, by Davidson's
method and by Lanczos, with all the products they want and with a budget of 50 gradient evaluations; ``miss`` is the
distance to the smallest dense eigenvalue over the largest in modulus. An exact product with the Hessian counts two
gradient evaluations, a difference of gradients one, a pulled-back column one; ``product_over_difference`` is what an
exact product takes of a difference's processor time. ``next`` is the rate one step of gradient
descent further, started from the vectors of the one before.

    python benchmarks/contraction.py [--seeds 3] [--out benchmarks/results/contraction.json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.contraction import Guarantee, compose, gain, linear_part, parallel, training_rate
from pullback.contraction.hessian import System
from pullback.problems import machine, measuring

f64 = torch.float64
#: data, widths
NETS = (
    ("regression", (8, 20, 1)), ("regression", (8, 16, 16, 1)), ("regression", (8, 36, 36, 1)),
    ("digits", (64, 10, 10)), ("digits", (64, 26, 10)),
)  # fmt: skip
STEPS = (0, 200, 3000)


def data(kind: str, seed: int) -> tuple[Tensor, Tensor, nn.Module]:
    """Inputs, targets, criterion."""
    torch.manual_seed(seed)
    if kind == "regression":
        x = torch.randn(200, 8, dtype=f64)
        return x, torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3], nn.MSELoss()
    from sklearn.datasets import load_digits

    digits = load_digits()
    pick = torch.randperm(len(digits.target))[:300]
    return torch.tensor(digits.data / 16)[pick], torch.tensor(digits.target)[pick], nn.CrossEntropyLoss()


def net(widths: tuple[int, ...]) -> nn.Sequential:
    """Tanh between linear layers."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, dtype=f64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def dense(system: System, pulled: float | None) -> tuple[float, float]:
    """Smallest eigenvalue and largest modulus, from the dense Hessian and the dense metric."""
    known = system.known
    H = torch.stack([system.product(row) for row in torch.eye(known.n, dtype=f64)])
    H = (H + H.T) / 2
    if pulled is not None:
        U = torch.cat([block.dense() for block in known.blocks], 1)
        L = torch.linalg.cholesky(U.T @ U + pulled * torch.eye(known.n, dtype=f64))
        H = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, H, upper=False).T, upper=False)
        H = (H + H.T) / 2
    values = torch.linalg.eigvalsh(H)
    return float(values[0]), float(values.abs().max())


def ratio(system: System) -> float:
    """Processor time of an exact product over that of a difference of gradients, medians of 15 in turn."""
    v, spent = torch.randn(system.known.n, dtype=f64), ([], [])
    for _ in range(15):
        began = time.process_time()
        system.product(v)
        middle = time.process_time()
        system.difference(v)
        spent[0].append(middle - began)
        spent[1].append(time.process_time() - middle)
    return statistics.median(spent[0]) / statistics.median(spent[1])


def net_rows(kind: str, widths: tuple[int, ...], seed: int) -> list[dict[str, Any]]:
    """All rates of one net."""
    x, y, criterion = data(kind, seed)
    model, rows = net(widths), []
    optimizer, done = torch.optim.Adam(model.parameters(), 3e-3), 0
    warm: dict[Any, Tensor] = {}
    for steps in STEPS:
        while done < steps:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            done += 1
        value = float(criterion(model(x), y).detach())
        for pulled in (None, 0.1):
            system = System(model, criterion, x, y)
            least, norm = dense(system, pulled)
            row: dict[str, Any] = {
                "data": kind, "widths": widths, "parameters": system.known.n, "seed": seed, "steps": steps,
                "loss": value, "metric": "identity" if pulled is None else f"{pulled} D + U^T U",
                "dense": least, "norm": norm,
                "product_over_difference": ratio(system),
            }  # fmt: skip
            for method in ("davidson", "lanczos"):
                for budget in (1000, 50):
                    began = time.process_time()
                    found = training_rate(
                        model, criterion, x, y, pulled=pulled, method=method, evaluations=budget, seed=seed
                    )
                    row[method if budget == 1000 else f"{method}_50"] = {
                        "miss": abs(found.upper - least) / norm, "estimated": found.error / norm,
                        "residual": found.residual / norm, "products": found.products,
                        "evaluations": found.evaluations, "converged": found.converged,
                        "rounded_up": max(0.0, found.value - least) / norm,
                        "cpu_seconds": time.process_time() - began,
                    }  # fmt: skip
                    if method == "davidson" and budget == 1000:
                        warm[pulled] = found.vectors
            rows.append(row)
        # A step further, from the vectors of the point before.
        kept = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        criterion(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-2 * p.grad
        for row, pulled in zip(rows[-2:], (None, 0.1), strict=True):
            system = System(model, criterion, x, y)
            least, norm = dense(system, pulled)
            found = training_rate(model, criterion, x, y, pulled=pulled, start=warm[pulled], seed=seed)
            row["next"] = {
                "miss": abs(found.upper - least) / norm, "products": found.products, "evaluations": found.evaluations,
                "converged": found.converged,
            }  # fmt: skip
        with torch.no_grad():
            for p, old in zip(model.parameters(), kept, strict=True):
                p.copy_(old)
    return rows


def dense_rate(A: Tensor, M: Tensor) -> float:
    """The rate of x' = A x in M."""
    values, vectors = torch.linalg.eigh(M)
    F = (vectors * values.sqrt()) @ vectors.T @ A @ (vectors / values.sqrt()) @ vectors.T
    return -float(torch.linalg.eigvalsh((F + F.T) / 2)[-1])


def drawn(depth: int, name: str) -> tuple[Tensor, Guarantee, str]:
    """A composition with its guarantee and the rule at its top."""
    if depth == 0 or (depth < 3 and random.random() < 0.3):
        n = random.randint(1, 5)
        A = torch.randn(n, n, dtype=f64) - (1 + 2 * random.random()) * n**0.5 * torch.eye(n, dtype=f64)
        L = torch.randn(n, n, dtype=f64)
        M = None if random.random() < 0.3 else L @ L.T / n + 0.5 * torch.eye(n, dtype=f64)
        return A, linear_part(name, A, metric=M), "part"
    (A, a, _), (B, b, _) = drawn(depth - 1, name + "l"), drawn(depth - 1, name + "r")
    rule = random.choice(["series", "parallel", "skew feedback", "small gain"])
    if rule == "parallel":
        C = torch.randn(a.size, a.size, dtype=f64)
        return A + C, parallel(a, Guarantee(dense_rate(C, a.metric), a.blocks, True, a.how)), rule
    G21 = torch.randn(b.size, a.size, dtype=f64)
    G12 = torch.zeros(a.size, b.size, dtype=f64)
    if rule == "skew feedback":
        G12 = -torch.linalg.solve(a.metric, 0.7 * G21.T @ b.metric)
    elif rule == "small gain" and min(a.rate, b.rate) > 0:
        G12 = torch.randn(a.size, b.size, dtype=f64)
        G12 *= (0.2 + 0.7 * random.random()) * a.rate * b.rate / (gain(a, G12, b) * gain(b, G21, a))
    elif rule == "small gain":
        rule = "series"
    whole = torch.cat([torch.cat([A, G12], 1), torch.cat([G21, B], 1)])
    return whole, compose(a, b, G12, G21), rule


def compositions(count: int) -> dict[str, Any]:
    """Guarantee beside the dense rate, by the rule at the top."""
    random.seed(0)
    torch.manual_seed(0)
    gaps: dict[str, list[float]] = {}
    above, worst, sizes = 0, 0.0, []
    for k in range(count):
        A, guarantee, rule = drawn(3, f"s{k}")
        over = (guarantee.rate - dense_rate(A, guarantee.metric)) / float(torch.linalg.matrix_norm(A, 2))
        above += over > 1e-9
        worst = max(worst, over)
        gaps.setdefault(rule, []).append(-over)
        sizes.append(guarantee.size)
    return {
        "count": count, "above": above, "largest_excess": worst, "sizes": [min(sizes), max(sizes)],
        "gap_over_norm": {
            rule: {"count": len(own), "median": statistics.median(own), "largest": max(own)}
            for rule, own in gaps.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "contraction.json")
    options = parser.parse_args()
    with measuring(1):
        found: dict[str, Any] = {"machine": machine(1), "compositions": compositions(1000), "rows": []}
        print(found["compositions"], flush=True)
        for kind, widths in NETS:
            for seed in range(options.seeds):
                for row in net_rows(kind, widths, seed):
                    found["rows"].append(row)
                    own, short = row["davidson"], row["davidson_50"]
                    print(
                        f"{kind:<10} {widths!s:<16} {row['parameters']:5d} seed {seed} steps {row['steps']:4d} "
                        f"{row['metric']:<15} {row['dense']:+.2e} miss {own['miss']:.0e} at {own['evaluations']:3d} "
                        f"(lanczos {row['lanczos']['evaluations']:3d}), at 50: {short['miss']:.0e}, next "
                        f"{row['next']['evaluations']:3d} {row['next']['miss']:.0e}",
                        flush=True,
                    )
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
