"""Adapted flows on real data: the law of the cost, seconds to a cost beside plain gradient flow, memory.

Five MLPs (one or two hidden layers, K >= 4 QN) on 256 distinct rows of concrete, float64, one seed each: the run to
1e-10 of the initial cost; then the time to a cost of 1e-8 for the adapted flow, for its discrete scheme, and for plain
gradient flow by the same solver, which takes one backward pass an evaluation and gets, at most, ``--limit`` times the
processor seconds the adapted flow took. Last, a run at QN = 4000 in a process of its own, for its peak memory. Needs
PULLBACK_DATA.

    python benchmarks/flow.py [--limit 6] [--out benchmarks/results/flow.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pullback.flow import AdaptedFlow, flow
from pullback.flow.problems import load_flow_problem
from pullback.problems import machine, measuring

NETS = (
    ("layers=1", 0), ("layers=1,width=150", 1), ("layers=2", 2), ("layers=2,width=40", 3), ("layers=1", 4)
)  # fmt: skip
LEVEL = 1e-8


def run_of(options: str, seed: int, limit: float) -> dict[str, Any]:
    """One net: the law, then the race to the level."""
    problem = load_flow_problem(f"concrete:rows=256,{options}")

    def fresh() -> nn.Module:
        return problem.make_model(seed)

    model = fresh()
    prepared = AdaptedFlow(model, problem.inputs, problem.targets)
    first, condition = prepared.initial, prepared.condition
    began = time.process_time()
    law = prepared.run(1e-10 * first, method="dopri8")
    prepared.close()
    row: dict[str, Any] = {
        "net": options, "seed": seed, "outputs": law.shape[0], "parameters": law.shape[1], "condition": condition,
        "initial": first, "stopping_time": law.stopping_time, "ended_at": law.s, "cost": law.cost,
        "over_eps": law.cost / (1e-10 * first), "slope_error": law.certificate.slope / law.certificate.expected - 1,
        "deviation": law.certificate.deviation, "cpu_seconds": time.process_time() - began,
    }  # fmt: skip
    began = time.process_time()
    adapted = flow(fresh(), problem.inputs, problem.targets, LEVEL, method="dopri8", monitor=False)
    row["adapted"] = {
        "cpu_seconds": time.process_time() - began,
        "cost": adapted.cost,
        "held": adapted.certificate.held,
    }
    began = time.process_time()
    steps = flow(fresh(), problem.inputs, problem.targets, LEVEL, method="discrete", tol=1e-2, monitor=False)
    row["discrete"] = {"cpu_seconds": time.process_time() - began, "cost": steps.cost, "held": steps.certificate.held}
    # One thread: processor seconds are wall seconds on a quiet machine; on a busy one the peer gets its share in full.
    allowed, best = limit * row["adapted"]["cpu_seconds"], first
    began = time.process_time()

    def watch(share: float, smallest: float | None) -> None:
        if time.process_time() - began > allowed:
            raise KeyboardInterrupt

    plain = flow(
        fresh(), problem.inputs, problem.targets, until=1e12, alpha=0.0, method="dopri8", evaluations=10**9,
        progress=watch,
    )  # fmt: skip
    best = plain.cost
    row["plain"] = {"cpu_seconds": time.process_time() - began, "cost": best, "s": plain.s, "ended": plain.ended}
    return row


LARGE = """
import json, resource, time, torch
from torch import nn
from pullback.flow import AdaptedFlow
torch.set_num_threads(1)
torch.manual_seed(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x = torch.randn(4000, 8, dtype=torch.float64)
y = torch.sin(x[:, :1]) + 0.1 * torch.randn(4000, 1, dtype=torch.float64)
model = nn.Sequential(nn.Linear(8, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 1)).double()
began = time.process_time()
flow = AdaptedFlow(model, x, y)
run = flow.run(0.25 * flow.initial, method="discrete", tol=1e-2)
print(json.dumps({"outputs": run.shape[0], "parameters": run.shape[1], "solver": run.solver,
    "held": run.certificate.held,
    "cost_over_initial": run.cost / flow.initial, "evaluations": run.evaluations, "condition": flow.condition,
    "regime": run.regime, "ended": run.ended,
    "cpu_seconds": time.process_time() - began, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "before_mib": before / 1024}))
"""


def large() -> dict[str, Any]:
    """QN = 4000, K = 18,331: what it takes at its peak, torch included."""
    found = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def said(row: dict[str, Any]) -> str:
    """One line."""
    ways = ", ".join(
        f"{way} {row[way]['cpu_seconds']:.2f} s ({row[way]['cost']:.1e})" for way in ("adapted", "discrete", "plain")
    )
    return (
        f"{row['net']:<18} seed {row['seed']} K {row['parameters']} cond {row['condition']:.1e} slope "
        f"{row['slope_error']:+.1e} cost/eps {row['over_eps']:.5f} cpu {row['cpu_seconds']:.1f} s | to 1e-8: {ways}"
    )


def keep(found: dict[str, Any], out: Path) -> None:
    """What there is so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--limit", type=float, default=6.0, help="processor seconds of plain gradient flow, in units of ours"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "flow.json")
    options = parser.parse_args()
    with measuring(1):
        load_flow_problem("concrete")
        flow(nn.Linear(2, 1).double(), torch.eye(2).double(), torch.ones(2, 1).double(), 1e-2)  # imports
        found: dict[str, Any] = {"machine": machine(1), "level": LEVEL, "limit": options.limit, "rows": []}
        for net, seed in NETS:
            found["rows"].append(run_of(net, seed, options.limit))
            print(said(found["rows"][-1]), flush=True)
            keep(found, options.out)
    found["large"] = large()
    print(found["large"])
    keep(found, options.out)


if __name__ == "__main__":
    main()
