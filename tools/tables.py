"""Tables beside the pages: ``docs/data/NAME.csv``, and the excerpts of them that pages show.

    python -m tools.tables            writes every excerpt of every page again

A page states which part of a table it shows, and a new measurement rewrites both:

    <!-- data: placement; columns: name | value | gap; rows: ^(12|160) GPUs -->
    ...
    <!-- end data -->

Columns and rows (a regular expression on the first cell) may be left out: then all are shown. A test holds every
excerpt to its file. ``docs/data/made.json`` states at which commit, when and on which machine each was made.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DATA = DOCS / "data"
MADE = "made.json"

_EXCERPT = re.compile(r"<!-- data: (?P<wanted>[^\n]*?) -->\n(?P<text>.*?)<!-- end data -->", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d[\d,]*)?(\.\d+)?([eE][-+]?\d+)?%?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """The part of a table that a page shows."""

    table: str
    columns: tuple[str, ...]  # none: all
    rows: str  # a regular expression searched for in the first cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """When and where a table was made; ``machine`` is None for tables that have no measured times."""

    commit: str
    date: str
    machine: str | None

    def __str__(self) -> str:
        machine = "" if self.machine is None else f" on {self.machine}"
        return f"{self.when}{machine}"

    @property
    def when(self) -> str:
        return f"made {self.date} at {self.commit}"


def main() -> None:
    for page in pages():
        refresh(page)


def pages() -> list[Path]:
    """Return the README and every hand-written page."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def path_of(table: str) -> Path:
    return DATA / f"{table.replace(' ', '-')}.csv"


def write(table: str, header: Sequence[str], rows: Iterable[Sequence[object]], *, folder: Path = DATA) -> None:
    """Replace a table's file, and record when and where it was made."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {**makings(folder), path_of(table).stem: Making(commit=_commit(), date=str(date.today()), machine=machine())}
    text = json.dumps({name: asdict(making) for name, making in sorted(made.items())}, indent=1)
    (folder / MADE).write_text(f"{text}\n", encoding="utf-8")
    with (folder / path_of(table).name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([str(cell) for cell in row] for row in rows)


def read(table: str) -> list[dict[str, str]]:
    """Return the rows of a table by heading.

    Raises:
        FileNotFoundError: there is no such table.
    """
    with path_of(table).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def makings(folder: Path = DATA) -> dict[str, Making]:
    """Return when and where each table was made, by the name of its file."""
    path = folder / MADE
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: Making(**row) for name, row in rows.items()}


def machine() -> str:
    """Return a phrase about this machine and its load, which give measured times their meaning."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (model := re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8"))):
        processor = model[1]
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} cores of {processor}, Python {platform.python_version()}{load}"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "an unknown commit"


def refresh(page: Path) -> None:
    """Update the page's excerpts to the present tables."""
    text = page.read_text(encoding="utf-8")
    new = refreshed(text, from_root=page.parent == ROOT)
    if new != text:
        page.write_text(new, encoding="utf-8")


def refreshed(text: str, *, from_root: bool = False) -> str:
    """Return the text of a page with its excerpts as they should be."""
    made = makings()

    def one(found: re.Match[str]) -> str:
        wanted = parse(found["wanted"])
        link = path_of(wanted.table).relative_to(ROOT if from_root else DOCS).as_posix()
        excerpt = markdown(wanted, read(wanted.table), link, made[path_of(wanted.table).stem])
        return f"<!-- data: {found['wanted']} -->\n{excerpt}<!-- end data -->"

    return _EXCERPT.sub(one, text)


def excerpts(text: str) -> Iterator[Excerpt]:
    """Yield the excerpts of tables on a page."""
    return (parse(found["wanted"]) for found in _EXCERPT.finditer(text))


def parse(wanted: str) -> Excerpt:
    """Parse what follows ``data:``."""
    table, _, rest = wanted.partition("; ")
    columns = re.search(r"(?:^|; )columns: (.*?)(?:; rows: |$)", rest)
    rows = re.search(r"(?:^|; )rows: (.*)$", rest)
    names = tuple(name.strip() for name in columns[1].split(" | ")) if columns else ()
    return Excerpt(table=table, columns=names, rows=rows[1] if rows else "")


def markdown(wanted: Excerpt, table: Sequence[Mapping[str, str]], link: str, made: Making) -> str:
    """Return the excerpt as Markdown, with a link to the whole table and how it was made.

    Raises:
        KeyError: the table lacks a column.
        ValueError: no row matches the excerpt's.
    """
    columns = wanted.columns or tuple(table[0])
    first = next(iter(table[0]))
    shown = [[row[name] for name in columns] for row in table if re.search(wanted.rows, row[first])]
    if not shown:
        raise ValueError(f"{wanted.table} has no row like {wanted.rows!r}")
    numeric = [all(_NUMBER.match(line[place]) or line[place] == "-" for line in shown) for place in range(len(columns))]
    lines = [columns, ["---:" if is_number else "---" for is_number in numeric], *shown]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    whole = len(shown) == len(table) and len(columns) == len(table[0])
    says = f"[The table as a file]({link})" if whole else f"[All {len(table)} rows and {len(table[0])} columns]({link})"
    return f"{text}\n\n{says}, {made.when}\n"


if __name__ == "__main__":
    main()
