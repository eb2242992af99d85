"""GPUs, models and workloads that hetis knows, each fact with its source.

The data are committed files made by ``python -m tools.catalogue``; they are read on first use.
Names are found in the spellings people use; a name that could mean two things is refused with the candidates.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hetis.formats.errors import all_nearest, did_you_mean_one_of
from hetis.formats.layers import model_in_short
from hetis.solver.cluster import GpuType
from hetis.solver.errors import HetisError
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
    tuning = next((one for one in _TUNINGS if _model_key(one) == _model_key(name)), None)
    if tuning is not None:
        return tuning
    owner, _, short = model.name.rpartition("/")
    if _tunings_in(name) <= _tunings_in(short):
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


class UnknownNameError(HetisError):
    """A ``name`` is not in the catalogue (``candidates`` are near it) or ``ambiguous`` (they are what it may mean)."""

    def __init__(self, what: str, name: str, candidates: Iterable[str], *, ambiguous: bool = False) -> None:
        self.name, self.candidates, self.ambiguous = name, tuple(candidates), ambiguous
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        hint = f": ambiguous, one of {', '.join(self.candidates)}" if ambiguous else ""
        if self.candidates and not ambiguous:
            hint = did_you_mean_one_of(self.candidates)
        super().__init__(f"unknown {what} {shown!r}{hint}")


# Words of vendors and drivers (`nvidia-smi` says "NVIDIA GeForce RTX 3090") that do not distinguish boards.
_IGNORED = {"nvidia", "geforce", "tesla", "amd", "instinct", "intel", "habana", "generation", "oam"}
_IGNORED |= {"blackwell", "edition", "huawei", "google", "radeon", "jetson"}
# Parts that several boards share: on their own they name nothing.
_SHARED = re.compile(r"\d+gb|pcie|sxm|nvl|per|gpu|die|rtx|rx|quadro|pro|ai|server|ada|arc|ascend|tpu")
# Names that `nvidia-smi` and `rocm-smi` give to boards whose catalogue name has other parts.
_GPU_ALIASES = {
    "h100-80gb-hbm3": "H100-SXM-80GB",
    "h200": "H200-SXM-141GB",  # the driver's whole name for it; the other board is "H200 NVL"
    "b300-sxm-ac": "B300-SXM-288GB",  # air-cooled
    "rtx-pro-6000-blackwell-server-edition": "RTX-PRO-6000-Server-96GB",
    "r-arc-tm-pro-b60-graphics": "Arc-Pro-B60-24GB",
    "gh200-480gb": "GH200-96GB",  # 480 GB is the CPU's memory
    "h100-64gb-hbm2": "H100-SXM-64GB",
    "gh200-144gb-hbm3e": "GH200-144GB",
    "h800": "H800-SXM-80GB",  # the driver's whole name for it
    "a800": "A800-SXM-80GB",
    "rtx-pro-6000-max-q-workstation": "RTX-PRO-6000-MaxQ-96GB",
    "a16": "A16-per-GPU",
    "rtx-6000-ada-generation": "RTX-6000-Ada",
    "gaudi-2": "Gaudi2-96GB",
    "gaudi-3": "Gaudi3-128GB",
    "jetson-thor": "Thor",
    "agx-thor": "Thor",
    "7900-xtx": "RX-7900-XTX",
    "r9700": "Radeon-AI-PRO-R9700",
    "mi50-mi60": "MI50-32GB",
    **{f"ascend-910b{number}": "Ascend-910B-64GB" for number in ("", 1, 2, 3)},
    **{f"ascend910b{number}": "Ascend-910B-64GB" for number in ("", 1, 2, 3)},
    "ascend910b4": "Ascend-910B4-32GB",
    **dict.fromkeys(("ascend-910c", "ascend910c", "ascend910-9392", "ascend910-9382"), "Ascend-910C-per-die"),
    **dict.fromkeys(("tpu-v5-lite", "tpu-v5-lite-podslice", "tpu-v5-lite-device", "tpu-v5litepod"), "TPU-v5e"),
    **dict.fromkeys(("tpu-v6-lite", "tpu-v6e-slice", "tpu-v6e-device", "trillium"), "TPU-v6e"),
}

# Boards that nobody means who does not say so, with their memory.
_RARE = {"A100-SXM-64GB", "H100-SXM-64GB", "H100-SXM-96GB", "GH200-144GB", "RTX-2080Ti-22GB", "RTX-4090-48GB"}
_RARE |= {"RTX-3080-20GB"}

# Checkpoints by the model of the same shape from which they were trained further.
_TUNINGS = {
    "deepseek-ai/DeepSeek-R1": "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-R1-0528": "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3-0324": "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3.1": "deepseek-ai/DeepSeek-V3",
    "zai-org/GLM-5.1": "zai-org/GLM-5",
}
_MODEL_ALIASES = {
    "bloom-176b": "bigscience/bloom",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "llama-33b": "huggyllama/llama-30b",
    **_TUNINGS,
}
# Suffixes that change the weights but not the shape.
_MODEL_ENDINGS = re.compile(r"[-_](hf|instruct|chat|it|base|v0\.1|2501)$")


def resolve_gpu(name: str, known: Collection[str], also: Collection[str] = ()) -> str:
    """Return the GPU of ``known`` that ``name`` means; see `hetis.formats.catalogue.find_gpu`."""
    wanted = _gpu_parts(name)
    for alias, target in _GPU_ALIASES.items():
        if sorted(_gpu_parts(alias)) == sorted(wanted):
            return target
    compact = "".join(wanted)
    whole, partial = [], []
    for candidate in known:
        parts = _gpu_parts(candidate)
        used = _parts_used(compact, parts)
        if len(used) == len(parts):
            whole.append(candidate)
        elif candidate not in _RARE and any(not _SHARED.fullmatch(part) for part in used):
            partial.append(candidate)
    found = whole or partial
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownNameError("GPU", name, found, ambiguous=True)
    names = [*also, *(one for one in known if one not in _RARE)]
    # Without the vendor's words, too: they make a short name unlike every other.
    nearest = all_nearest(name, names) or all_nearest("-".join(wanted), names)
    raise UnknownNameError("GPU", name, [one for one in nearest if one in also or not _is_another_card(wanted, one)])


def _is_another_card(wanted: tuple[str, ...], candidate: str) -> bool:
    """Return whether a name has the number of another card than a similar one: an RTX 3050 is no slip of RTX-3090, nor
    an M40 of P40.

    A letter O counts as a zero, and a number may be cut short. Letters behind it may be slips (``L40X``, ``80GX``).
    """
    own = _gpu_parts(candidate)
    parts = [part for part in wanted if not _SHARED.fullmatch(part)]

    def has(letters: str, number: str) -> bool:
        same = (each for each in _numbers(own) if each[1] == number or (len(number) > 1 and each[1].startswith(number)))
        return any(letters in ("", theirs) for theirs, _ in same)

    return any(part in _VARIANTS and part not in own for part in parts) or not all(has(*one) for one in _numbers(parts))


_VARIANTS = {"xt", "xtx", "gre", "ti", "super", "d"}  # of a number, each another card


def _numbers(parts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the numbers in parts, each with the letters in front of it."""
    spelled = (re.sub(r"(?<=\d)o|o(?=\d)", "0", part) for part in parts)
    found = (re.findall(r"([a-z]*)(\d+)", part) for part in spelled)
    return [("" if _SHARED.fullmatch(letters) else letters, number) for one in found for letters, number in one]


