"""Recognises which tool wrote a file, and reads it.

Tables that are kept by hand (CSV with ``node,gpu,count`` and optionally ``zone``) are read here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from hetis.formats.discovery import FleetSource, amd, kubernetes, nvidia
from hetis.formats.discovery.described import described_nodes, is_described
from hetis.formats.discovery.found import DEFAULT_ZONE, MAX_GPUS_SAID, FoundGpus, FoundNode, Inventory
from hetis.formats.discovery.ray import is_ray, is_ray_status, read_ray, read_ray_status
from hetis.formats.discovery.slurm import is_slurm_text, read_slurm, slurm_nodes
from hetis.formats.errors import DocumentError, Problem, attempt, single_problem
from hetis.formats.fields import API_VERSION, mapping
from hetis.formats.files import file_label, read_text
from hetis.formats.positions import Bounds, NotYamlError, Text, parse_text

MAX_FILES = 10_000
# Enough for thousands of nodes with their pods, which take a minute and 2 GB.
_BOUNDS = Bounds(max_values=10_000_000, max_yaml_values=200_000)

_IS_DATA = re.compile(r"[{\[]|---|- |\w+:")  # JSON or YAML, unlike what tools print for people
_KNOWN = (
    "kubectl get nodes -o json, kubectl describe nodes, "
    "nvidia-smi -q -x (also -q, -L, its table, and --query-gpu=name,memory.total --format=csv), "
    "npu-smi info, hl-smi, lspci, gpustat, dcgmi and xpu-smi discovery, vLLM's collect_env, "
    "amd-smi static, rocm-smi, also with --showproductname --showmeminfo vram --json, "
    "scontrol show nodes, also with --json, sinfo -N with GRES, ray list nodes --detail --format json, ray status, "
    "CSV with node,gpu,count"
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
    if len(files) > 1 and first not in _OF_HOSTS:
        raise single_problem(
            files[1].label, f"is one file too many: {first.value} describes the fleet in a single file"
        )
    return replace(_read(files, texts, with_busy), file=files[0].label)


_OF_HOSTS = (FleetSource.KUBECTL, FleetSource.NVIDIA_SMI, FleetSource.AMD_SMI)  # of several files


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
        case FleetSource.AMD_SMI:
            return amd.read_amd([one.parsed for one in files], with_busy=with_busy)
        case FleetSource.RAY if is_ray_status(texts[0][1]):
            return read_ray_status(*reversed(texts[0]))
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
        if cards := amd.cards_of_text(self._text):
            return cards, Text(file=self.label, text=None)
        if is_described(self._text):
            return described_nodes(self._text), Text(file=self.label, text=None)
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
        if is_ray_status(self._text):
            return FleetSource.RAY
        if is_described(self._text):
            return FleetSource.KUBECTL
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
        if amd.is_amd(data):
            return FleetSource.AMD_SMI
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
