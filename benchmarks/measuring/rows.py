"""Rows of a benchmark: an aligned table, JSON lines, or a file of ``docs/data`` and its page excerpts."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from hetis.planner.cli.searching import no_native_output
from tools import tables

Cell = str | int | float | None
Row = Mapping[str, Cell]


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="few and small cases: seconds, not minutes")
    result.add_argument("--only", metavar="TEXT", default="", help="only rows whose name contains TEXT")
    forms = result.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one JSON object per row, printed as soon as it is measured")
    forms.add_argument("--markdown", action="store_true", help="also write docs/data and what docs/ shows of it")
    return result


def add_rounds(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--rounds`` for benchmarks that repeat their cases in turn. The default is the benchmark's own number."""
    parser.add_argument("--rounds", type=_at_least_one, metavar="N", help=what)


def show(rows: Iterable[Row], arguments: argparse.Namespace, *, name: str) -> list[Row]:
    """Print the rows of benchmark ``name`` in the requested form, and return them."""
    shown, coming = [], iter(rows)
    while True:
        with no_native_output():  # a solver's output among the rows would break the JSON
            row = next(coming, None)
        if row is None:
            break
        shown.append(row)
        if arguments.json:
            print(json.dumps({key: _finite(value) for key, value in row.items()}), flush=True)
        else:
            print(f"  {row['name']}", file=sys.stderr, flush=True)  # a sign of life: some rows take a minute
    if not arguments.json:
        print(table(shown))
    if arguments.markdown:
        keep(name, shown)
    return shown


def keep(name: str, shown: Sequence[Row]) -> None:
    """Write the table's file and the excerpts on pages."""
    if not shown:
        raise SystemExit(f"{name}: no rows, so the table stays as it is")
    tables.write(name, _headings(shown[0]), ([_plain(key, value) for key, value in row.items()] for row in shown))
    tables.main()


def exit_if_crashed(shown: Sequence[Row]) -> None:
    """Exit with status 1 if a row reports a crash. Call it after everything is shown, as other rows are still good."""
    crashed = [str(row["name"]) for row in shown if row["status"] == "failed"]
    if crashed:
        raise SystemExit(f"crashed: {'; '.join(crashed)}")


def table(rows: Sequence[Row]) -> str:
    """Return aligned columns for a terminal."""
    if not rows:
        return "no rows"
    lines = [_headings(rows[0]), *([_text(key, value) for key, value in row.items()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def _finite(value: Cell) -> Cell:
    """Return None for infinity, which JSON cannot represent; a bound that was never found becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _headings(row: Row) -> list[str]:
    return [_UNIT.sub(lambda unit: f" ({unit[1].replace('mib', 'MiB')})", key).replace("_", " ") for key in row]


_UNIT = re.compile(r"_(s|mib)$")


def _text(key: str, value: Cell) -> str:
    value = _finite(value)
    if value is None:
        return "-"
    if isinstance(value, float):
        if key.endswith("gap"):
            return f"{value:.3%}"
        return f"{value:.3f}" if key == "seconds" or key.endswith("_s") else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else " ".join(value.split()).replace("|", "/")  # one line, one cell


def _plain(key: str, value: Cell) -> str:
    """Return a cell of a file: numbers without thousands separators."""
    return str(value) if isinstance(value, int) else _text(key, value)


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 1")
    return int(text)
