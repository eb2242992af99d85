"""The blocks of a page for the template, with every number as text and every length as a share; and the page itself.

A block knows nothing of plans. Lengths are shares of the width in which they are drawn, and colours are numbers of the
palette in `page.css`, so the template needs no computation. A page is one file of HTML, including style and script,
with nothing to fetch.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from jinja2 import Template

T = TypeVar("T")

COLORS = 8  # colours in the palette; further items reuse them
PLAIN = COLORS  # the colour of parts that belong to no item: idle, unusable


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Base of all blocks. The template draws a block by the macro named ``draw_`` and its class name in lower case."""

    title: str
    intro: str = ""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A key figure. ``tone`` is ``good``, ``bad`` or empty."""

    label: str
    value: str
    unit: str = ""
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(Block):
    title: str = ""
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid(Block):
    """A table. ``strong`` is the most important row, ``bad`` rows have problems; if ``folded``, it opens on a click."""

    columns: tuple[str, ...]  # column headers; those of text columns are preceded by a quote
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    strong: int | None = None
    bad: tuple[int, ...] = ()
    folded: bool = False


def grid_of(items: Iterable[T], *columns: tuple[str, Callable[[T], str]], **settings: Any) -> Grid:
    """Return a table with a row for each item: columns are headers, and what their cells show of an item.

    ``settings``: the other fields of the table.
    """
    rows = tuple(tuple(cell(item) for _, cell in columns) for item in items)
    return Grid(columns=tuple(head for head, _ in columns), rows=rows, **settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentences(Block):
    """Lines of text under a title; ``terms`` are pairs of a line's subject and the line."""

    lines: tuple[str, ...] = ()
    terms: tuple[tuple[str, str], ...] = ()
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRow:
    """A bar of length ``share``; ``band`` is drawn across its end, ``mark`` is a line for comparison."""

    label: str
    text: str
    share: float
    band: tuple[float, float] | None = None
    mark: float | None = None
    tone: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Block):
    """Bars that start at zero, each on its own axis."""

    rows: tuple[ScaleRow, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    name: str
    share: float
    color: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackRow:
    label: str
    text: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack(Block):
    """Bars of segments, with the same numbers in a table below for readers who cannot see the bars."""

    rows: tuple[StackRow, ...]
    numbers: Grid

    def legend(self) -> Sequence[Segment]:
        """Return every name once, with its colour."""
        return list({s.name: s for row in self.rows for s in row.segments if s.share > 0}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeStep:
    """A bar that starts where the previous one ended."""

    label: str
    text: str
    begin: float
    share: float
    color: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    title: str
    note: str
    steps: tuple[ChangeStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfalls(Block):
    """Step-by-step breakdowns of wholes, with all numbers in a table below."""

    falls: tuple[Waterfall, ...]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCard:
    name: str
    gpus: str
    cells: tuple[GpuCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneMap:
    """The nodes of a zone, or all nodes if the name is empty."""

    name: str
    nodes: tuple[NodeCard, ...]
    rest: str = ""  # description of the nodes that are not drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetMap(Block):
    zones: tuple[ZoneMap, ...]
    legend: tuple[tuple[str, int], ...]
    idle: tuple[tuple[str, str], ...] = ()
    note: str = "Solid: holds layers. Dashed: an attention worker. Dotted: idle."


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveBlock:
    """A line in the coordinates of its chart. ``spread`` is the outline of the interval around the line.

    It is ``dashed`` if an earlier line of the chart has its colour.
    """

    name: str
    color: int
    dashed: bool = False
    path: str
    spread: str = ""
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
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
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[CurveBlock, ...]
    limits: tuple[Tick, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts(Block):
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """A small chart of one quantity over time, in units of its drawing; ``area`` is the area below the line."""

    label: str
    text: str
    color: int
    line: str
    area: str
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips(Block):
    """Strips on a common time axis, with a limit and some moments drawn across all of them."""

    rows: tuple[Strip, ...]
    width: int
    height: int
    ticks: tuple[Tick, ...]
    limit: float | None = None
    moments: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksBlock(Block):
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Blocks under a heading: a plan, or an introduction to all plans. ``anchor`` is its fragment in the URL."""

    anchor: str
    heading: str
    lead: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page. ``is_live``: its contents change, and it fetches updates from its source while it is open."""

    title: str
    sections: tuple[Section, ...]
    footer: str
    is_live: bool = False


PACKAGE = "hetis.planner.report.page"


def render_page(page: Page) -> str:
    """Return the whole file. Raises ModuleNotFoundError if jinja2 is not installed."""
    return _template().render(page=page, css=_text("page.css"), script=_script(page.is_live))


def live_script_policy() -> str:
    """Return the script source for a live page's content security policy: the page's script and no other."""
    digest = sha256(_script(True).encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_text("page.html.j2"))


def _script(is_live: bool) -> str:
    return _text("page.js") + (_text("live.js") if is_live else "")


@cache
def _text(name: str) -> str:
    return files(PACKAGE).joinpath(name).read_text(encoding="utf-8")
