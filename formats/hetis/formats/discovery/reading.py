"""Recognises which tool wrote a file, and reads it.

Slurm (``scontrol show nodes --json``), Ray (``ray list nodes --format json``, ``ray.nodes()``) and tables that are kept
by hand (CSV with ``node,gpu,count`` and optionally ``zone``) are read here. ``sinfo --json`` is not: its rows are
groups of nodes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from hetis.formats.discovery import FleetSource, kubernetes, nvidia
from hetis.formats.discovery.found import (
    DEFAULT_ZONE,
    MAX_GPUS_SAID,
    FoundGpus,
    FoundNode,
    Inventory,
    counted,
    inventory,
    parts_text,
    some_of,
    text,
    whole_number,
    zone_of,
)
from hetis.formats.errors import DocumentError, Problem, attempt, single_problem
from hetis.formats.fields import API_VERSION, entries, listed, mapping
from hetis.formats.files import file_label, read_text
from hetis.formats.positions import Bounds, NotYamlError, Text, parse_text

MAX_FILES = 10_000
# Enough for thousands of nodes with their pods, which take a minute and 2 GB.
_BOUNDS = Bounds(max_values=10_000_000, max_yaml_values=200_000)

_IS_DATA = re.compile(r"[{\[]|---|- |\w+:")  # JSON or YAML, unlike what tools print for people
_KNOWN = (
    "kubectl get nodes -o json, nvidia-smi -q -x (also -L, its table, and --query-gpu=name,memory.total --format=csv), "
    "scontrol show nodes, also with --json, ray list nodes --detail --format json, CSV with node,gpu,count"
)


def read_inventory(
    paths: Sequence[str], source: FleetSource = FleetSource.AUTO, *, with_busy: bool = False
) -> Inventory:
    """Return the nodes that files of one tool describe (``-``: standard input): several for kubectl and nvidia-smi, one
    for the others. Raises DocumentError with all problems: files are unreadable, from an unknown tool, or from several
    tools; or the source reads no files (`FleetSource.NVML`, `FleetSource.AGENTS`). With ``with_busy``, GPUs in use
    count as free.
    """
    if len(paths) > MAX_FILES or len(set(paths)) != len(paths):
        twice = next((path for path in paths if paths.count(path) > 1), None) if len(paths) <= MAX_FILES else None
        raise single_problem(twice or paths[0], "is given twice" if twice else f"and more than {MAX_FILES} files")
    problems: list[Problem] = []
    read = [(file_label(path), attempt(partial(read_text, path), problems)) for path in paths]
    if problems:
        raise DocumentError(problems)
    texts = [(label, content) for label, content in read if content is not None]
    files = [_File(label, text, source) for label, text in texts]
    first = files[0].tool
    for one in files:
        if one.tool is not first:
            message = f"is of {one.tool.value}, and {files[0].label} of {first.value}: one tool at a time"
            raise single_problem(one.label, message)
    if len(files) > 1 and first not in (FleetSource.KUBECTL, FleetSource.NVIDIA_SMI):
        raise single_problem(
            files[1].label, f"is one file too many: {first.value} describes the fleet in a single file"
        )
    return replace(_read(files, texts, with_busy), file=files[0].label)


def _read(files: Sequence[_File], texts: Sequence[tuple[str, str]], with_busy: bool) -> Inventory:
    match files[0].tool:
        case FleetSource.NVIDIA_SMI:
            return nvidia.read_nvidia_smi(texts, with_busy=with_busy)
        case FleetSource.KUBECTL:
            return kubernetes.read_kubernetes([one.parsed for one in files], with_busy=with_busy)
        case FleetSource.SLURM if is_slurm_text(texts[0][1]):
            label, written = texts[0]
            return read_slurm(slurm_nodes(written), Text(file=label, text=None), with_busy=with_busy)
        case FleetSource.SLURM:
            return read_slurm(*files[0].parsed, with_busy=with_busy)
        case FleetSource.RAY:
            return read_ray(*files[0].parsed)
        case FleetSource.FILE:
            return read_node_table(*reversed(texts[0]))
        case other:
            raise single_problem(files[0].label, f"is a file, but {other.value} does not read files")


class _File:
    """A file, the tool that wrote it, and its data, parsed on first use."""

    def __init__(self, label: str, text: str, source: FleetSource) -> None:
        self.label, self._text = label, text
        self.tool = self._recognised() if source is FleetSource.AUTO else source

    @cached_property
    def parsed(self) -> tuple[Any, Text]:
        return parse_text(self._text, self.label, _BOUNDS)

    def _recognised(self) -> FleetSource:
        """Return the tool that wrote the text, judging by its content. Raises DocumentError if the tool is unknown."""
        begin = self._text.lstrip()[:200]
        if begin.startswith("<") or nvidia.is_topology(self._text):
            return FleetSource.NVIDIA_SMI
        if nvidia.is_table(self._text):
            return FleetSource.NVIDIA_SMI
        if is_slurm_text(self._text):
            return FleetSource.SLURM
        if not begin.startswith(("{", "[")) and is_node_table(self._text):
            return FleetSource.FILE
        try:
            data, _ = self.parsed
        except NotYamlError:
            if _IS_DATA.match(begin):
                raise
            raise self._unknown(f"it begins with {begin[:40]!r}") from None
        found = mapping(data)
        if is_ray(data):
            return FleetSource.RAY
        if isinstance(found.get("nodes"), list) and "kind" not in found:
            return FleetSource.SLURM
        if kubernetes.is_list(data) or ("kind" in found and found.get("apiVersion") != API_VERSION):
            return FleetSource.KUBECTL
        raise self._unknown(f"it has {', '.join(list(found)[:12])}" if found else f"it begins with {begin[:40]!r}")

    def _unknown(self, what: str) -> DocumentError:
        return single_problem(self.label, f"is not the output of a known tool: {what}; known: {_KNOWN}")


# --- a table kept by hand

COLUMNS = ("node", "gpu", "count")
MAX_ROWS = 100_000


def is_node_table(text: str) -> bool:
    """Return whether a text begins with the header of this table."""
    return set(COLUMNS[:2]) <= set(_header(text))


def read_node_table(text: str, file: str) -> Inventory:
    """Return the nodes of a table, each with its rows as GPUs. Blank lines are skipped.

    Raises DocumentError with what is missing or wrong.
    """
    header = _header(text)
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        has, line = ", ".join(header[:12]), 1 + text[: len(text) - len(text.lstrip())].count("\n")
        raise single_problem(file, f"column {', '.join(missing)} is missing; the file has {has}", line=line)
    places = {column: header.index(column) for column in (*COLUMNS, "zone") if column in header}
    problems: list[Problem] = []
    nodes: dict[str, FoundNode] = {}
    reader = csv.reader(io.StringIO(text))
    try:
        rows = (row for row in reader if any(cell.strip() for cell in row))
        next(rows)
        for row in rows:
            if reader.line_num > MAX_ROWS:
                raise single_problem(file, f"has more than {MAX_ROWS} lines")
            cells = {name: row[place].strip() if place < len(row) else "" for name, place in places.items()}
            _add(nodes, cells, Problem(file=file, message="", line=reader.line_num), problems)
    except csv.Error as error:
        raise single_problem(file, f"is not CSV: {error}", line=reader.line_num) from None
    if problems:
        raise DocumentError(problems)
    return Inventory(nodes=tuple(node for node in nodes.values() if node.gpus), num_without_gpus=0)


def _header(text: str) -> list[str]:
    """Return the columns on the first line that is not blank."""
    return [column.strip().lower() for column in next(csv.reader([text.lstrip().partition("\n")[0][:10_000]]), [])]


def _add(nodes: dict[str, FoundNode], cells: dict[str, str], where: Problem, problems: list[Problem]) -> None:
    """Add the GPUs of a row to its node, or the row's problems to ``problems``."""
    wrong = [replace(where, path=column, message="is missing") for column in COLUMNS if not cells[column]]
    count = cells["count"]
    if count and not (count.isdecimal() and len(count) < 10 and 1 <= int(count) <= MAX_GPUS_SAID):
        wrong.append(replace(where, path="count", message=f"is {count[:40]!r}, must be 1 to {MAX_GPUS_SAID}"))
    node = nodes.get(cells["node"])
    zone = cells.get("zone") or (node.zone if node else DEFAULT_ZONE)
    if node is not None and zone != node.zone:
        message = f"is {zone[:40]!r}, but {node.name} is in {node.zone!r} above"
        wrong.append(replace(where, path="zone", message=message))
    problems += wrong
    if not wrong:
        gpus = FoundGpus(product=cells["gpu"], count=int(count))
        node = node or FoundNode(name=cells["node"], zone=zone, where=where)
        nodes[node.name] = replace(node, gpus=(*node.gpus, gpus))


