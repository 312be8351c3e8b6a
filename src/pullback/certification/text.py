"""A certificate as text of at most 100 columns."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pullback.certification.statements import KINDS
from pullback.stability.descent import PATHWISE, SPECTRAL

if TYPE_CHECKING:
    from pullback.certification.record import Certificate

_WIDTH = 100
_TITLES = {"proved": "PROVED, up to round-off", "measured": "MEASURED", "not claimed": "NOT CLAIMED"}


def written(found: Certificate) -> str:
    """The whole certificate.

    Args:
        found: What was reached.
    """
    head = f"{found.problem}, {found.spec.label}, seed {found.seed}"
    about = [f"{found.size} weights, {found.n} samples", *found.notes]
    parts = [head, *_wrapped("; ".join(about), "", ""), *_rates(found), *_twins(found), *_modules(found)]
    for kind in KINDS:
        said = [one for one in found.statements if one.kind == kind]
        if said:
            parts += ["", _TITLES[kind]]
        for one in said:
            parts += _wrapped(one.text, "  * ", "    ")
            parts += _wrapped(f"({one.source})", "    ", "     ")
    seconds = ", ".join(f"{phase} {took:.1f} s" for phase, took in found.seconds.items())
    return "\n".join([*parts, "", f"took {seconds}"])


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False)


def _table(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    width = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, width, strict=True)) for row in rows]
    return ["", title, *(f"  {line}" for line in lines)]


def _rates(found: Certificate) -> list[str]:
    if not found.ends:
        return []
    losses, h = dict(found.path.losses), found.path.h
    head = ["step", "loss", "rate", "lower end", "upper end", "largest", *(["a step's factor"] if h else []), ""]
    rows = [head]
    for end in found.ends:
        rate, factor = end.rate, None if h is None else end.factor(h)
        known = "proved" if rate.proved else rate.method if rate.converged else "UNPROVED"
        low = "unknown" if rate.lower == -float("inf") else f"{rate.lower:.4g}"
        top = "-" if end.largest is None else f"{end.largest:.4g}"
        extra = [] if h is None else ["-" if factor is None else f"{factor[0]:.4g}"]
        row = [str(end.step), f"{losses.get(end.step, float('nan')):.4g}", f"{rate.value:.4g}", low]
        rows.append([*row, f"{rate.upper:.4g}", top, *extra, known])
    return _table(f"rates along the path, metric: {found.path.metric}", rows)


def _twins(found: Certificate) -> list[str]:
    if not found.reports:
        return []
    names = [name for name in (PATHWISE, SPECTRAL) if any(row["name"] == name for row in found.bounds)]
    stated = any(not row["derived"] for row in found.bounds)
    known = {(row["n"], row["name"]): row for row in found.bounds}
    head = ["n", "pairs", "distance", *(f"<= {name}" for name in names), "loss change", *(f"<= {n}" for n in names)]
    rows = [[*head, *(["P's scaling"] if stated else []), "gap"]]
    for report in found.reports:
        pairs = report.pairs
        gaps = [t.gap for t in pairs if t.gap is not None]
        cells = [str(report.n), str(len(pairs)), f"{statistics.median(t.distance for t in pairs):.3g}"]
        bounds = [known.get((report.n, name)) for name in names]
        cells += ["-" if row is None else f"{row['distance']:.3g}" for row in bounds]
        cells += [f"{statistics.median(t.loss_change for t in pairs):.3g}"]
        cells += ["-" if row is None else f"{row['loss']:.3g}" for row in bounds]
        scale = [row for row in found.bounds if row["n"] == report.n and not row["derived"]]
        cells += [f"{scale[0]['loss']:.3g}"] if scale else []
        rows.append([*cells, f"{statistics.median(gaps):.3g}" if gaps else "-"])
    return _table("twins, medians over pairs", rows)


def _modules(found: Certificate) -> list[str]:
    action = found.path.action
    if action is None:
        return []
    total = action.total or 1.0
    rows = [["module", "action", "share"]]
    rows += [[name, f"{value:.3g}", f"{100 * value / total:.3g} %"] for name, value in action.modules.items()]
    shares = [[name, f"{share * action.total:.3g}", f"{100 * share:.3g} %"] for name, share in action.shares().items()]
    kept = [row for row in shares if row[1] != "0"]
    return [
        *_table("action by module", rows),
        *(_table("action by defect", [["defect", "action", "share"], *kept]) if kept else []),
    ]
