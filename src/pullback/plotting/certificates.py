"""Pictures of a certificate: rates along the path, and pairs of twins beside their bounds at one n."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pullback.plotting.stability import save_action, save_twins
from pullback.plotting.style import COLOURS, RATIO, legend_below, panels, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pullback.certification import Certificate
    from pullback.stability import Twins

#: Rates that differ by more than this factor get an axis that is logarithmic but for what lies around zero.
_SPREAD = 100.0
_ZERO: Any = {"color": "0.45", "linewidth": 1.2, "zorder": 1}


def plot_rates(found: Certificate, title: str) -> Figure:
    """Draws the rate along the path with its interval, and the loss with the factor of a step where it has one.

    Args:
        found: A certificate with at least one rate.
        title: What stands above.

    Returns:
        A figure 13 inches wide.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with panels(2, 13, 5.2, title) as (figure, (left, right)):
        _draw_rates(left, found)
        _draw_losses(right, found)
        for ax in (left, right):
            ax.set_xlabel("steps")
            ax.grid(visible=True, which="major", color="0.92", linewidth=1)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_rates(ax: Axes, found: Certificate) -> None:
    steps = [end.step for end in found.ends]
    rates = [end.rate for end in found.ends]
    low = [rate.lower if math.isfinite(rate.lower) else rate.value for rate in rates]
    sure = sorted({rate.confidence for rate in rates if rate.confidence is not None and not rate.proved})
    if any(a < rate.upper for a, rate in zip(low, rates, strict=True)):
        name = f"each above with probability {sure[0]:g}" if sure else "what may be missing"
        ax.fill_between(steps, low, [rate.upper for rate in rates], color=COLOURS[5], alpha=0.35, lw=0, label=name)
    ax.plot(steps, [rate.value for rate in rates], color=COLOURS[0], linewidth=2.2)
    for mark, label, chosen in (
        ("o", "proved there: all eigenvalues", [r.proved for r in rates]),
        ("s", "measured", [r.converged and not r.proved for r in rates]),
        ("x", "not converged: unproved", [not r.converged for r in rates]),
    ):
        if any(chosen):
            at = [s for s, here in zip(steps, chosen, strict=True) if here]
            values = [r.value for r, here in zip(rates, chosen, strict=True) if here]
            ax.plot(at, values, mark, color=COLOURS[0], markersize=7, label=label, clip_on=False)
    ax.axhline(0, **_ZERO)
    ax.set_title("contraction rate at places of the path", fontsize=15)
    sizes = [abs(rate.value) for rate in rates if rate.value != 0]
    if sizes and max(sizes) > _SPREAD * min(sizes):
        ax.set_yscale("symlog", linthresh=statistics.median(sizes))


def _draw_losses(ax: Axes, found: Certificate) -> None:
    steps, losses = zip(*found.path.losses, strict=True)
    ax.plot(steps, losses, "o-", color=COLOURS[0], linewidth=2.2, markersize=5, clip_on=False)
    if min(losses) > 0 and max(losses) > RATIO * min(losses):
        ax.set_yscale("log")
    ax.set_ylabel("loss", color=COLOURS[0])
    h = found.path.h
    factors = [] if h is None else [(end.step, f[0]) for end in found.ends if (f := end.factor(h)) is not None]
    if not factors:
        ax.set_title("training loss", fontsize=15)
        return
    ax.set_title("training loss, and what a step stretches", fontsize=15)
    other = ax.twinx()
    other.spines["right"].set_visible(True)
    other.plot(*zip(*factors, strict=True), "s--", color=COLOURS[1], linewidth=2, markersize=5, clip_on=False)
    other.axhline(1, **_ZERO)
    other.set_ylabel("factor of a step", color=COLOURS[1])


def plot_pairs(report: Twins, title: str) -> Figure:
    """Draws distance and loss change of every pair at one n, with its bounds.

    Args:
        report: Twins, at least one pair.
        title: What stands above.

    Returns:
        A figure 13 inches wide.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with panels(2, 13, 5.0, f"{title}, n = {report.n}") as (figure, (left, right)):
        _draw_pairs(left, report, "distance")
        _draw_pairs(right, report, "loss")
        left.set_title("distance of the weights", fontsize=15)
        right.set_title("largest change of a loss", fontsize=15)
        legend_below(figure, (left, right))
    return figure


def _draw_pairs(ax: Axes, report: Twins, what: str) -> None:
    numbers = range(1, len(report.pairs) + 1)
    values = [twin.distance if what == "distance" else twin.loss_change for twin in report.pairs]
    ax.plot(numbers, values, "o", color=COLOURS[0], markersize=8, label="measured")
    names = dict.fromkeys(bound.name for twin in report.pairs for bound in twin.bounds)
    for k, name in enumerate(names):
        found = [(j, b) for j, twin in zip(numbers, report.pairs, strict=True) for b in twin.bounds if b.name == name]
        heights = [(j, getattr(b, what)) for j, b in found if getattr(b, what) is not None]
        values += [height for _, height in heights]
        if heights:
            kind = found[0][1].distance_kind if what == "distance" else found[0][1].kind
            ax.plot(*zip(*heights, strict=True), "_", color=COLOURS[1 + k], ms=26, mew=3, label=f"{name}: {kind}")
    ax.set(xlabel="pair", xlim=(0.4, len(report.pairs) + 0.6))
    if min(values) > 0 and max(values) > RATIO * min(values):
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, 1.1 * max(values) or None)
    ax.locator_params(axis="x", integer=True)
    ax.grid(visible=True, which="major", axis="y", color="0.92", linewidth=1)


def save_certificate(found: Certificate, folder: str | Path) -> list[Path]:
    """Draws what there is into ``rates.png``, ``twins.png`` and ``action.png``.

    Args:
        found: The certificate.
        folder: It exists.

    Returns:
        The files written.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If a file cannot be written.
    """
    from pullback.certification.twinning import as_scaling

    folder, title, kept = Path(folder), f"{found.problem}, {found.spec.label}", []
    if found.ends:
        kept.append(folder / "rates.png")
        save_figure(plot_rates(found, title), kept[-1])
    if found.reports:
        kept.append(folder / "twins.png")
        scaling = as_scaling(found.reports)
        if scaling is None:
            save_figure(plot_pairs(found.reports[-1], title), kept[-1])
        else:
            save_twins(scaling, kept[-1], title)
    if found.path.actions:
        kept.append(save_action(found.path.actions, folder / "action.png", title))
    return kept
