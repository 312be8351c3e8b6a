"""Twins beside their bounds: ridge, kernel ridge, a metric that holds its data, and a digits MLP over n.

The MLP (64-16-10, tanh, cross entropy with weight decay) takes full-batch gradient steps in float64 on n of the digits;
twins differ in one of them. Seconds are processor time of one thread, eigenvalues apart; eigenvalues are Lanczos's
(scipy's eigsh on Hessian-vector products).

    python benchmarks/stability.py [--pairs 6] [--steps 200] [--out benchmarks/results/stability.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from pullback.action import ActionRecorder
from pullback.problems import load_problem, machine, measuring
from pullback.stability import Data, Descent, KernelRidge, Objective, Ridge, Twins, compare, replace_one, scaling, twins
from pullback.stability.descent import PATHWISE, SPECTRAL
from pullback.stability.ridge import NAIVE

NS = (100, 150, 200, 300, 400, 600, 800, 1100, 1400)


def regression(seed: int, n: int, d: int) -> tuple[Data, Data, Data]:
    """A drawn regression: n rows, 100 to replace them with, 100 held out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 200, d, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    y = x @ w + 0.5 * torch.randn(n + 200, generator=generator, dtype=torch.float64)
    return (x[:n], y[:n]), (x[n : n + 100], y[n : n + 100]), (x[n + 100 :], y[n + 100 :])


def draws(make: Any, count: int, name: str) -> dict[str, Any]:
    """Ratios over many draws of data, decay and size; every draw has one pair."""
    far, loss, broken = [], [], 0
    for seed in range(count):
        generator = torch.Generator().manual_seed(10_000 + seed)
        n = int(torch.randint(10, 200, (), generator=generator))
        d = int(torch.randint(1, 12, (), generator=generator))
        decay = 10 ** float(torch.rand((), generator=generator) * 3 - 2)
        data, spare, held_out = regression(seed, n, d)
        report = twins(make(decay), data, 1, spare=spare, held_out=held_out, seed=seed)
        broken += report.broken(name)
        far += report.ratios(name)
        loss += report.ratios(name, loss=True)
    return {
        "draws": count,
        "broken": broken,
        "distance": {"median": statistics.median(far), "largest": max(far)},
        "loss": {"median": statistics.median(loss), "largest": max(loss)},
    }


def constructed() -> dict[str, Any]:
    """One twin has weight in the metric and the other has none: the bound without the factor is broken."""
    n, small = 50, 1e-3
    x = torch.full((n, 1), small, dtype=torch.float64)
    y = torch.full((n,), 1 / small, dtype=torch.float64)
    x2, y2 = x.clone(), y.clone()
    x2[0], y2[0] = 1.0, 1.0
    out = {}
    for at in (0.05, 0.3, 1.0, 2.0):
        twin = compare(Ridge(1.0, data_scale=20.0, time=at), (x, y), (x2, y2))
        out[str(at)] = {bound.name: twin.ratio(bound) for bound in twin.bounds}
    return out


