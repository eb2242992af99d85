"""The parts of a report as values, with every number as text and every length as a share.

A block knows nothing of plans, nor of where it is shown: `hetis.planner.report.tables` draws grids and sentences on a
terminal, `hetis.planner.report.page` draws all blocks on a page. Lengths are shares of the width in which they are
drawn, and colours are numbers of the page's palette, so that templates need no computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
Cell: TypeAlias = Any  # text, or a styled text of rich, whose style a page does not show
Column = tuple[str, Callable[[T], Cell]]  # a header as in `Grid`, and what its cells show of an item

COLORS = 8  # colours in the palette; further items reuse them
PLAIN = COLORS  # the colour of parts that belong to no item: idle, unusable


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Base of all blocks. The page draws a block by the macro named ``draw_`` and its class name in lower case."""

    title: str = ""
    intro: str = ""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


class Tile(NamedTuple):
    """A key figure. ``tone`` is ``good``, ``bad`` or empty."""

    label: str
    value: str
    unit: str = ""
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(Block):
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid(Block):
    """A table.

    Attributes:
        columns: the headers. That of a column of text is preceded by a quote; other columns contain numbers.
        rows: the cells of each row.
        note: a text below the table.
        strong: the most important row.
        bad: rows with problems.
        folded: on a page, it opens on a click.
        least: the columns that a narrow terminal may leave out, the least important one first.
        tight: on a terminal, its columns stand close, and headers are broken only where they have line breaks.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    strong: int | None = None
    bad: Sequence[int] = ()
    folded: bool = False
    least: Sequence[str] = ()
    tight: bool = False


def grid_of(items: Iterable[T], *columns: Column[T] | None, **settings: Any) -> Grid:
    """Return a table with a row for each item, without the columns that are None. ``settings``: its other fields."""
    shown = [column for column in columns if column is not None]
    rows = [[cell(item) for _, cell in shown] for item in items]
    return Grid(columns=tuple(head for head, _ in shown), rows=rows, **settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentences(Block):
    """Lines of text under a title; ``terms`` are pairs of a line's subject and the line."""

    lines: Sequence[str] = ()
    terms: Sequence[tuple[str, str]] = ()
    folded: bool = False


class Segment(NamedTuple):
    name: str
    share: float
    color: int


class Bar(NamedTuple):
    """A bar with its label and text.

    Attributes:
        label: what it is.
        text: its length in words.
        share: its length.
        begin: where it begins.
        color: its colour in a `Waterfall`.
        band: what is drawn across its end, from and to.
        mark: where a line for comparison is.
        tone: ``bad`` or empty.
        strong: whether it is the most important one.
        segments: its parts, in a `Stack`.
    """

    label: str
    text: str
    share: float = 0.0
    begin: float = 0.0
    color: int = PLAIN
    band: tuple[float, float] | None = None
    mark: float | None = None
    tone: str = ""
    strong: bool = False
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Block):
    """Bars that start at zero, each on its own axis."""

    rows: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack(Block):
    """Bars of segments, with the same numbers in a table below for readers who cannot see the bars."""

    rows: Sequence[Bar]
    numbers: Grid

    def legend(self) -> Sequence[Segment]:
        """Return every name once, with its colour."""
        return list({s.name: s for row in self.rows for s in row.segments if s.share > 0}.values())


class Waterfall(NamedTuple):
    """A whole in steps: bars each of which begins where the previous one ended."""

    title: str
    note: str
    steps: Sequence[Bar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfalls(Block):
    """Step-by-step breakdowns of wholes, with all numbers in a table below."""

    falls: Sequence[Waterfall]
    numbers: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCell:
    """A GPU of a node, or ``span`` neighbours with the same use."""

    role: str  # ``stage``, ``worker`` or ``idle``, also of a GPU that another tenant holds
    color: int
    lines: tuple[str, ...]
    index: str = ""
    filled: float | None = None  # share of a bar below that is filled; None: no bar
    span: int = 1


class NodeCard(NamedTuple):
    name: str
    gpus: str
    cells: Sequence[GpuCell]


class ZoneMap(NamedTuple):
    """The nodes of a zone, or all nodes if the name is empty."""

    name: str
    nodes: Sequence[NodeCard]
    rest: str = ""  # description of the nodes that are not drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetMap(Block):
    zones: Sequence[ZoneMap]
    legend: Sequence[tuple[str, int]]
    idle: Sequence[tuple[str, str]] = ()
    note: str = "Solid: holds layers. Dashed: an attention worker. Dotted: idle."


class CurveBlock(NamedTuple):
    """A line in the coordinates of its chart. ``spread`` is the outline of the interval around the line.

    It is ``dashed`` if an earlier line of the chart has its colour.
    """

    name: str
    color: int
    dashed: bool
    path: str
    spread: str
    dots: Sequence[tuple[float, float]]


class Tick(NamedTuple):
    """A text at a position on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over axes, in units of the drawing."""

    title: str
    x_title: str
    y_title: str
    width: int
    height: int
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    curves: Sequence[CurveBlock]
    limits: Sequence[Tick] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts(Block):
    charts: Sequence[Chart]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksBlock(Block):
    links: Sequence[tuple[str, str]]


class Section(NamedTuple):
    """Blocks under a heading: a plan, or an introduction to all plans. ``anchor`` is its fragment in the URL."""

    anchor: str
    heading: str
    lead: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page. ``is_live``: its contents change, and it fetches updates from its source while it is open."""

    title: str
    sections: Sequence[Section]
    footer: str
    is_live: bool = False
