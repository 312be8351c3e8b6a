"""Three examples outside deep learning: a controlled chain, a gene circuit, a skew network (docs/examples.md).

Races of our optimizers beside Adam (the best of four rates by the median time to the level, then by the loss) and
L-BFGS, in processor seconds; contraction of the closed loop; paths of the circuit under two
metrics; guarantees along training of the network.

    python benchmarks/examples.py [--only mass-spring gene-circuit skew-network] [--pictures docs/img]
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import pullback
from example_pictures import OURS, draw
from pullback.action import path_action
from pullback.contraction import Ball, fit_metric, rate_at, rate_over, training_rate
from pullback.flow.record import Path as Curve
from pullback.problems import Budget, Run, compare, load_problem, machine, measuring, optimizers
from pullback.problems.gene_circuit import Circuit
from pullback.problems.mass_spring import ControlledChain
from pullback.problems.optimizer_entry import OptimizerEntry
from pullback.problems.skew_network import Network, oscillator
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Objective

F64 = torch.float64
RATES = {"mass-spring": (3e-3, 1e-2, 3e-2, 1e-1), "gene-circuit": (1e-2, 3e-2, 1e-1, 3e-1)}


def by_module(model: nn.Module, criterion: nn.Module, _options: dict[str, Any]) -> Any:
    """Feedback between modules as players, every module with its own mass: what races by name cannot ask for."""
    assert isinstance(model, ControlledChain | Circuit)
    return pullback.FeedbackGaussNewton(model, criterion, mass=model.masses(), partition=model.partition())


optimizers._ENTRIES["by-module"] = OptimizerEntry("by-module", "feedback by module", lambda: by_module, by_module)


def race(name: str, seeds: int, seconds: float, excess: float | None) -> dict[str, Any]:
    """Losses and times; the level is a factor on the least loss of any run with that seed, or the problem's own."""
    problem = load_problem(name)
    text = ",".join([*OURS, *(f"adam:lr={rate:g}" for rate in RATES[name]), "lbfgs"])
    runs = compare(problem, text, seeds=seeds, budget=Budget(seconds=seconds)).runs
    least = {seed: min(run.best_loss or 1e9 for run in runs if run.seed == seed) for seed in range(seeds)}
    level = {seed: excess * least[seed] if excess else problem.targets[-2] for seed in range(seeds)}

    def arrival(run: Run) -> float | None:
        busy = run.cpu_seconds / run.seconds if run.seconds else 1.0
        return next((busy * e.seconds for e in run.history if e.loss <= level[run.seed]), None)

    rows: dict[str, Any] = {}
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        times = [arrival(run) for run in own]
        rows[label] = {
            "loss": [run.loss for run in own],
            "seconds to level": times,
            "median": statistics.median(float("inf") if t is None else t for t in times),
            "test": [run.test for run in own],
            "ms per step": statistics.median(1e3 * run.cpu_seconds / max(1, run.steps) for run in own),
            "failed": sum(run.failure is not None for run in own),
            "history": [[(e.seconds, e.loss) for e in run.history[:: max(1, len(run.history) // 80)]] for run in own],
        }
    adam = [label for label in rows if label.startswith("adam")]
    best = min(
        adam, key=lambda label: (rows[label]["median"], statistics.median(x or 1e9 for x in rows[label]["loss"]))
    )
    for row in rows.values():
        row["median"] = None if row["median"] == float("inf") else row["median"]
    return {"seconds": seconds, "levels": level, "best adam": best, "rows": rows}


def certify_chain(steps: int = 15) -> dict[str, Any]:
    """Rates of the closed loop, trained by module, seed 0."""
    problem = load_problem("mass-spring")
    model = problem.build_model(0)
    assert isinstance(model, ControlledChain)
    chain, centre = model.chain, torch.zeros(2 * model.chain.n, dtype=F64)
    free = jacrev(lambda x: torch.cat(chain.slope(x, x.new_zeros(chain.n))))(centre)
    opt = by_module(model, problem.criterion, {})
    for _ in range(steps):
        opt.zero_grad()
        problem.criterion(model(problem.train[0]), problem.train[1]).backward()
        opt.step()
    opt.close()
    model.requires_grad_(False)
    field = model.closed_loop()
    linear = fit_metric(jacrev(field)(centre))
    out: dict[str, Any] = {
        "free chain": -float(torch.linalg.eigvals(free).real.max()),
        "linear part": rate_at(field, centre, metric=linear.M).value,
        "spectral abscissa": linear.bound,
        "identity": rate_at(field, centre).value,
        "regions": [],
    }
    for radius in (0.25, 0.5, 0.75, 1.0):
        ball = Ball(centre, radius)
        draws = ball.draw(40, torch.Generator().manual_seed(1))
        common = fit_metric([jacrev(field)(x) for x in draws])
        start = problem.train[0][0]
        path = rollout(model, 0.6 * radius * start / start.norm(), 60)
        found = rate_over(field, ball, metric=common.M, samples=300, trajectory=path)
        out["regions"].append(
            {"radius": radius, "worst": found.worst, "share": found.share, "confidence": found.confidence,
             "certified": found.certified,
             "why not": found.why_not, "fitted": common.rate, "condition": common.condition}
        )  # fmt: skip
    start = problem.train[0][0]
    out["free path"] = free_rollout(model, start, 60)[:, : chain.n].tolist()
    out["path"] = rollout(model, start, 60)[:, : chain.n].tolist()
    return out


def rollout(model: ControlledChain, x: Tensor, steps: int) -> Tensor:
    """States of the closed loop, (steps + 1, 2 n)."""
    seen = [x]
    for _ in range(steps):
        u = model.controllers(seen[-1].unsqueeze(0)).squeeze(0)
        seen.append(model.chain.advance(torch.cat([seen[-1], u])))
    return torch.stack(seen)


def free_rollout(model: ControlledChain, x: Tensor, steps: int) -> Tensor:
    """States of the chain without control, (steps + 1, 2 n)."""
    seen = [x]
    for _ in range(steps):
        seen.append(model.chain.advance(torch.cat([seen[-1], x.new_zeros(model.chain.n)])))
    return torch.stack(seen)


def two_metrics(seed: int = 1, mu: float = 0.03, level: float = 1e-2) -> dict[str, Any]:
    """Flows of one circuit down to one loss: in the mutational metric, in that of its outputs, in both."""
    problem = load_problem("gene-circuit")
    x, y = problem.train
    names = list(dict(problem.build_model(seed).named_parameters()))

    def pulled(model: nn.Module, theta: Tensor) -> Tensor:
        """(2 / N) J^T J, the Gauss-Newton matrix of the mean square."""
        sizes = [p.shape for p in model.parameters()]

        def outputs(vector: Tensor) -> Tensor:
            parts = vector.split([size.numel() for size in sizes])
            values = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
            found: Tensor = functional_call(model, values, (x,))
            return found.squeeze(1)

        J = jacrev(outputs)(theta)
        return 2 / len(x) * J.T @ J

    out: dict[str, Any] = {"mu": mu, "level": level, "seed": seed}
    for name, (of_outputs, of_mutations, h, steps) in {
        "mutational": (0.0, mu, 5e-5, 20000), "outputs": (1.0, 1e-3 * mu, 0.03, 400), "both": (1.0, mu, 0.03, 400),
    }.items():  # fmt: skip
        model = problem.build_model(seed)
        assert isinstance(model, Circuit)
        D = torch.diag(model.mass_vector())

        def matrix(
            theta: Tensor, a: Any = of_outputs, b: Any = of_mutations, D: Tensor = D, own: Any = model
        ) -> Tensor:
            return a * pulled(own, theta) + b * D if a else b * D

        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        cut = descend(Objective(model, problem.criterion), (x, y), start, matrix, h, steps, level)
        loss = float(problem.criterion(functional(model, names, cut.thetas[-1], x), y))
        weights = torch.linalg.cholesky(D)
        mutated = [float((weights.T @ (b - a)).norm()) for a, b in pairwise(cut.thetas)]
        seen = [functional(model, names, theta, x) for theta in cut.thetas]
        moved = [float((b - a).square().mean().sqrt()) for a, b in pairwise(seen)]
        action = path_action(model, problem.criterion, (x, y), cut, metric=FixedMetric(mu * torch.diagonal(D)), nodes=3)
        shares = {gene + " " + kind: 0.0 for gene in "XYZ" for kind in ("promoter", "product")}
        moduli = dict(shares)
        change = cut.thetas[-1] - start
        offset = 0
        owner = owners(model)
        for parameter_name, p in model.named_parameters():
            here = slice(offset, offset + p.numel())
            offset += p.numel()
            moduli[owner[parameter_name]] += float(change[here].square().sum())
        paths = {key.rpartition(".module")[0] or key: value for key, value in action.modules.items()}
        for key, value in paths.items():
            shares[next(o for n, o in owner.items() if n.startswith(key))] += value
        with torch.no_grad():
            model_end = problem.build_model(seed)
            torch.nn.utils.vector_to_parameters(cut.thetas[-1], model_end.parameters())
        rates = {
            "mutational": training_rate(model_end, problem.criterion, x, y, mass=model_end.masses(), method="dense"),
            "both": training_rate(
                model_end, problem.criterion, x, y, mass=model_end.masses(), pulled=mu, method="dense"
            ),
        }
        out[name] = {
            "time": cut.times[-1],
            "loss": loss,
            "straight in mutations": float((weights.T @ change).norm()),
            "length in mutations": sum(mutated),
            "straight in outputs": float((seen[-1] - seen[0]).square().mean().sqrt()),
            "length in outputs": sum(moved),
            "action off the mutational flow": action.total,
            "gap": action.gap,
            "action by module": shares,
            "moved by module": {key: value**0.5 for key, value in moduli.items()},
            "rates at the end": {key: rate.value for key, rate in rates.items()},
            "response": [float(v) for v in seen[-1]],
        }
        out["start"] = [float(v) for v in seen[0]]
        out["wanted"] = y.squeeze(1).tolist()
        out["inducer"] = x.squeeze(1).tolist()
    return out


def descend(
    objective: Objective, data: tuple[Tensor, Tensor], theta: Tensor, matrix: Any, h: float, steps: int, level: float
) -> Curve:
    """The metric's flow by Euler's method until the loss is at the level, at most 200 of its points kept."""
    times, thetas, slopes = [], [], []
    fixed = torch.linalg.cholesky(matrix(theta)) if h < 1e-3 else None
    for k in range(steps + 1):
        loss, g = objective.loss_and_gradient(theta, data)
        factor = torch.linalg.cholesky(matrix(theta)) if fixed is None else fixed
        slope = -torch.cholesky_solve(g.unsqueeze(1), factor).squeeze(1)
        if k % max(1, steps // 200) == 0 or loss <= level:
            times.append(k * h)
            thetas.append(theta)
            slopes.append(slope)
        if loss <= level:
            break
        theta = theta + h * slope
    return Curve(times, thetas, slopes)


def owners(model: Circuit) -> dict[str, str]:
    """The module of every parameter, "X promoter" and so on, by the parameter's name."""
    named = {id(p): name for name, p in model.named_parameters()}
    return {
        named[id(p)]: f"{gene} {kind}"
        for gene in "XYZ"
        for kind, module in zip(("promoter", "product"), model.gene(gene), strict=True)
        for p in module.parameters()
    }


def functional(model: nn.Module, names: list[str], theta: Tensor, x: Tensor) -> Tensor:
    """Outputs of the model at packed parameters."""
    shapes = [p.shape for p in model.parameters()]
    parts = theta.split([shape.numel() for shape in shapes])
    with torch.no_grad():
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        found: Tensor = functional_call(model, values, (x,))
    return found


def guarantees(seeds: int = 3, steps: int = 40, every: int = 2) -> dict[str, Any]:
    """Guaranteed and dense rates along training, skew and free couplings."""
    out: dict[str, Any] = {}
    for coupling in ("skew", "free"):
        problem = load_problem(f"skew-network:coupling={coupling}")
        rows = []
        for seed in range(seeds):
            model = problem.build_model(seed)
            assert isinstance(model, Network)
            opt = pullback.GaussNewton(model, problem.criterion)
            row: dict[str, Any] = {key: [] for key in ("step", "loss", "guarantee", "dense", "abscissa")}
            for k in range(steps + 1):
                opt.zero_grad()
                loss = problem.criterion(model(problem.train[0]), problem.train[1])
                loss.backward()
                if k % every == 0:
                    dense, abscissa = dense_rates(model)
                    guaranteed = model.guarantee().rate if coupling == "skew" else None
                    for key, value in zip(row, (k, loss.item(), guaranteed, dense, abscissa), strict=True):
                        row[key].append(value)
                opt.step()
            opt.close()
            row["test"] = problem.score(model(problem.test[0]), problem.test[1]) if problem.test else None
            if seed == 0:
                row["twins"] = twin_paths(model)
            rows.append(row)
        out[coupling] = rows
    return out


def dense_rates(model: Network, samples: int = 300, radius: float = 2.0) -> tuple[float, float]:
    """Least rate in diag(w_i M_i) and least spectral abscissa (its negative) over a ball of states, densely."""
    n = len(model.weights)
    points = Ball(torch.zeros(n, dtype=F64), radius).draw(samples, torch.Generator().manual_seed(0))
    J = vmap(jacrev(model.flow(torch.zeros((), dtype=F64))))(points).detach()
    theta = model.weights.sqrt()
    F = theta[:, None] * J / theta
    rate = -torch.linalg.eigvalsh((F + F.mT) / 2)[:, -1]
    return float(rate.min()), float(-torch.linalg.eigvals(J).real.max(1).values.max())


def twin_paths(model: Network, u: float = 0.5, until: float = 30.0, h: float = 0.05) -> dict[str, Any]:
    """Distance of two trajectories in the metric, and the output of one beside the oscillator's."""
    field, n = model.flow(torch.tensor(u, dtype=F64)), len(model.weights)
    a, b = torch.zeros(n, dtype=F64), 0.5 * torch.ones(n, dtype=F64)
    times, distance, output = [], [], []
    with torch.no_grad():
        for k in range(round(until / h) + 1):
            if k % 5 == 0:
                times.append(k * h)
                distance.append(float(((a - b).square() * model.weights).sum().sqrt()))
                output.append(float(model.readout(a.unsqueeze(0))))
            a, b = (x + h * field(x + h / 2 * field(x)) for x in (a, b))
    truth = oscillator(torch.tensor([[u]], dtype=F64), torch.tensor(times, dtype=F64))[0].tolist()
    return {"times": times, "distance": distance, "output": output, "truth": truth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["mass-spring", "gene-circuit", "skew-network"]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "examples.json")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent.parent / "docs" / "img")
    options = parser.parse_args()
    report = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    with measuring(1):
        report["machine"] = machine(1)
        if "skew-network" in options.only:
            report["skew-network"] = guarantees()
        if "gene-circuit" in options.only:
            report["gene-circuit"] = {
                "metrics": two_metrics(),
                "race": race("gene-circuit", 3, 0.75 * options.seconds, None),
            }
        if "mass-spring" in options.only:
            report["mass-spring"] = {"rates": certify_chain(), "race": race("mass-spring", 3, options.seconds, 1.01)}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, options.pictures)


if __name__ == "__main__":
    main()