@functools.lru_cache(maxsize=1024)
def _gpu_parts(name: str) -> tuple[str, ...]:
    """Return lower-case parts in a common spelling: ``SXM4`` is ``sxm``, ``80G`` and ``80GiB`` are ``80gb``."""
    parts = [part for part in re.split(r"[^a-z0-9]+", name.lower()) if part and part not in _IGNORED]
    parts = [re.sub(r"^(sxm\d|nvlink)$", "sxm", re.sub(r"^(\d+)g(i?b)?$", r"\1gb", part)) for part in parts]
    joined: list[str] = []
    for part in parts:  # "80 GB" is one part
        if part in ("gb", "gib", "g") and joined and joined[-1].isdigit():
            joined[-1] += "gb"
        else:
            joined.append(part)
    return tuple(joined)


def _parts_used(compact: str, parts: tuple[str, ...]) -> list[str]:
    """Return the parts of which ``compact`` is made, in any order, or none if anything is left over."""
    if not compact:
        return []
    for index, part in enumerate(parts):
        if compact.startswith(part):
            rest = parts[:index] + parts[index + 1 :]
            if compact == part:
                return [part]
            used = _parts_used(compact[len(part) :], rest)
            if used:
                return [part, *used]
    return []


def resolve_model(name: str, known: Collection[str]) -> str:
    """Return the model of ``known`` that ``name`` means; see `hetis.formats.catalogue.find_model`."""
    exact = [candidate for candidate in known if candidate.lower() == name.lower()]
    if exact:
        return exact[0]
    organisation, _, _ = name.lower().rpartition("/")
    key = _model_key(name)
    for alias, target in _MODEL_ALIASES.items():
        if _model_key(alias) == key and organisation in ("", target.lower().partition("/")[0]):
            return target
    same_organisation = [c for c in known if organisation in ("", c.lower().partition("/")[0])]
    found = [candidate for candidate in same_organisation if _model_key(candidate) == key]
    if len(found) == 1:
        return found[0]
    words = set(_words(name))
    found = found or [c for c in same_organisation if words and words <= set(_words(c))]
    if len(found) > 1:
        raise UnknownNameError("model", name, found, ambiguous=True)
    by_key = dict[str, str]()
    for candidate in known:
        by_key.setdefault(_model_key(candidate), candidate)
    near = found or [by_key[near] for near in all_nearest(key, by_key)]
    raise UnknownNameError("model", name, near[:1])


def _model_key(name: str) -> str:
    """Return what spellings share: ``llama270b`` for ``meta-llama/Llama-2-70b-hf`` and ``Llama2-70B``."""
    short = name.lower().rpartition("/")[2].removeprefix("meta-").removeprefix("meta_")
    while (cut := _MODEL_ENDINGS.sub("", short)) != short:
        short = cut
    return re.sub(r"[^a-z0-9]+", "", short)


def _tunings_in(name: str) -> frozenset[str]:
    """Return the endings of a model's name that tell tunings apart."""
    found, short = set[str](), name.lower()
    while (ending := _MODEL_ENDINGS.search(short)) is not None:
        found.add(ending[1])
        short = short[: ending.start()]
    return frozenset(found & {"instruct", "chat", "it", "base"})


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9.]+", name.lower().rpartition("/")[2]) if word]