# --- Ray

UNTYPED_OF_RAY = "GPU"
"""The product name of GPUs on a node that names no accelerator type."""

_RAY_TYPE = "accelerator_type:"
_RAY_ZONES = ("ray.io/availability-zone", "topology.kubernetes.io/zone")


def is_ray(data: Any) -> bool:
    """Return whether data is a list of Ray's nodes."""
    first = mapping(next(iter(listed(data)), None))
    return "resources_total" in first or "Resources" in first or ("node_ip" in first and "is_head_node" in first)


def read_ray(data: Any, source: Text) -> Inventory:
    """Return the nodes in the list. Raises DocumentError if it is no such list, or resources are missing or wrong."""
    if not is_ray(data):
        raise single_problem(source.file, "is not a list of nodes: use ray list nodes --detail --format json")
    problems: list[Problem] = []
    found = [_ray_node(mapping(node), i, source, problems) for i, node in enumerate(data)]
    notes = ["Ray does not report here which GPUs are in use: all GPUs of a live node count as free"]
    return inventory(found, problems, notes)


def _ray_node(node: Mapping[str, Any], index: int, source: Text, problems: list[Problem]) -> FoundNode:
    resources = node.get("resources_total", node.get("Resources"))
    labels = mapping(node.get("labels", node.get("Labels")))
    host = text(node.get("NodeManagerHostname"))
    name = host or text(node.get("node_name")) or text(node.get("NodeName")) or text(node.get("node_ip"))
    if not name:
        problems.append(source.problem((index,), "has no node_name and no NodeManagerHostname"))
    alive = node["state"] == "ALIVE" if "state" in node else node.get("Alive", node.get("alive")) is True
    if not isinstance(resources, dict) and alive:
        problems.append(source.problem((index,), "has no resources: ray list nodes --detail --format json has them"))
    count = whole_number(mapping(resources).get("GPU"), (index, "resources_total", "GPU"), source, problems)
    types = [key.removeprefix(_RAY_TYPE) for key in mapping(resources) if key.startswith(_RAY_TYPE)]
    types = types or [text(labels.get("ray.io/accelerator-type"))]
    hint = text(labels.get("ray.io/accelerator-type"))  # may be more specific: A100-80G instead of A100
    product, reason = types[0] or UNTYPED_OF_RAY, "" if alive else "not alive"
    if len(types) > 1:
        reason = reason or f"of several types ({some_of(types)}), and Ray does not report how many of each"
    where = source.problem((index,), "")
    zone = zone_of(labels, _RAY_ZONES)
    if not count or reason:
        left_out = (f"{counted(count)} ({some_of(types)}): {reason}",) if count else ()
        return FoundNode(name=name, zone=zone, left_out=left_out, where=where)
    return FoundNode(name=name, zone=zone, gpus=(FoundGpus(product=product, count=count, hints=(hint,)),), where=where)


