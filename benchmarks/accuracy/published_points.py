"""Tables of what others measured: the rows in them, and which of them a benchmark could predict."""

from __future__ import annotations

import csv
import gzip
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from hetis.solver.errors import HetisError
from tools import tables

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "measured"  # not ours to ship


class NotPosedError(HetisError):
    """A row cannot be predicted; the message has the reason."""


def parser(module: str, description: str | None, points: Path) -> ArgumentParser:
    """Return a parser with the options that every benchmark has, and ``--points`` for another table."""
    result = rows.parser(module, description)
    result.add_argument("--points", type=Path, default=points, metavar="FILE", help=f"the table; {points.name}")
    return result


def asked_rows(arguments: Namespace, columns: Sequence[str]) -> list[dict[str, str]] | None:
    """Return the rows of the requested table; None if it is absent from a quick run, which must work anywhere.

    Raises:
        SystemExit: as `read_rows`.
    """
    path: Path = arguments.points
    if arguments.quick and not path.is_file():
        print(f"{path}: no such file; --points says where", file=sys.stderr)
        return None
    return read_rows(path, columns)


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a table, compressed or not.

    Raises:
        SystemExit: there is no such file, it is no such table, or one of ``columns`` is missing.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --points says where the measured rows are")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file, restval=""))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: {error}") from None
    missing = [name for name in columns if found and name not in found[0]]
    if missing or not found:
        raise SystemExit(f"{path}: {'no rows' if not found else f'no column {missing[0]}'}")
    return found


def coverage(name: str, count: int, skipped: Mapping[str, int]) -> Iterator[Row]:
    """Yield the number of predicted rows, called ``name``, and the numbers of those that were not, by reason."""
    yield {"coverage": name, "n": count, "reason": ""}
    for reason, number in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
        yield {"coverage": "skipped", "n": number, "reason": reason}


def print_coverage(covered: Sequence[Row], noun: str) -> None:
    """Print the rows of `coverage`."""
    for row in covered:
        print(f"{row['coverage']}: {row['n']:,} {noun}" + (f": {row['reason']}" if row["reason"] else ""))


def write_skipped(name: str, covered: Sequence[Row], noun: str) -> None:
    """Write the table of the rows that were not predicted."""
    skipped = [row for row in covered if row["coverage"] == "skipped"]
    tables.write(f"{name} skipped", [noun, "why not"], ([row["n"], row["reason"]] for row in skipped))
