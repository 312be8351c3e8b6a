"""What a certificate says, each sentence with its kind and with what it rests on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pullback.certification.settings import DescentSpec
from pullback.stability import Bound, Twins
from pullback.stability.descent import PATHWISE, SPECTRAL

if TYPE_CHECKING:
    from pullback.certification.rates import Ends
    from pullback.certification.record import Certificate

Kind = Literal["proved", "measured", "not claimed"]
KINDS: tuple[Kind, ...] = ("proved", "measured", "not claimed")


@dataclass(frozen=True)
class Statement:
    """One sentence of a certificate.

    Attributes:
        kind: Proved up to round-off, measured, or not claimed.
        text: The sentence.
        source: What it rests on, or why it is not claimed.
    """

    kind: Kind
    text: str
    source: str

    def to_dict(self) -> dict[str, str]:
        """As plain words; the source under ``from``."""
        return {"kind": self.kind, "text": self.text, "from": self.source}


def statements(found: Certificate) -> list[Statement]:
    """All that a certificate says, proved sentences first.

    Args:
        found: What was reached.
    """
    every = [*_training(found), *_rates(found), *_constants(found), *_twins(found), *_exponents(found), *_action(found)]
    every += _never(found)
    return [one for kind in KINDS for one in every if one.kind == kind]


def _training(found: Certificate) -> list[Statement]:
    if not found.path.losses:
        return []
    (_, first), (_, last) = found.path.losses[0], found.path.losses[-1]
    where = "" if last < first else ": the training did NOT lower it"
    text = f"{found.path.steps} steps took the loss from {first:.4g} to {last:.4g}{where}."
    return [Statement("measured", text, "the loss on all training samples, decay included")]


def _rates(found: Certificate) -> list[Statement]:
    if not found.ends:
        return []
    held = f"the metric ({found.path.metric}) held fixed at each"
    out = []
    proved = [end for end in found.ends if end.rate.proved]
    if proved:
        how = f"all {found.size} eigenvalues of the Hessian; {held}"
        out.append(Statement("proved", f"{_between(proved, found)}.", how))
    other = [end for end in found.ends if end.rate.converged and not end.rate.proved]
    if other:
        text = f"{_between(other, found)}."
        sure = [r.confidence for end in other if (r := end.rate).confidence is not None and math.isfinite(r.lower)]
        if len(sure) == len(other):
            text += f" Each is above its lower end with probability {min(sure):g} over the start."
        out.append(Statement("measured", text, f"{other[0].rate.method} on products with the Hessian; {held}"))
    loose = [end for end in found.ends if not end.rate.converged]
    if loose:
        text = f"The rate {_where(loose, found)} did not converge and is UNPROVED: only its upper end is known."
        out.append(Statement("not claimed", text, "the budget of products was used up"))
    return [*out, *_signs(found), *_factors(found)]


def _between(ends: Sequence[Ends], found: Certificate) -> str:
    low, high = (choose(end.rate.value for end in ends) for choose in (min, max))
    return f"The training system's rate {_where(ends, found)} is between {low:.4g} and {high:.4g}"


def _signs(found: Certificate) -> list[Statement]:
    negative = [end for end in found.ends if end.rate.upper < 0]
    if not negative:
        text = "Nowhere was a rate proved to be negative; it may be, at these places or between them."
        proved = all(end.rate.proved for end in found.ends)
        text = "No rate is negative at these places; between them it may be." if proved else text
        return [Statement("not claimed", text, f"rates are of {len(found.ends)} places only")]
    worst = min(end.rate.upper for end in negative)
    where = f"{_where(negative, found)}, {worst:.4g} or less at one"
    text = f"The rate is NEGATIVE {where}: near trainings move apart there, in some direction."
    return [Statement("proved", text, "a vector each: its Rayleigh quotient is never below the smallest eigenvalue")]


def _factors(found: Certificate) -> list[Statement]:
    h = found.path.h
    factors = [] if h is None else [f for end in found.ends if (f := end.factor(h)) is not None]
    if h is None or not factors:
        return []
    least, most = min(f[0] for f in factors), max(f[0] for f in factors)
    text = f"Near these places a step of {h:g} stretches distances by at most {least:.4g} to {most:.4g}."
    kind: Kind = "proved" if all(end.rate.proved for end in found.ends) else "measured"
    return [
        Statement(kind, text, "the largest |1 - h x| over both ends x of the spectrum; to first order in the distance")
    ]


def _where(ends: Sequence[Ends], found: Certificate) -> str:
    if len(ends) == len(found.ends):
        return f"at all {len(ends)} places"
    return f"at {len(ends)} of {len(found.ends)} places (after {', '.join(str(end.step) for end in ends)} steps)"


def _constants(found: Certificate) -> list[Statement]:
    c = found.constants
    if c is None:
        return []
    share = "" if c.B2 is None else f", B^2 = {c.B2:.4g}"
    text = (
        f"kappa = {c.kappa:.4g}, L = {c.lipschitz:.4g}, mu = {c.mu:.4g}, xi = {c.xi:.4g}{share}, "
        f"smallest rate {c.rate:.4g}."
    )
    return [Statement("measured", text, f"all training samples at {c.places} places of the path; nowhere else")]


def named(reports: Sequence[Twins], name: str) -> list[tuple[float, float, Bound]]:
    """Measured over promised, of distance and of loss change, with the bound, for all pairs that have it."""
    twins = [twin for report in reports for twin in report.pairs]
    return [(t.ratio(b), t.loss_ratio(b), b) for t in twins for b in t.bounds if b.name == name]


def _twins(found: Certificate) -> list[Statement]:
    if not found.reports:
        return []
    last, out = found.reports[-1], []
    gaps = [t.gap for t in last.pairs if t.gap is not None]
    pairs, plural = len(last.pairs), "s" * (len(last.pairs) != 1)
    text = (
        f"At n = {last.n}, {pairs} pair{plural} of twins ended {statistics.median(t.distance for t in last.pairs):.3g} "
        f"apart in the median (largest {max(t.distance for t in last.pairs):.3g}), no loss changed by more than "
        f"{max(t.loss_change for t in last.pairs):.3g}; generalisation gap {statistics.median(gaps):.3g}."
    )
    out.append(Statement("measured", text, "training on data that differ in one sample; held-out samples for the gap"))
    for name, rests in ((PATHWISE, _PAIR), (SPECTRAL, _SPECTRUM)):
        known = named(found.reports, name)
        if not known:
            continue
        far, loss = [ratio for ratio, _, _ in known], [ratio for _, ratio, _ in known]
        for what, ratios, kind in (("distance", far, known[0][2].distance_kind), ("loss change", loss, "")):
            broken, count = sum(ratio > 1 for ratio in ratios), len(ratios)
            spread = f"{statistics.median(ratios):.2g} of it in the median, {max(ratios):.2g} at most"
            if broken:
                text = f"The {what} of {broken} of {count} pairs is ABOVE the bound '{name}' ({spread})."
            else:
                text = f"The {what} of all {count} pairs is below the derived bound '{name}' ({spread})."
            proved = kind == "proved" and not broken
            source = rests if what == "distance" else f"{rests}; times kappa at five places between the two ends"
            out.append(Statement("proved" if proved else "measured", text, source))
    return out


#: Of the kinetic part: an action below is round-off.
_ROUND = 1e-18
_PAIR = "the lemma of theory 16 with what every step did to that very pair; for these pairs alone"
_SPECTRUM = "the lemma of theory 16 with eigenvalues sampled between the twins of one pair for each n"


def _exponents(found: Certificate) -> list[Statement]:
    if found.fits is None:
        return []
    distance, loss = found.fits
    text = f"Twin distance goes as {distance}, the loss change as {loss}."
    ns = ", ".join(str(report.n) for report in found.reports)
    return [Statement("measured", text, f"least squares over n = {ns}, Student's interval; one order of the data")]


def _action(found: Certificate) -> list[Statement]:
    action = found.path.action
    if action is None or action.gap is None:
        return []
    rests = f"metric: {found.path.metric} ({found.path.why}); the identity with the loss holds to {abs(action.gap):.0e}"
    if found.path.discrete is not None:
        text = (
            f"The action in discrete time is {found.path.discrete:.1e}, zero but for round-off; of the curve through "
            f"the steps it is {action.total:.3g}, {action.total / max(action.kinetic, 1e-300):.2g} of the kinetic part."
        )
    elif action.total < _ROUND * action.kinetic:
        text = f"The action is {action.total:.1e}, zero but for round-off: every step is one of its metric's flow."
    else:
        shares = ", ".join(f"{name} {100 * s:.3g} %" for name, s in action.shares().items() if abs(s) >= 5e-4)
        text = f"The action is {action.total:.4g} over time {action.time:.4g}: {shares}."
        rests += "; momentum is all of a step that its own gradient in the metric does not explain"
    return [Statement("measured", text, rests)]


def _never(found: Certificate) -> list[Statement]:
    out = []
    stated = named(found.reports, "P, O(kappa^2 L / (xi mu sqrt n))")
    if stated:
        last = stated[-1][2]
        text = f"P's scaling kappa^2 L / (xi mu sqrt n), {last.loss:.3g} at the largest n, is no bound here."
        out.append(Statement("not claimed", text, "its constant is unknown and set to one"))
    if not isinstance(found.spec, DescentSpec):
        out.append(Statement("not claimed", f"A bound for twins of {found.spec.name}.", found.why_no_bound))
    text = "Contraction between the places, from other initial weights, or on other data."
    out.append(Statement("not claimed", text, "rates are of points"))
    text = "How twins or losses behave for samples that were not drawn, or on new data."
    out.append(
        Statement("not claimed", text, "pairs and held-out samples are those there were; no probability is stated")
    )
    if found.ended != "whole":
        pairs = sum(len(report.pairs) for report in found.reports)
        reached = ", ".join([*found.phases, *([f"{pairs} pairs of twins"] if pairs else [])]) or "nothing"
        text = f"Anything beyond what was reached: {reached}."
        out.append(Statement("not claimed", text, "interrupted" if found.ended == "interrupted" else "the time was up"))
    return out
