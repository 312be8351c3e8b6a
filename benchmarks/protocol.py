"""Final test accuracies by the protocol of the papers on optimal control (DDPNOpt, OCNOpt): small networks.

wine and digits (five layers, 10 seeds), 6000 images of Fashion-MNIST (five layers, 3 seeds), 2500 images of
Fashion-MNIST and 2800 of CIFAR-10 (four convolutions and two linear layers, 3 seeds), CIFAR-10 by a small residual and
a small inception network (3 seeds); the 800 held-out images of CIFAR-10 are its test rows. Learning rates of SGD with
momentum, RMSprop and Adam, and the weight of e-msa's penalties, are the best of four by the mean accuracy of other
seeds (three, for convolutions one) on rows kept from training; OCNOpt takes the rate of its host as it is, and
Kronecker its default. e-msa has stages in chains only and does not run on branches. Equal epochs for all; test rows
are scored once, at the end. Needs the folder PULLBACK_DATA for the images:

    python benchmarks/protocol.py [--sets wine digits fashion-mnist cifar10] [--processes 1]
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

#: Number of seeds, of other seeds that choose, and setting by name.
SETS = {
    "wine": (10, 3, Setting("wine:depth=5,width=10,batch_size=8", 46, 20)),
    "digits": (10, 3, Setting("digits:depth=5,width=32,batch_size=32", 337, 8)),
    "fashion-mnist": (3, 3, Setting("fashion-mnist:rows=7000,depth=5,width=32,batch_size=64", 1000, 5)),
    "fashion-mnist, conv": (3, 1, Setting("fashion-mnist-cnn:rows=3000,net=conv4,channels=16,batch_size=64", 500, 4)),
    "cifar10, conv": (3, 1, Setting("cifar10:net=conv4,batch_size=64", 400, 4)),
    "cifar10, residual": (3, 1, Setting("cifar10:net=residual,channels=8,batch_size=64", 400, 4)),
    "cifar10, inception": (3, 1, Setting("cifar10:net=inception,channels=8,batch_size=64", 400, 4)),
}
BRANCHED = ("cifar10, residual", "cifar10, inception")  # no chain of stages, which e-msa needs
#: Name: the optimizer, and what is chosen from.
TUNED = {
    "SGD, momentum 0.9": ("sgd:momentum=0.9,lr={}", (0.01, 0.03, 0.1, 0.3)),
    "RMSprop": ("rmsprop:lr={}", (3e-4, 1e-3, 3e-3, 1e-2)),
    "Adam": ("adam:lr={}", (1e-3, 3e-3, 1e-2, 3e-2)),
    "e-msa": ("e-msa:inner=2,rho={}", (0.1, 1, 10, 100)),
}
#: Name: the optimizer, and the host whose choice it takes and beside which it is set.
OTHERS = {
    "Kronecker": ("kronecker", None),
    "OCNOpt on SGD, momentum 0.9": ("ocnopt:host=sgd,momentum=0.9,lr={}", "SGD, momentum 0.9"),
    "OCNOpt on RMSprop": ("ocnopt:host=rmsprop,lr={}", "RMSprop"),
    "OCNOpt on Adam": ("ocnopt:host=adam,lr={}", "Adam"),
    "OCNOpt on Kronecker": ("ocnopt:host=kronecker", "Kronecker"),
}


def chosen(values: Sequence[float], runs: Sequence[dict[str, Any]]) -> float:
    """The value with the highest mean validation accuracy; of equal ones that with the lowest mean loss."""
    per = len(runs) // len(values)

    def rank(k: int) -> tuple[float, float]:
        own = runs[k * per : (k + 1) * per]
        losses = [math.inf if run["validation_loss"] is None else run["validation_loss"] for run in own]
        return statistics.fmean(run["validation"] for run in own), -statistics.fmean(losses)

    return values[max(range(len(values)), key=rank)]


def compared(ours: Sequence[float], host: Sequence[float]) -> dict[str, float]:
    """Mean difference over the seeds, and its standard error."""
    gaps = [a - b for a, b in zip(ours, host, strict=True)]
    return {"mean": statistics.fmean(gaps), "error": statistics.stdev(gaps) / math.sqrt(len(gaps))}


def measured(name: str, processes: int) -> dict[str, Any]:
    """Rates, then accuracies of all methods on one set."""
    seeds, trials, setting = SETS[name]
    tuned = {key: value for key, value in TUNED.items() if key != "e-msa" or name not in BRANCHED}
    tasks = [Task(setting, spec.format(v), s) for spec, values in tuned.values() for v in values for s in range(trials)]
    tuning = runs_of(tasks, processes)
    best: dict[str, float] = {}
    at = 0
    for name, (_, values) in tuned.items():
        best[name] = chosen(values, tuning[at : at + trials * len(values)])
        at += trials * len(values)
    for run in tuning:
        del run["test"]  # nobody has looked
    specs = {name: spec.format(best[name]) for name, (spec, _) in tuned.items()}
    specs |= {name: spec.format(best.get(host or "")) for name, (spec, host) in OTHERS.items()}
    numbers = range(10, 10 + seeds)
    runs = runs_of([Task(setting, spec, seed) for seed in numbers for spec in specs.values()], processes)
    rows = []
    for name, spec in specs.items():
        own = [run for run in runs if run["optimizer"] == spec]
        scores = [run["test"] for run in own]
        host = OTHERS[name][1] if name in OTHERS else None
        row = {"method": name, "optimizer": spec, "mean": statistics.fmean(scores), "worst": min(scores)}
        row |= {"deviation": statistics.stdev(scores), "failed": sum(run["failure"] is not None for run in own)}
        if host is not None:
            row["gain"] = compared(scores, [run["test"] for run in runs if run["optimizer"] == specs[host]])
        if name in TUNED:
            row["at_end"] = best[name] in (TUNED[name][1][0], TUNED[name][1][-1])
        rows.append(row)
    return {"setting": asdict(setting), "seeds": seeds, "rows": rows, "tuning": tuning, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=[*SETS], default=[*SETS])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "protocol.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["sets"] if options.out.exists() else {}
    for name in options.sets:
        kept[name] = measured(name, options.processes)
        print(f"{name}, {SETS[name][0]} seeds: test accuracy in %: mean, deviation, worst; beside the host")
        for row in kept[name]["rows"]:
            gain = row.get("gain")
            beside = "" if gain is None else f"  {100 * gain['mean']:>+6.2f} +- {100 * gain['error']:.2f}"
            ends = "  end of the grid" if row.get("at_end") else ""
            failed = f"  {row['failed']} failed" if row["failed"] else ""
            figures = f"{100 * row['mean']:>6.2f} {100 * row['deviation']:>6.2f} {100 * row['worst']:>6.2f}"
            print(f"  {row['method']:<28} {figures}{beside}{ends}{failed}  {row['optimizer']}", flush=True)
        options.out.write_text(json.dumps({"machine": machine(1), "sets": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
