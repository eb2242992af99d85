"""Tables of published results for tests."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def table_of(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write rows, all with the columns of the first, and return the path."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
