"""GPUs, models and workloads that hetis knows, each fact with its source.

The data are committed files made by ``python -m tools.catalogue``; they are read when first asked for.
Names are found in the spellings people use; a name that could mean two things is refused with the candidates.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hetis.formats.catalogue import names
from hetis.formats.catalogue.names import UnknownNameError
from hetis.solver.cluster import GpuType
from hetis.solver.model import AttentionKind, IndexerShape, LinearShape, MlaShape, ModelSpec, MoeShape
from hetis.solver.workload import LengthBin, Workload

__all__ = [
    "GpuEntry",
    "ModelEntry",
    "UnknownNameError",
    "WorkloadEntry",
    "find_gpu",
    "find_model",
    "find_workload",
    "gpus",
    "models",
    "workloads",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuEntry:
    """A GPU type with the sources of its figures."""

    gpu: GpuType
    vendor: str
    tdp_w: float | None
    price_source: str | None
    spec_source: str
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model shape with its source. ``params_b`` is billions of parameters as the source computes them."""

    model: ModelSpec
    dtype: str
    params_b: float
    active_params_b: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadEntry:
    """A trace summarised as a joint histogram of prompt and output lengths, with its source."""

    workload: Workload
    num_requests: int
    arrivals: str
    source: str
    licence: str
    note: str


@functools.cache
def gpus() -> tuple[GpuEntry, ...]:
    """Return every GPU type of the catalogue, oldest first."""
    return tuple(GpuEntry(gpu=GpuType(**row.pop("gpu")), **row) for row in _read("gpus.json")["gpus"])


@functools.cache
def _gpus_by_name() -> dict[str, GpuEntry]:
    return {entry.gpu.name: entry for entry in gpus()}


@functools.lru_cache(maxsize=1024)  # a cluster file may spell a few types a million times
def _gpu_name(name: str) -> str:
    return names.resolve_gpu(name, _gpus_by_name())


@functools.cache
def models() -> tuple[ModelEntry, ...]:
    """Return every model of the catalogue."""
    return tuple(ModelEntry(model=_model(row.pop("model")), **row) for row in _read("models.json")["models"])


@functools.cache
def workload_names() -> tuple[str, ...]:
    """Return the names of the workloads, without reading their histograms."""
    return tuple(_read("workloads.json")["workloads"])


def workloads() -> tuple[WorkloadEntry, ...]:
    """Return every workload of the catalogue."""
    return tuple(_workload(name) for name in workload_names())


def find_gpu(name: str, *, also: Collection[str] = ()) -> GpuEntry:
    """Return the GPU type that ``name`` means.

    Case, separators and the order of parts do not matter, and parts may be omitted if the name stays unambiguous.

    Args:
        name: such as ``A100-SXM-80GB``, ``a100_80gb_sxm``, ``3090`` or ``NVIDIA L4``.
        also: more names to suggest from (types that a cluster file defines).

    Raises:
        UnknownNameError: no such GPU (with the nearest name), or several (with all of them).
    """
    by_name = _gpus_by_name()
    try:
        return by_name[_gpu_name(name)]
    except UnknownNameError:
        return by_name[names.resolve_gpu(name, by_name, also)]  # the same once more, with better suggestions


def find_model(name: str) -> ModelEntry:
    """Return the model that ``name`` means. Case does not matter; organisation and suffixes such as ``-hf`` are
    optional.

    Raises:
        UnknownNameError: no such model (with the nearest name), or several (with all of them).
    """
    by_name = {entry.model.name: entry for entry in models()}
    return by_name[names.resolve_model(name, by_name)]


def find_workload(name: str) -> WorkloadEntry:
    """Return the workload called ``name``. Case and ``-`` for ``_`` do not matter; the suffix ``_lengths`` is optional.

    Raises:
        UnknownNameError: no such workload, with the nearest name.
    """
    return _workload(names.resolve_workload(name, workload_names()))


def _read(file: str) -> Any:
    return json.loads((resources.files("hetis.formats.catalogue") / "data" / file).read_text(encoding="utf-8"))


_SHAPES = {"mla": MlaShape, "moe": MoeShape, "linear": LinearShape, "indexer": IndexerShape}


def _model(row: dict[str, Any]) -> ModelSpec:
    row["attention"] = AttentionKind(row["attention"])
    for name, shape in _SHAPES.items():
        if name in row:
            row[name] = shape(**row[name])
    return ModelSpec(**row)


@functools.cache
def _workload(name: str) -> WorkloadEntry:
    row = _read(f"workloads/{name}.json")
    bins = tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=w) for p, o, w in row.pop("bins"))
    return WorkloadEntry(workload=Workload(name=name, bins=bins, rate_rps=row.pop("rate_rps")), **row)
