"""A tool's report on the nodes of a fleet, before names of GPUs are looked up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from hetis.formats.errors import DocumentError, Problem
from hetis.formats.positions import Path, Text

MAX_GPUS_SAID = 1024  # limit per node; a larger number is a mistake
PARTS = "parts of GPUs (MIG), not whole GPUs"
DEFAULT_ZONE = "default"  # that of nodes for which the tool reports none
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGpus:
    """Equal GPUs of one node that a plan may use."""

    product: str  # the tool's name for them
    count: int  # number of GPUs
    memory_bytes: int | None = None  # memory of each. None: the tool does not report it.
    # Other words about the node that may distinguish boards of one name, such as Slurm's features
    hints: tuple[str, ...] = ()
    part: str = ""  # the profile of MIG slices, such as 1g.10gb, whose card the product is; empty: whole GPUs
    resource: str = ""  # by which pods request them in Kubernetes; empty: as any GPU of their vendor, or not reported
    reserved_bytes: int = 0  # memory of each that others hold


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNode:
    """A node and its free GPUs."""

    # name, zone: as the tool reports them
    name: str
    zone: str = DEFAULT_ZONE
    gpus: tuple[FoundGpus, ...] = ()  # usable GPUs, in the order of their indices
    left_out: tuple[str, ...] = ()  # a sentence for each group of unusable GPUs
    nvlinks: int | None = None  # NVLinks between every pair of GPUs; 0 if there are none; None if unknown
    bridged: bool = False  # whether only some pairs have NVLinks
    # The driver's index of each usable GPU, in the order of ``gpus``; empty if the tool does not report it
    indices: tuple[int, ...] = ()
    where: Problem  # the place in its file, for problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything that the files report."""

    nodes: tuple[FoundNode, ...]  # nodes with GPUs
    num_without_gpus: int = 0  # number of nodes without GPUs, which are only counted
    notes: tuple[str, ...] = ()  # what the tool cannot report, for the reader of the cluster file
    file: str = "cluster"  # the first of its files, for problems with all of them together


def inventory(
    nodes: Sequence[FoundNode], problems: Sequence[Problem], notes: Iterable[str] = (), *, file: str = "cluster"
) -> Inventory:
    """Return the nodes of a report, named ``file``; those without GPUs are only counted. Raises DocumentError."""
    if problems:
        raise DocumentError(problems)
    told = tuple(node for node in nodes if node.gpus or node.left_out)
    return Inventory(nodes=told, num_without_gpus=len(nodes) - len(told), notes=tuple(notes), file=file)


def zone_of(labels: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return the zone in the first of these labels that has one."""
    return next((zone for name in names if (zone := text(labels.get(name)))), DEFAULT_ZONE)


def grouped(gpus: Iterable[tuple[str, int | None, int]]) -> tuple[FoundGpus, ...]:
    """Return the products, memory, and memory that others hold of single GPUs, with equal neighbours merged."""
    return tuple(
        FoundGpus(product=product, count=len(list(alike)), memory_bytes=memory, reserved_bytes=reserved)
        for (product, memory, reserved), alike in groupby(gpus)
    )


def text(value: object) -> str:
    """Return a text unchanged, and an empty text for anything else."""
    return value if isinstance(value, str) else ""


def whole_number(value: object, path: Path, source: Text, problems: list[Problem]) -> int:
    """Return a number of GPUs, which tools write as text or as a number, or 0 if it is missing or wrong."""
    if value is None or value == "":
        return 0
    number = int(value) if isinstance(value, int | float) and value == value and abs(value) < 1e9 else -1
    if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) < 10:
        number = int(value)
    if isinstance(value, bool) or not 0 <= number <= MAX_GPUS_SAID:
        shown = repr(value)[:40]
        problems.append(source.problem(path, f"is {shown}, must be a number of GPUs from 0 to {MAX_GPUS_SAID}"))
        return 0
    return number


def counted(count: int, what: str = "GPU") -> str:
    """Return ``1 GPU`` or ``8 GPUs``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def parts_text(count: int, product: str) -> str:
    """Return the sentence about parts of GPUs, which no plan uses."""
    return f"{counted(count, 'device')} ({product}): {PARTS}"


def some_of(names: Iterable[str]) -> str:
    """Return the first of many names: ``a, b, c and 4 more``."""
    every: Sequence[str] = list(dict.fromkeys(names))
    rest = len(every) - _MOST_NAMED
    return ", ".join(name[:80] for name in every[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
