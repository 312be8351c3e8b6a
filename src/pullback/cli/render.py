"""Results as tables that stay in line, wide or narrow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pullback.problems import Arrival, Comparison, Quartiles, Summary, Target, summarise
from pullback.problems.target import name_of

_Column = tuple[str, Callable[[Summary], str]]
_Name = Callable[[str], str]
_NOTHING = "-"


def render(result: Comparison, console: Console) -> RenderableType:
    """Makes the table of a comparison: one row per optimizer, medians and quartiles or the worst over its seeds.

    On a console too narrow for it there are two tables, if need be with options below each other,
    and in the end one short list per optimizer.

    Args:
        result: The runs.
        console: Where it will be printed; decides the width.

    Returns:
        Something to give to ``console.print``.
    """
    summaries = summarise(result.runs)
    outcome, times = _outcome(summaries, result.metric), _times(summaries)
    halves = [columns for columns in (outcome, times) if columns]
    parts: list[RenderableType] = [headline(result)]
    parts += (
        _tables(summaries, [[*outcome, *times]], [str], console)
        or _tables(summaries, halves, [str, _folded], console)
        or [_list(summary, [*outcome, *times]) for summary in summaries]
    )
    return Group(*parts, *failures(result))


def headline(result: Comparison) -> Text:
    """Names the problem, the seeds and the threads.

    Args:
        result: The runs.

    Returns:
        A line.
    """
    seeds = len({run.seed for run in result.runs})
    threads = result.machine["threads"]
    title = f"{result.problem}, {seeds} seed{'s' * (seeds != 1)}, {threads} thread{'s' * (threads != 1)}"
    return Text(title, style="bold")


def failures(result: Comparison) -> list[Text]:
    """Says why runs ended early.

    Args:
        result: The runs.

    Returns:
        A line per run that failed or was interrupted.
    """
    return [
        Text(f"{run.label}, seed {run.seed}, step {run.steps}: {run.failure}", style="red")
        for run in result.runs
        if run.failure is not None
    ]


def number(value: float | None) -> str:
    """Writes a number with three digits, an exponent as short as it can be.

    Args:
        value: The number, or None.

    Returns:
        Its text, "-" for None.
    """
    if value is None:
        return _NOTHING
    text = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def _spread(quartiles: Quartiles | None) -> str:
    if quartiles is None:
        return _NOTHING
    median = number(quartiles.median)
    return median if quartiles.count == 1 else f"{median} [{number(quartiles.low)}, {number(quartiles.high)}]"


def _median(quartiles: Quartiles | None) -> str:
    return number(None if quartiles is None else quartiles.median)


def _loss(summary: Summary) -> str:
    failed = f"{summary.failed} of {summary.runs} failed" if summary.failed else ""
    return failed if failed and summary.loss is None else " ".join(filter(None, (_spread(summary.loss), failed)))


def _outcome(summaries: Sequence[Summary], metric: str) -> list[_Column]:
    columns: list[_Column] = [("train\nloss", _loss)]
    if any(summary.loss is not None and summary.loss.count > 1 for summary in summaries):
        columns.append(("worst\nloss", lambda summary: number(summary.loss.worst if summary.loss else None)))
    if any(summary.test is not None for summary in summaries):
        columns.append((f"test\n{metric}", lambda summary: _median(summary.test)))
    if any(summary.validation_score is not None for summary in summaries):
        columns.append((f"valid.\n{metric}", lambda summary: _median(summary.validation_score)))
    columns.append(("steps", lambda summary: _NOTHING if summary.steps is None else f"{summary.steps.median:.0f}"))
    if any(summary.trials is not None for summary in summaries):
        columns.append(("trials\n/step", lambda summary: _median(summary.trials)))
    if any(summary.nfe is not None for summary in summaries):
        columns += [("nfe", lambda summary: _median(summary.nfe)), ("t1", lambda summary: _median(summary.t1))]
    return [
        *columns,
        ("ms/step", lambda summary: _median(summary.ms_per_step)),
        ("seconds", lambda summary: _median(summary.seconds)),
    ]


def _times(summaries: Sequence[Summary]) -> list[_Column]:
    levels = dict.fromkeys(level for summary in summaries for level in summary.reached)
    several = any(summary.runs > 1 for summary in summaries)
    first, second = (" ", "\nmedian, worst") if several else ("\n", "")
    columns: list[_Column] = []
    for level in levels:
        columns += [
            (f"steps to{first}{_short(level)}{second}", _steps_to(level)),
            (f"s to{first}{_short(level)}{second}", _seconds_to(level)),
        ]
    return columns


def _short(level: Target) -> str:
    return name_of(level).replace("validation", "valid.")


def _steps_to(level: Target) -> Callable[[Summary], str]:
    def text(summary: Summary) -> str:
        found = summary.reached[level]
        return _typical(found, found.steps, found.worst_steps, lambda steps: f"{steps:.0f}")

    return text


def _seconds_to(level: Target) -> Callable[[Summary], str]:
    def text(summary: Summary) -> str:
        found = summary.reached[level]
        return f"{_typical(found, found.seconds, found.worst_seconds, number)} ({found.count}/{found.runs})"

    return text


def _typical(found: Arrival, median: float | None, worst: float | None, write: Callable[[float], str]) -> str:
    """The median and, of several runs, the worst."""
    if median is None:
        return _NOTHING
    return write(median) if found.runs == 1 else f"{write(median)}, {_NOTHING if worst is None else write(worst)}"


def _folded(label: str) -> str:
    return label.replace(":", ":\n  ", 1).replace(",", ",\n  ")


def _tables(
    summaries: Sequence[Summary], parts: Sequence[Sequence[_Column]], names: Sequence[_Name], console: Console
) -> list[Table]:
    """A table per part, each with the first way of writing names that fits; none if one part cannot."""
    chosen = []
    for columns in parts:
        tables = (_table(summaries, columns, name) for name in names)
        fitting = next((table for table in tables if _fits(table, console)), None)
        if fitting is None:
            return []
        chosen.append(fitting)
    return chosen


def _table(summaries: Sequence[Summary], columns: Sequence[_Column], name: _Name) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("optimizer", no_wrap=True, vertical="bottom")
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(Text(name(summary.label)), *(Text(cell(summary)) for _, cell in columns))
    return table


def _list(summary: Summary, columns: Sequence[_Column]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for title, cell in columns:
        grid.add_row(Text(f"  {title}".replace("\n", " ")), Text(cell(summary)))
    return Group(Text(summary.label, style="bold"), grid)


def _fits(table: Table, console: Console) -> bool:
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width