class Spectrum:
    """Ends of the spectrum of the Hessian by Lanczos, with what it took."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.seconds, self.products, self.calls, self.lowest = objective, 0.0, 0, 0, float("inf")

    def __call__(self, theta: Tensor, data: Data) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        start = time.process_time()
        at = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.objective._loss(at, data), at, create_graph=True)

        def product(v: Any) -> Any:
            self.products += 1
            return torch.autograd.grad(g, at, torch.as_tensor(v).reshape(-1), retain_graph=True)[0].numpy()

        H = LinearOperator((len(at), len(at)), product, dtype="float64")
        low, high = (float(eigsh(H, 1, which=end, tol=1e-3, return_eigenvectors=False)[0]) for end in ("SA", "LA"))
        self.seconds += time.process_time() - start
        self.calls += 1
        self.lowest = min(self.lowest, low)
        return low, high


def digits(pairs: int, steps: int, h: float, decay: float, ns: tuple[int, ...] = NS) -> tuple[dict[str, Any], Any]:
    """Twins of the MLP over n."""
    problem = load_problem("digits:dtype=float64")
    assert problem.test is not None
    order = torch.randperm(len(problem.train[0]), generator=torch.Generator().manual_seed(0))
    data = (problem.train[0][order], problem.train[1][order])
    spare, held_out = [tuple(part[k::2] for part in problem.test) for k in (0, 1)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), decay=decay)
    spectrum = Spectrum(objective)
    learner = Descent(objective, steps=steps, h=h, spectrum=spectrum, every=max(1, steps // 20))
    start = time.process_time()
    found = scaling(learner, data, ns, pairs, spare=spare, held_out=held_out)
    seconds = time.process_time() - start
    end = learner.train((data[0][: ns[-1]], data[1][: ns[-1]])).end
    correct = float((_outputs(objective, end, held_out[0]).argmax(1) == held_out[1]).double().mean())
    kappa = max(b.constants["kappa"] for r in found.reports for t in r.pairs for b in t.bounds)
    one_rate = replace_one(
        kappa=kappa, n=ns[-1], mu=1.0, rate=spectrum.lowest, time=h * steps, source="the lowest seen anywhere"
    ).loss
    rows = [
        {
            "n": report.n,
            "distance": statistics.median(t.distance for t in report.pairs),
            "loss_change": statistics.median(t.loss_change for t in report.pairs),
            "largest_loss_change": max(t.loss_change for t in report.pairs),
            "pairs": [[t.distance, t.loss_change, t.bounds[0].distance, t.bounds[0].loss] for t in report.pairs],
            "gap": report.pairs[0].gap,
            "bounds": {
                b.name: {
                    "kind": b.kind,
                    "distance": _median(report, b.name, "distance"),
                    "loss": _median(report, b.name, "loss"),
                    "loss_ratio": max(report.ratios(b.name, loss=True)),
                    "distance_ratio": None if b.distance is None else max(report.ratios(b.name)),
                }
                for b in report.pairs[0].bounds
            },
        }
        for report in found.reports
    ]
    figures = {
        "net": "64-16-10, tanh",
        "decay": decay,
        "h": h,
        "steps": steps,
        "pairs": pairs,
        "accuracy": correct,
        "seconds_without_rates": seconds - spectrum.seconds,
        "seconds_of_rates": spectrum.seconds,
        "products_per_rate": spectrum.products / (2 * spectrum.calls),
        "lowest_rate": spectrum.lowest,
        "one_rate_loss": one_rate,
        "held": found.held,
        "exponent_distance": found.distance.to_dict(),
        "exponent_loss": found.loss.to_dict(),
        "rows": rows,
    }
    return figures, found


def _median(report: Twins, name: str, key: str) -> float | None:
    values = [getattr(b, key) for t in report.pairs for b in t.bounds if b.name == name]
    return None if None in values else statistics.median(values)


def _outputs(objective: Objective, theta: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = objective.moved(theta)(x)
    return out


def action(steps: int) -> dict[str, Any]:
    """Shares of the action of SGD with momentum on mini-batches of digits, in the identity."""
    problem = load_problem("digits:dtype=float64")
    x, y = problem.train
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double(), nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = ActionRecorder(model, criterion, (x, y))
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        opt.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        with recorder.observe(h=0.05):
            opt.step()
    return recorder.action.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step", type=float, default=0.3)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stability.json")
    options = parser.parse_args()

    def gauss(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / 8)

    with measuring(1):
        report: dict[str, Any] = {"machine": machine(1)}
        report["ridge"] = draws(Ridge, 500, "one rate")
        report["kernel_ridge"] = draws(lambda decay: KernelRidge(gauss, decay), 300, "one rate")
        report["data_in_metric"] = constructed()
        print(json.dumps(report, indent=1), flush=True)
        report["digits"], found = digits(options.pairs, options.steps, options.step, options.decay)
        print(found, flush=True)
        report["action"] = action(100)
    report["names"] = {"pathwise": PATHWISE, "spectral": SPECTRAL, "naive": NAIVE}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