# --- Slurm

UNTYPED = "gpu"
"""The product name of GPUs to which gres.conf gives no type."""

# States and flags in which nothing can start (schedmd.com/scontrol.html, "State").
_UNUSABLE = {
    *("DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "MAINT"),
    *("MAINTENANCE", "NOT_RESPONDING", "NO_RESPOND", "PERFCTRS", "POWERED_DOWN", "POWERING_DOWN", "POWER_DOWN"),
    *("REBOOT_ISSUED", "REBOOT_REQUESTED", "RESERVED", "UNKNOWN", "BLOCKED"),
}
_GRES = re.compile(r"gpu(?::([^:()]+))??(?::(\d{1,9}))?(?:\([^()]*\))?")
_MIG = re.compile(r"\d+g\.\d+gb|(?:^|_)\dg(?:_|$)", re.IGNORECASE)


def read_slurm(data: Any, source: Text, *, with_busy: bool = False) -> Inventory:
    """Return the nodes in the output. With ``with_busy``, GPUs of running jobs count as free. Raises DocumentError if
    it has no list of nodes, or has wrong counts.
    """
    nodes = mapping(data).get("nodes")
    if not isinstance(nodes, list):
        keys = ", ".join(list(mapping(data))[:12]) or "nothing"
        raise single_problem(source.file, f"has no list of nodes, but {keys}: scontrol show nodes --json")
    problems: list[Problem] = []
    found = [_slurm_node(node, ("nodes", i), source, problems, with_busy) for i, node in entries(nodes)]
    return inventory(found, problems, ["Slurm does not report the zone of a node"])


def is_slurm_text(written: str) -> bool:
    """Return whether a text is the output of ``scontrol show nodes`` without ``--json``."""
    return written.lstrip().startswith("NodeName=")


def slurm_nodes(written: str) -> dict[str, Any]:
    """Return the nodes of ``scontrol show nodes`` as ``--json`` has them.

    GPUs in use are in ``AllocTRES``, or by type in ``GresUsed``, which ``-d`` adds.
    """
    nodes = list[dict[str, Any]]()
    for record in re.split(r"(?m)^(?=NodeName=)", written.lstrip())[1 : MAX_ROWS + 1]:
        fields = dict(found.split("=", 1) for found in re.findall(r"(?:^|(?<=\s))[A-Za-z:/_]+=[^\s]*", record))
        of_jobs = re.findall(r"gres/gpu(?::([^,=]+))?=(\d+)", fields.get("AllocTRES", ""))
        typed = [f"gpu:{kind}:{count}" for kind, count in of_jobs if kind]
        used = typed or [f"gpu:{count}" for _, count in of_jobs]
        nodes.append(
            {
                "name": fields.get("NodeName"),
                "gres": fields.get("Gres", "").replace("(null)", ""),
                "gres_used": fields.get("GresUsed") or ",".join(used),
                "state": fields.get("State"),
                "features": fields.get("AvailableFeatures", "").replace("(null)", ""),
                "active_features": fields.get("ActiveFeatures", "").replace("(null)", ""),
                "reason": fields.get("Reason"),
            }
        )
    return {"nodes": nodes}


def _slurm_node(
    node: dict[str, Any], path: tuple[str | int, ...], source: Text, problems: list[Problem], with_busy: bool
) -> FoundNode:
    name = text(node.get("name")) or text(node.get("hostname"))
    if not name:
        problems.append(source.problem((*path, "name"), "is missing: every node needs a name"))
    had = dict(_gres(node, "gres", path, source, problems))
    used = {} if with_busy else dict(_gres(node, "gres_used", path, source, problems))
    gpus, left_out = list[FoundGpus](), list[str]()
    unusable = _unusable(node)
    hints = tuple(sorted({*_words(node.get("features")), *_words(node.get("active_features"))}))[:32]
    # GPUs of jobs that requested any type are counted without one; on a node with a single type it is clear which it
    # is.
    if UNTYPED in used and UNTYPED not in had and len(had) == 1:
        used[next(iter(had))] = used.get(next(iter(had)), 0) + used.pop(UNTYPED)
    if used.get(UNTYPED) and UNTYPED not in had and had:
        unusable = unusable or f"{used[UNTYPED]} are in use, but not reported by type"
    for product, count in had.items():
        busy = min(count, used.get(product, 0))
        if not count:
            continue
        if _MIG.search(product):
            left_out.append(parts_text(count, product))
            continue
        if busy:
            left_out.append(f"{counted(busy)} ({product}): in use by jobs")
        if count > busy and unusable:
            left_out.append(f"{counted(count - busy)} ({product}): {unusable}")
        elif count > busy:
            gpus.append(FoundGpus(product=product, count=count - busy, hints=hints))
    return FoundNode(name=name, gpus=tuple(gpus), left_out=tuple(left_out), where=source.problem(path, ""))


def _words(value: object) -> list[str]:
    """Return the features, which are a list now and were comma-separated text in earlier versions."""
    words = value.split(",") if isinstance(value, str) else [text(one) for one in listed(value)]
    return [word.strip()[:80] for word in words if word.strip()]


def _states(node: Mapping[str, Any]) -> set[str]:
    state = node.get("state")
    words = re.split(r"[+,\s]+", state) if isinstance(state, str) else [text(one) for one in listed(state)]
    return {word.strip("*~#!%$@^-").upper() for word in [*words, *map(text, listed(node.get("state_flags")))] if word}


def _unusable(node: Mapping[str, Any]) -> str:
    states = _states(node)
    wrong = sorted(states & _UNUSABLE)
    reason = " ".join(text(node.get("reason")).split())[:120]
    if wrong:
        return f"{some_of(wrong)}{f' ({reason})' if reason else ''}"
    return "ALLOCATED: none of its CPUs is free" if states & {"ALLOCATED", "ALLOC"} and "IDLE" not in states else ""


def _gres(
    node: Mapping[str, Any], which: str, path: tuple[str | int, ...], source: Text, problems: list[Problem]
) -> Iterator[tuple[str, int]]:
    """Yield type and count of all GPUs in ``gpu:a100:4(S:0-1),gpu:a40:2``, each type once."""
    counts: dict[str, int] = {}
    said = text(node.get(which))[:10_000].replace(":(null)", "")  # written for jobs that requested any type
    for one in re.split(r",(?![^()]*\))", said):
        if not one.strip().startswith("gpu"):
            continue
        found = _GRES.fullmatch(one.strip())
        if found is None:
            problems.append(source.problem((*path, which), f"is {one.strip()[:60]!r}, expected gpu:TYPE:COUNT"))
            continue
        kind, number = found[1] or UNTYPED, found[2] or ("1" if which == "gres" else "0")
        counts[kind] = counts.get(kind, 0) + whole_number(number, (*path, which), source, problems)
    yield from counts.items()
