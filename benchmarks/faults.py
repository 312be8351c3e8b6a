"""Many drawn faults: is every faulty step correct, or refused with one clear error that leaves nothing behind?

Cases come from tests/faults, each from its seed. Counts how the steps with a fault ended, by kind of fault, and
lists the seeds whose step was neither:

    python benchmarks/faults.py [--cases 10000] [--seed 0] [--out benchmarks/results/faults.json]
    python benchmarks/faults.py --only 1234      # one case again, with its traceback
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from pullback.problems.machine import machine

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "faults")]

from draw import KNOWN, draw  # noqa: E402
from play import play  # noqa: E402


def again(seed: int) -> int:
    case = draw(seed)
    print(case.describe())
    print(", ".join(play(case)))
    return 0


def run(cases: int, first: int) -> dict[str, Any]:
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[dict[str, Any]] = []
    start = time.perf_counter()
    for k, seed in enumerate(range(first, first + cases), 1):
        case = draw(seed)
        try:
            outcomes = play(case)
        except Exception as error:
            verdicts[case.fault]["known" if seed in KNOWN else "wrong"] += 1
            said = f"{type(error).__name__}: {error}"
            wrong.append({"seed": seed, "said": said, "known": KNOWN.get(seed), "case": case.describe()})
        else:
            verdicts[case.fault][outcomes[0 if case.fault == "parameters" else case.steps[0]]] += 1
        if k % 100 == 0 or k == cases:
            seconds = time.perf_counter() - start
            print(f"\r{k}/{cases} cases, {len(wrong)} wrong, {seconds:.0f} s", end="", flush=True)
    print()
    table = {fault: dict(sorted(verdicts[fault].items())) for fault in sorted(verdicts)}
    return {"cases": cases, "seed": first, "seconds": seconds, "verdicts": table, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--only", type=int, metavar="SEED", help="play one case and show what it says")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "faults.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        return again(options.only)
    result = run(options.cases, options.seed)
    for fault, counts in result["verdicts"].items():
        print(f"{fault:<15}", ", ".join(f"{name} {count}" for name, count in counts.items()))
    for entry in result["wrong"]:
        print(f"seed {entry['seed']}: {entry['said']}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(threads=1), **result}, indent=1) + "\n")
    return int(any(entry["known"] is None for entry in result["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
