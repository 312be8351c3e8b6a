"""The table of a sweep: one part per optimizer, one row per combination of its options."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pullback.cli.render import failures, headline, number
from pullback.problems import Cell, Grid, Quartiles, Summary, Sweep, summarise
from pullback.problems.options import format_value

_Column = tuple[str, Callable[[Cell], str]]


def render_sweep(result: Sweep) -> RenderableType:
    """Makes the table: median, best and worst seed of what the sweep is judged by, and the cost of a step.

    The best combination of each optimizer has a star. Options with one value stand beside the optimizer's name.

    Args:
        result: The runs and their grids.

    Returns:
        Something to give to ``console.print``.
    """
    summaries = {summary.label: summary for summary in summarise(result.comparison.runs)}
    lines: list[RenderableType] = [
        headline(result.comparison),
        Text(f"by {result.measure}; {'more' if result.measure.rises else 'less'} is better"),
    ]
    for grid in result.grids:
        lines += [Text(grid.label, style="bold"), _table(result, grid, summaries)]
    return Group(*lines, *failures(result.comparison))


def _table(result: Sweep, grid: Grid, summaries: dict[str, Summary]) -> Table:
    several = len({run.seed for run in result.comparison.runs}) > 1
    by_loss = str(result.measure) == "training loss"

    def median(pick: Callable[[Summary], Quartiles | None]) -> Callable[[Cell], str]:
        def text(cell: Cell) -> str:
            found = pick(summaries[cell.label]) if cell.label in summaries else None
            return number(None if found is None else found.median)

        return text

    columns: list[_Column] = [("median" if several else str(result.measure), lambda cell: number(cell.median))]
    if several:
        columns += [("best", lambda cell: number(cell.best)), ("worst", lambda cell: number(cell.worst))]
    if any(cell.failed for cell in result.cells(grid)):
        columns.append(("failed", lambda cell: f"{cell.failed}/{cell.runs}"))
    if not by_loss:
        columns.append(("train\nloss", median(lambda summary: summary.loss)))
    if any(summary.nfe is not None for summary in summaries.values()):
        columns += [("nfe", median(lambda summary: summary.nfe)), ("t1", median(lambda summary: summary.t1))]
    columns += [
        ("ms/step", median(lambda summary: summary.ms_per_step)),
        ("seconds", median(lambda summary: summary.seconds)),
    ]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("", *grid.axes, *(title for title, _ in columns)):
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    best = result.best(grid)
    for cell in result.cells(grid):
        options = (format_value(cell.options[key]) for key in grid.axes)
        table.add_row("*" if cell == best else "", *options, *(text(cell) for _, text in columns))
    return table
