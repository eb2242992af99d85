"""Recognises which tool wrote a file, and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hetis.formats.discovery import kubernetes, node_tables, nvidia_smi, ray_nodes, slurm
from hetis.formats.discovery.found import Inventory, mapping
from hetis.formats.discovery.sources import Source
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.fields import API_VERSION
from hetis.formats.files import file_label, read_text
from hetis.formats.positions import Bounds, Text, parse_text

MAX_FILES = 10_000
# Enough for thousands of nodes with their pods, which take a minute and 2 GB.
_BOUNDS = Bounds(max_values=10_000_000, max_yaml_values=200_000)

_KNOWN = (
    "kubectl get nodes -o json, nvidia-smi -q -x, scontrol show nodes --json, ray list nodes --detail --format json, "
    "CSV with node,gpu,count"
)


def read_inventory(paths: Sequence[str], source: Source = Source.AUTO, *, with_busy: bool = False) -> Inventory:
    """Return the nodes that files of one tool describe (``-``: standard input).

    Args:
        paths: several for kubectl and nvidia-smi; one for the others.
        source: the tool that wrote them.
        with_busy: GPUs that are in use count as free.

    Raises:
        DocumentError: with all problems: files are unreadable, from an unknown tool, or from several tools; or the
            source reads no files (`Source.NVML`, `Source.AGENTS`).
    """
    if len(paths) > MAX_FILES or len(set(paths)) != len(paths):
        twice = next((path for path in paths if paths.count(path) > 1), None) if len(paths) <= MAX_FILES else None
        raise single_problem(twice or paths[0], "is given twice" if twice else f"and more than {MAX_FILES} files")
    texts, problems = list[tuple[str, str]](), list[Problem]()
    for path in paths:
        try:
            texts.append((file_label(path), read_text(path)))
        except DocumentError as error:
            problems += error.problems
    if problems:
        raise DocumentError(problems)
    files = [_File(label, text, source) for label, text in texts]
    first = files[0].tool
    for one in files:
        if one.tool is not first:
            message = f"is of {one.tool.value}, and {files[0].label} of {first.value}: one tool at a time"
            raise single_problem(one.label, message)
    if len(files) > 1 and first not in (Source.KUBECTL, Source.NVIDIA_SMI):
        raise single_problem(files[1].label, f"is one file too many: {first.value} describes a fleet in one")
    return replace(_read(files, texts, with_busy), file=files[0].label)


def _read(files: Sequence[_File], texts: Sequence[tuple[str, str]], with_busy: bool) -> Inventory:
    match files[0].tool:
        case Source.NVIDIA_SMI:
            return nvidia_smi.read_nvidia_smi(texts, with_busy=with_busy)
        case Source.KUBECTL:
            return kubernetes.read_kubernetes([one.parsed for one in files], with_busy=with_busy)
        case Source.SLURM:
            return slurm.read_slurm(*files[0].parsed, with_busy=with_busy)
        case Source.RAY:
            return ray_nodes.read_ray(*files[0].parsed)
        case Source.FILE:
            return node_tables.read_node_table(*reversed(texts[0]))
        case other:
            raise single_problem(files[0].label, f"is a file, and {other.value} reads none")


class _File:
    """A file, the tool that wrote it, and its data, parsed on first use."""

    def __init__(self, label: str, text: str, source: Source) -> None:
        self.label = label
        self._text = text
        self._parsed: tuple[Any, Text] | None = None
        self.tool = self._recognised() if source is Source.AUTO else source

    @property
    def parsed(self) -> tuple[Any, Text]:
        if self._parsed is None:
            self._parsed = parse_text(self._text, self.label, _BOUNDS)
        return self._parsed

    def _recognised(self) -> Source:
        """Return the tool that wrote the text, judging by its content.

        Raises:
            DocumentError: the tool is unknown.
        """
        begin = self._text.lstrip()[:200]
        if begin.startswith("<") or nvidia_smi.is_topology(self._text):
            return Source.NVIDIA_SMI
        if not begin.startswith(("{", "[")) and node_tables.is_node_table(self._text):
            return Source.FILE
        data, _ = self.parsed
        found = mapping(data)
        if ray_nodes.is_ray(data):
            return Source.RAY
        if isinstance(found.get("nodes"), list) and "kind" not in found:
            return Source.SLURM
        if kubernetes.is_list(data) or ("kind" in found and found.get("apiVersion") != API_VERSION):
            return Source.KUBECTL
        has = f"it has {', '.join(list(found)[:12])}" if found else f"it begins with {begin[:40]!r}"
        raise single_problem(self.label, f"is of no tool that is known: {has}; known: {_KNOWN}")
