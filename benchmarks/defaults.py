"""Do the defaults work untouched? Every embedded problem, ten seeds, no option given.

Each run of ours must end at a tenth of its initial training loss or at Adam's (lr 3e-3, equal epochs), and
never above 1.5 times Adam's. Prints a table and keeps the figures:

    python benchmarks/defaults.py [--seeds 10] [--out benchmarks/results/defaults.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pullback.problems import Budget, compare, load_problem

PROBLEMS = {"digits": Budget(epochs=20), "wine": Budget(epochs=200), "breast-cancer": Budget(epochs=200),
            "diabetes": Budget(epochs=200)}  # fmt: skip
OURS = ("layerwise-metric", "gauss-newton")
ADAM = "adam:lr=3e-3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defaults.json")
    options = parser.parse_args()
    rows, machine, bad = [], None, 0
    print(f"{'problem':<14} {'optimizer':<17} {'worst loss / initial':>21} {'worst loss / Adam':>18} {'ok':>6}")
    for name, budget in PROBLEMS.items():
        result = compare(load_problem(name), ",".join([*OURS, ADAM]), seeds=options.seeds, budget=budget).to_json()
        machine = result["machine"]
        adam = {run["seed"]: run["loss"] for run in result["runs"] if run["optimizer"] == "adam"}
        for ours in OURS:
            runs = [run for run in result["runs"] if run["optimizer"] == ours]
            start = [run["loss"] / run["history"][0][2] if run["loss"] is not None else float("inf") for run in runs]
            ratio = [run["loss"] / adam[run["seed"]] if run["loss"] is not None else float("inf") for run in runs]
            ok = sum((s <= 0.1 or r <= 1) and r <= 1.5 for s, r in zip(start, ratio, strict=True))
            bad += len(runs) - ok
            print(f"{name:<14} {ours:<17} {max(start):>21.2e} {max(ratio):>18.2e} {ok:>3}/{len(runs)}", flush=True)
            row = {"problem": name, "optimizer": ours, "epochs": budget.epochs, "of_initial": start, "of_adam": ratio}
            rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
