"""GPUs, models and workloads that hetis knows, each fact with its source.

The data are committed files made by ``python -m tools.catalogue``; they are read on first use.
Names are found in the spellings people use; a name that could mean two things is refused with the candidates.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hetis.formats.catalogue.names import TUNINGS, UnknownNameError, model_key, resolve_gpu, resolve_model, tunings_in
from hetis.formats.errors import all_nearest
from hetis.formats.layers import model_in_short
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec
from hetis.solver.workload import LengthBin, Workload

__all__ = ["GpuEntry", "ModelEntry", "UnknownNameError", "WorkloadEntry", "find_gpu", "find_model", "find_workload"]
__all__ += ["gpus", "models", "workloads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuEntry:
    """A GPU type with the sources of its figures."""

    gpu: GpuType
    tdp_w: float | None  # board power by the data sheet; no plan depends on it
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


def gpu_types() -> dict[str, GpuType]:
    """Return every GPU type of the catalogue by its name."""
    return {entry.gpu.name: entry.gpu for entry in gpus()}


@functools.lru_cache(maxsize=1024)  # a cluster file may spell a few types a million times
def _gpu_name(name: str) -> str:
    """Return the GPU that a name means, which may have the size of its memory behind it (``RTX 4090 24GB``)."""
    by_name = _gpus_by_name()
    try:
        return resolve_gpu(name, by_name)
    except UnknownNameError as error:
        short = re.fullmatch(r"(.+?)[ _-]+(\d{1,4}) ?gi?b?", name.strip(), re.IGNORECASE)
        if short is None or error.ambiguous:
            raise
        found = resolve_gpu(short[1], by_name)
        if round(by_name[found].gpu.memory_bytes / 2**30) != int(short[2]):
            raise
        return found


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
    Raises UnknownNameError if there is no such GPU (with the nearest name), or several (with all). ``name``: such as
    ``A100-SXM-80GB``, ``a100_80gb_sxm``, ``3090`` or ``NVIDIA L4``; ``also``: more names to suggest from (types that a
    cluster file defines).
    """
    by_name = _gpus_by_name()
    try:
        return by_name[_gpu_name(name)]
    except UnknownNameError:
        return by_name[resolve_gpu(name, by_name, also)]  # resolved once more, for better suggestions


def known_gpu(name: str) -> GpuType | None:
    """Return the GPU type that ``name`` means, or None if it means none, or could mean several."""
    try:
        return find_gpu(name).gpu
    except UnknownNameError:
        return None


def gpu_name(name: str) -> str:
    """Return the catalogue's name of a GPU type, or the text itself if it means none, or could mean several."""
    return name if (gpu := known_gpu(name)) is None else gpu.name


@functools.cache
def architecture_of(gpu: str, architecture: str) -> str:
    """Return the catalogue's name of a GPU's architecture, or one that it lacks unchanged. Case does not matter.

    That of RTX boards, which NVIDIA calls Blackwell as it does B200's, is ``RTX Blackwell``, with kernels and a compute
    capability of its own.
    """
    name = architecture.casefold()
    if name == "blackwell" and "RTX" in gpu.upper():
        return "RTX Blackwell"
    known = (entry.gpu.architecture for entry in gpus())
    return next((one for one in known if one.casefold() == name), architecture)


@functools.cache
def vendor_of(architecture: str) -> str:
    """Return the vendor of GPUs of an architecture; NVIDIA if the architecture is not known."""
    name = architecture.casefold()
    return next((entry.gpu.vendor for entry in gpus() if entry.gpu.architecture.casefold() == name), "NVIDIA")


def other_vendor(gpu: GpuType) -> str | None:
    """Return the vendor of a GPU's architecture if the GPU is said to be of another one that the catalogue has.

    GPUs of a vendor that the catalogue lacks have the architecture that is most like theirs.
    """
    vendors = {entry.gpu.vendor for entry in gpus()}
    its = next((entry.gpu.vendor for entry in gpus() if entry.gpu.architecture == gpu.architecture), None)
    return its if its != gpu.vendor and gpu.vendor in vendors else None


def vendor_named(name: str) -> str:
    """Return a vendor's name as the catalogue spells it, or unchanged if it has no GPUs of this vendor."""
    return next((entry.gpu.vendor for entry in gpus() if entry.gpu.vendor.casefold() == name.casefold()), name)


def find_model(name: str) -> ModelEntry:
    """Return the model that ``name`` means. Case does not matter; organisation and suffixes such as ``-hf`` are
    optional. Raises UnknownNameError, with the nearest name, if there is none, or with all if there are several.
    """
    by_name = {entry.model.name: entry for entry in models()}
    return by_name[resolve_model(name, by_name)]


@functools.lru_cache(maxsize=1024)  # a table may have a name in every row
def known_model(name: str) -> ModelSpec | None:
    """Return the model that ``name`` means, or None if it means none, or could mean several."""
    try:
        return find_model(name).model
    except UnknownNameError:
        return None


def checkpoint_of(name: str) -> str | None:
    """Return the checkpoint at Hugging Face that ``name`` means; None if it means no model of the catalogue.

    Tunings have the shape of a model in the catalogue and a name of their own: that of a tuning is launched, in the
    spelling in which it was given. Names without an organisation, and without the ending of the catalogue's, are short
    for the catalogue's.
    """
    model = known_model(name)
    if model is None or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None if model is None else name
    tuning = next((one for one in TUNINGS if model_key(one) == model_key(name)), None)
    if tuning is not None:
        return tuning
    owner, _, short = model.name.rpartition("/")
    if tunings_in(name) <= tunings_in(short):
        return model.name
    prefix = "Meta-" if short.startswith("Meta-") and not name.lower().startswith("meta") else ""
    return f"{owner}/{prefix}{name}"


def find_workload(name: str) -> WorkloadEntry:
    """Return the workload called ``name``. Case and ``-`` for ``_`` do not matter; the suffix ``_lengths`` is optional.
    Raises UnknownNameError, with the nearest name, if there is none.
    """
    wanted = name.lower().replace("-", "_")
    found = next((one for one in workload_names() if wanted in (one, one.removesuffix("_lengths"))), None)
    if found is None:
        raise UnknownNameError("workload", name, all_nearest(wanted, workload_names()))
    return _workload(found)


def _read(file: str) -> Any:
    return json.loads((resources.files("hetis.formats.catalogue") / "data" / file).read_text(encoding="utf-8"))


def _model(row: dict[str, Any]) -> ModelSpec:
    row.pop("attention")  # for readers
    return model_in_short(**row)


@functools.cache
def _workload(name: str) -> WorkloadEntry:
    row = _read(f"workloads/{name}.json")
    bins = tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=w) for p, o, w in row.pop("bins"))
    return WorkloadEntry(workload=Workload(name=name, bins=bins, rate_rps=row.pop("rate_rps")), **row)
