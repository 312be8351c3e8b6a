"""The pictures of docs/examples.md, from what benchmarks/examples.py found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pullback.plotting.style import COLOURS, STYLE

OURS = ("layerwise-metric", "gauss-newton", "feedback", "by-module")


def draw(report: dict[str, Any], folder: Path) -> None:
    """A picture for every example in the report."""
    import matplotlib
    from matplotlib.figure import Figure

    painters = {"mass-spring": draw_chain, "gene-circuit": draw_circuit, "skew-network": draw_network}
    for name, paint in painters.items():
        if name in report:
            with matplotlib.rc_context(STYLE):
                figure = Figure(figsize=(13, 4.8), layout="constrained")
                paint(report[name], *figure.subplots(1, 2))
                figure.savefig(folder / f"example-{name}.png", dpi=110)


def draw_race(found: dict[str, Any], ax: Any, seed: int) -> None:
    """Loss over seconds with one seed."""
    labels = [*OURS, found["best adam"], "lbfgs"]
    for colour, label in zip(COLOURS, labels, strict=False):
        history = found["rows"][label]["history"][seed]
        ax.plot(*zip(*history[1:], strict=True), color=colour, linewidth=2, label=label)
    ax.set(xlabel="seconds of training", ylabel="loss", yscale="log", xscale="log")
    ax.set_xlim(left=1e-2)
    ax.legend(frameon=False)


def draw_chain(found: dict[str, Any], left: Any, right: Any) -> None:
    draw_race(found["race"], left, 0)
    for colour, k in zip(COLOURS, range(3), strict=False):
        times = [0.2 * j for j in range(61)]
        rates = found["rates"]
        right.plot(times, [z[k] for z in rates["path"]], color=colour, linewidth=2, label=f"mass {k + 1}")
        right.plot(times, [z[k] for z in rates["free path"]], color=colour, linewidth=1.2, linestyle=":")
    right.set(xlabel="seconds", ylabel="deviation (m), dotted without control", ylim=(-1.0, 1.0))
    right.legend(frameon=False, ncols=3, loc="upper center")


def draw_circuit(found: dict[str, Any], left: Any, right: Any) -> None:
    metrics, scale = found["metrics"], 2.302585
    inducer = [10 ** (v / scale) for v in metrics["inducer"]]

    def molecules(values: list[float]) -> list[float]:
        return [10 ** (v / scale) for v in values]

    left.plot(inducer, molecules(metrics["start"]), color="0.6", linewidth=2, linestyle="--", label="before")
    for colour, name in zip(COLOURS, ("mutational", "outputs", "both"), strict=False):
        left.plot(inducer, molecules(metrics[name]["response"]), color=colour, linewidth=2, label=name)
    left.plot(inducer, molecules(metrics["wanted"]), "k.", label="wanted")
    left.set(xscale="log", yscale="log", xlabel="inducer (in units of K)", ylabel="reporter (molecules per cell)")
    left.legend(frameon=False, fontsize=11)
    modules = list(metrics["both"]["moved by module"])
    for k, (colour, name) in enumerate(zip(COLOURS, ("mutational", "outputs", "both"), strict=False)):
        heights = [metrics[name]["moved by module"][module] for module in modules]
        right.bar([j + 0.27 * (k - 1) for j in range(len(modules))], heights, 0.25, color=colour, label=name)
    right.set_xticks(range(len(modules)), [module.replace(" ", "\n") for module in modules])
    right.set(ylabel="change of log parameters")
    right.legend(frameon=False)


def draw_network(found: dict[str, Any], left: Any, right: Any) -> None:
    for colour, coupling in zip(COLOURS, ("skew", "free"), strict=False):
        row = found[coupling][0]
        left.plot(row["step"], row["dense"], color=colour, linewidth=2, label=f"{coupling}: least rate found, dense")
        if coupling == "skew":
            left.plot(row["step"], row["guarantee"], color="k", linewidth=2, linestyle="--", label="skew: guarantee")
        else:
            label = "free, any constant metric"
            left.plot(row["step"], row["abscissa"], color=colour, linestyle=":", linewidth=2, label=label)
        right.plot(row["twins"]["times"], row["twins"]["distance"], color=colour, linewidth=2, label=coupling)
    left.axhline(0, color="0.7", linewidth=1)
    left.set(xlabel="step of Gauss-Newton", ylabel="contraction rate")
    left.legend(frameon=False, fontsize=11)
    right.set(xlabel="time", ylabel="distance of two trajectories", yscale="log")
    right.legend(frameon=False)
