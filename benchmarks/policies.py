"""What the answers and the bound of OCNOpt each do, over the rates of its hosts: validation accuracies on digits.

Tanh MLP with four hidden layers of 20, batches of 16, four epochs of 1100 rows, float32; each seed draws its own 337
validation rows. Every host alone, with the bound but answers that vanish (``eps=1e20``), with both, and other forms.
Test rows are not looked at:

    python benchmarks/policies.py [--seeds 5] [--processes 1]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pullback.problems import machine
from robustness import Setting, Task, runs_of

SETTING = Setting("digits:depth=5,width=20,batch_size=16", 337, 4)
_FORMS = {"positive": ",form=positive", "clamped": ",form=clamped"}
_BASIC = {"host and `bound`, no answers": ",eps=1e20", "default": ""}
_EXACT = {"`rank=None`": ",rank=none"}
#: Host: how it is written alone and as a host, its rates, and the variants.
HOSTS: dict[str, tuple[str, str, tuple[float, ...], dict[str, str]]] = {
    "RMSprop": (
        "rmsprop:lr={}", "ocnopt:host=rmsprop,lr={}", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
        _BASIC | _EXACT | {"`bound=None`": ",bound=none"} | _FORMS,
    ),
    "SGD, momentum 0.9": (
        "sgd:momentum=0.9,lr={}", "ocnopt:host=sgd,momentum=0.9,lr={}", (0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2),
        _BASIC | _EXACT | _FORMS,
    ),
    "Adam": ("adam:lr={}", "ocnopt:host=adam,lr={}", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), _BASIC | _EXACT),
    "SGD": ("sgd:lr={}", "ocnopt:host=sgd,lr={}", (0.01, 0.03, 0.1, 0.3, 1, 3, 10), {"default": ""}),
    "`Kronecker`": ("kronecker:lr={}", "ocnopt:host=kronecker,lr={}", (0.1, 0.3, 1, 3, 10), {"default": ""}),
}  # fmt: skip


def cell(runs: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """Median and worst accuracy, median loss, and how many runs failed."""
    losses = [math.inf if run["validation_loss"] is None else run["validation_loss"] for run in runs]
    scores = [run["validation"] for run in runs]
    failed = sum(run["failure"] is not None for run in runs)
    return {
        "median": statistics.median(scores),
        "worst": min(scores),
        "loss": min(statistics.median(losses), 1e30),
        "failed": failed,
    }


def measured(host: str, seeds: int, processes: int) -> dict[str, list[dict[str, float | int]]]:
    """The rows of one host's table: one cell per rate."""
    alone, hosted, rates, variants = HOSTS[host]
    specs = {"host alone": alone} | {name: hosted + more for name, more in variants.items()}
    tasks = [Task(SETTING, spec.format(lr), s) for spec in specs.values() for lr in rates for s in range(seeds)]
    found = iter(runs_of(tasks, processes))
    return {name: [cell([next(found) for _ in range(seeds)]) for _ in rates] for name in specs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "policies.json")
    options = parser.parse_args()
    tables: dict[str, Any] = {}
    for host, (_, _, rates, _) in HOSTS.items():
        rows = measured(host, options.seeds, options.processes)
        tables[host] = {"rates": rates, "rows": rows}
        print(f"| digits, {host}, rate | {' | '.join(f'{lr:g}' for lr in rates)} |")
        print(f"|{'---|' * (len(rates) + 1)}")
        for name, cells in rows.items():
            texts = [f"{100 * c['median']:.1f} / {100 * c['worst']:.1f} ({c['loss']:.2f})" for c in cells]
            print(f"| {name} | {' | '.join(texts)} |", flush=True)
        print(f"failed runs: {sum(int(c['failed']) for cells in rows.values() for c in cells)}\n", flush=True)
        record = {"machine": machine(1), "setting": asdict(SETTING), "seeds": options.seeds, "tables": tables}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
