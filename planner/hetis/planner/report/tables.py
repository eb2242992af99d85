"""Parts of printed output, at most 80 columns wide if the names allow it: tables, facts, bullets, sections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hetis.planner.report.blocks import Column, Grid, grid_of
from hetis.planner.report.figures import digits, percent

if TYPE_CHECKING:
    from hetis.planner.use_cases.record.forms import Verification

P = ParamSpec("P")
T = TypeVar("T")
_ENDLESS = 10_000  # columns, more than any table has
ROUNDED = 0.02  # by which a share may differ from the fraction that it is called


def as_group(parts: Callable[P, Iterator[RenderableType]]) -> Callable[P, Group]:
    """Turn a function that yields parts into one that returns them in a group."""

    @functools.wraps(parts)
    def grouped(*args: P.args, **kwargs: P.kwargs) -> Group:
        return Group(*parts(*args, **kwargs))

    return grouped


def table(
    *columns: str, rows: Iterable[Iterable[RenderableType]] = (), fixed: bool = False, strong: int | None = None
) -> Table:
    """Return a table without lines.

    Args:
        *columns: the column headers. The header of a text column is preceded by a quote (``'devices``), or by ``<`` if
            its words must not be broken (``<GPU``); other columns contain right-aligned numbers.
        rows: the cells of each row.
        fixed: whether numbers must not be broken, either.
        strong: the most important row.
    """
    made = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for head in columns:
        is_text, is_fixed = head.startswith(("'", "<")), head.startswith("<") or (fixed and not head.startswith("'"))
        made.add_column(
            head[1:] if is_text else head, justify="left" if is_text else "right", overflow="fold", no_wrap=is_fixed
        )
    for number, row in enumerate(rows):
        made.add_row(*row, style="bold" if number == strong else "")
    return made


def table_of(
    items: Iterable[T], *columns: Column[T] | None, fixed: bool = False, most: int | None = None, noun: str = "row"
) -> RenderableType:
    """Return a `table` of a `grid_of`; if there are more than ``most`` items, of the first, and their number."""
    every = list(items)
    grid = grid_of(every[:most], *columns)
    made = table(*grid.columns, rows=grid.rows, fixed=fixed)
    return made if most is None else first_rows(made, len(every), most, noun)


def grid(*wraps: bool, rows: Iterable[Iterable[RenderableType]], gap: int = 2) -> Table:
    """Return rows of cells without headers; ``wraps`` tells for each column whether its cells may be broken."""
    made = Table.grid(padding=(0, gap))
    for one in wraps:
        made.add_column(overflow="fold", no_wrap=not one)
    for row in rows:
        made.add_row(*row)
    return made


def facts(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    """Return one fact per line, each after its name."""
    made = grid(False, True, rows=rows)
    made.columns[0].style = "dim"
    return made


def bullets(lines: Iterable[RenderableType]) -> Table:
    """Return one bullet per line, with hanging indents."""
    made = Table.grid(padding=(0, 1))
    for line in lines:
        made.add_row("•", Text(line) if isinstance(line, str) else line)
    return made


def section(title: str, body: RenderableType, *, style: str = "bold") -> RenderableType:
    """Return a body below a bold title."""
    return Group(Text(f"\n{title}", style=style), Padding(body, (0, 0, 0, 1)))


def drawn(grid: Grid) -> Table | Narrowing:
    """Return a table that pages show, too: without broken words if columns may be left out, else with folded text."""
    return Narrowing(grid) if grid.least else table(*grid.columns, rows=grid.rows, fixed=True, strong=grid.strong)


def titled(grid: Grid) -> RenderableType:
    """Return a table that pages show, too, with its title and note."""
    return section(grid.title, Group(drawn(grid), *([Text(grid.note)] if grid.note else [])))


class SimulationRemarks(NamedTuple):
    """How a plan was simulated.

    Attributes:
        share: the share of its rate, at which as large a part of its replicas ran; None: all of both.
        too_short: whether runs cannot fill the seats of what was simulated.
        dispatched: whether head groups were dispatched per request, not split as planned.
        router: what sent requests to its replicas; None: not told.
    """

    share: float | None
    too_short: bool
    dispatched: bool
    router: str | None = None

    @staticmethod
    def of(found: Verification) -> SimulationRemarks:
        return SimulationRemarks(found.share, bool(found.too_short), bool(found.dispatched), found.router or "nginx")

    def lines(self) -> list[str]:
        """Return a line on the router, and on all that is not as planned: a part of it, empty seats, moving heads."""
        found = [] if self.share is None else [f"simulated: {_part_words(self.share)}"]
        if self.dispatched:
            found.append("simulated with the heads of every request dispatched, as engines do")
        if self.router is not None:
            found.append(f"simulated behind {_BEHIND.get(self.router, self.router)}, as exports configure it")
        if self.too_short:
            found.append("runs too short to fill the seats: later requests may be slower")
        return found


_BEHIND = {  # other routers than that of their own name
    "sglang": "nginx, and SGLang's router for pairs",
    "llm-d": "llm-d's endpoint picker",
    "weighted-random": "a router that draws by weight",
    "fewest-requests": "Dynamo's front end (fewest requests)",
}


def _part_words(share: float) -> str:
    """Return ``1/8 of its replicas at 1/8 of the rate``, or per cent where the share is no such fraction."""
    parts = round(1.0 / share)
    words = f"1/{parts:,}" if parts > 1 and abs(parts * share - 1.0) <= ROUNDED else percent(share)
    return f"{words} of its replicas at {words} of the rate"


class SimulatedWords(NamedTuple):
    """What a simulation found: a word, what follows it in a sentence, and how the plan was simulated."""

    word: str
    style: str
    rest: str
    remarks: SimulationRemarks = SimulationRemarks(None, False, False)

    def text(self) -> Text:
        """Return the sentence, and each remark in a line of its own."""
        remarks = "".join(f"\n{line}" for line in self.remarks.lines())
        return Text.assemble(
            (self.word, self.style), self.rest, (remarks, "yellow" if self.remarks.too_short else "dim")
        )


def kept_words(
    rate_rps: float, latencies: Iterable[str], share: str, kept_rps: float | None, remarks: SimulationRemarks
) -> SimulatedWords:
    """Return words on a simulated plan that keeps its limits: latencies, the share of requests in time, and the highest
    rate that kept the limits if it is above the planned one.
    """
    beyond = "" if kept_rps is None or kept_rps <= rate_rps else f"; kept up to {digits(kept_rps, 4)}"
    rest = f" at {digits(rate_rps, 4)} requests/s: {', '.join(latencies)}; {share}{beyond}"
    return SimulatedWords("limits kept", "yellow" if remarks.too_short else "green", rest, remarks)


def missed_words(
    rate_rps: float, misses: Iterable[str], kept_rps: float | None, remarks: SimulationRemarks
) -> SimulatedWords:
    """Return words on a simulated plan that misses limits."""
    least = "no rate tried keeps them" if kept_rps is None else f"kept up to {digits(kept_rps, 4)}"
    rest = f" at {digits(rate_rps, 4)} requests/s: {', '.join(misses)}; {least}"
    return SimulatedWords("MISSED", "bold red", rest, remarks)


def first_rows(body: RenderableType, count: int, shown: int, noun: str) -> RenderableType:
    """Return the body, followed by a line that counts the rows not shown, if there are any."""
    rest = count - shown
    if rest <= 0:
        return body
    return Group(body, Text(f"… and {rest:,} more {noun}{'' if rest == 1 else 's'} (-o json has all)", style="dim"))


class Narrowing:
    """A grid without broken words. A narrow console gets headers of several lines, then fewer columns, and is told."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def fits(made: Table) -> bool:
            return Measurement.get(console, options.update(max_width=_ENDLESS), made).maximum <= options.max_width

        names = [head.lstrip("'<") for head in self._grid.columns]
        optional = [names.index(name) for name in self._grid.least if name in names]
        for count in range(len(optional) + 1):
            made = self._table(optional[:count])
            if not fits(made) and not self._grid.tight:
                for column in made.columns:
                    column.header = str(column.header).replace(" ", "\n")
            if fits(made):
                break
        yield made
        if count:
            left_out = ", ".join(names[number].replace("\n", " ") for number in sorted(optional[:count]))
            yield Text(f"not shown, for lack of width: {left_out} (-o json has all)", style="dim")

    def _table(self, without: Collection[int]) -> Table:
        kept = [number for number in range(len(self._grid.columns)) if number not in without]
        rows = ([row[number] for number in kept] for row in self._grid.rows)
        made = table(*(self._grid.columns[number] for number in kept), rows=rows, strong=self._grid.strong)
        if self._grid.tight:
            made.padding = (0, 1, 0, 0)
        for column in made.columns:
            column.no_wrap, column.vertical = True, "bottom"
        return made


class Unbroken:
    """Names side by side, separated, in lines that break after separators.

    A line breaks inside a name only if the name does not fit on a line.
    """

    def __init__(self, parts: Sequence[Text], separator: str) -> None:
        last = len(parts) - 1
        self._parts = [part + separator if number < last else part for number, part in enumerate(parts)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(overflow="fold")
        for part in self._parts:
            if line and line.cell_len + _width(part) > options.max_width:
                line.rstrip()
                yield line
                line = Text(overflow="fold")
            line.append_text(part)
        yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        least, most = max(map(_width, self._parts), default=0), sum(part.cell_len for part in self._parts)
        return Measurement(least, most).with_maximum(options.max_width)


def _width(part: Text) -> int:
    return len(part.plain.rstrip())
