"""A table of nodes that is kept by hand: CSV with ``node,gpu,count`` and optionally ``zone``."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from hetis.formats.discovery.found import MAX_GPUS_SAID, FoundGpus, FoundNode, Inventory
from hetis.formats.errors import DocumentError, Problem, single_problem

COLUMNS = ("node", "gpu", "count")
MAX_ROWS = 100_000


def is_node_table(text: str) -> bool:
    """Return whether a text begins with the header of this table."""
    return set(COLUMNS[:2]) <= set(_header(text))


def read_node_table(text: str, file: str) -> Inventory:
    """Return the nodes of a table. Rows of one node are its GPUs, in that order.

    Raises:
        DocumentError: a column is missing, or with every row that is not a node.
    """
    header = _header(text)
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        has = ", ".join(header[:12])
        raise single_problem(file, f"column {', '.join(missing)} is missing; the file has {has}", line=1)
    places = {column: header.index(column) for column in (*COLUMNS, "zone") if column in header}
    problems: list[Problem] = []
    nodes: dict[str, FoundNode] = {}
    reader = csv.reader(io.StringIO(text))
    try:
        next(reader)
        for row in reader:
            if reader.line_num > MAX_ROWS:
                raise single_problem(file, f"has more than {MAX_ROWS} lines")
            if any(cell.strip() for cell in row):
                cells = {name: row[place].strip() if place < len(row) else "" for name, place in places.items()}
                _add(nodes, cells, Problem(file=file, message="", line=reader.line_num), problems)
    except csv.Error as error:
        raise single_problem(file, f"is not CSV: {error}", line=reader.line_num) from None
    if problems:
        raise DocumentError(problems)
    return Inventory(nodes=tuple(node for node in nodes.values() if node.gpus), num_without_gpus=0)


def _header(text: str) -> list[str]:
    return [column.strip().lower() for column in next(csv.reader([text.lstrip().partition("\n")[0][:10_000]]), [])]


def _add(nodes: dict[str, FoundNode], cells: dict[str, str], where: Problem, problems: list[Problem]) -> None:
    """Add the GPUs of a row to its node, or the row's problems to ``problems``."""
    wrong = [
        replace(where, path=column, message="is missing") for column in ("node", "gpu", "count") if not cells[column]
    ]
    count = cells["count"]
    if count and not (count.isdecimal() and len(count) < 10 and 1 <= int(count) <= MAX_GPUS_SAID):
        wrong.append(replace(where, path="count", message=f"is {count[:40]!r}, must be 1 to {MAX_GPUS_SAID}"))
    node = nodes.get(cells["node"])
    zone = cells.get("zone") or (node.zone if node else "default")
    if node is not None and zone != node.zone:
        wrong.append(
            replace(where, path="zone", message=f"is {zone[:40]!r}, but {node.name} is in {node.zone!r} above")
        )
    problems += wrong
    if not wrong:
        gpus = FoundGpus(product=cells["gpu"], count=int(count))
        node = node or FoundNode(name=cells["node"], zone=zone, where=where)
        nodes[node.name] = replace(node, gpus=(*node.gpus, gpus))
