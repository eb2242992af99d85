"""Resolves spellings to catalogue names."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable

from hetis.formats.errors import all_nearest, did_you_mean_one_of, nearest
from hetis.solver.errors import HetisError


class UnknownNameError(HetisError):
    """A name is not in the catalogue, or is ambiguous.

    Attributes:
        name: the name that was looked up.
        candidates: the names it could mean or, if it means none, the nearest ones, if any.
        ambiguous: it could mean several things.
    """

    def __init__(self, what: str, name: str, candidates: Iterable[str], *, ambiguous: bool = False) -> None:
        self.name, self.candidates, self.ambiguous = name, tuple(candidates), ambiguous
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        hint = f": ambiguous, one of {', '.join(self.candidates)}" if ambiguous else ""
        if self.candidates and not ambiguous:
            hint = did_you_mean_one_of(self.candidates)
        super().__init__(f"unknown {what} {shown!r}{hint}")


# Words of vendors and drivers (`nvidia-smi` says "NVIDIA GeForce RTX 3090") that distinguish no two boards.
_IGNORED = {"nvidia", "geforce", "tesla", "amd", "instinct", "intel", "habana", "generation"}
# Parts that several boards share: on their own they name nothing.
_SHARED = re.compile(r"\d+gb|pcie|sxm|nvl|per|gpu|rtx|quadro|pro|server|ada|arc")
# Names that `nvidia-smi` and `rocm-smi` give to boards whose catalogue name has other parts.
_GPU_ALIASES = {
    "h100-80gb-hbm3": "H100-SXM-80GB",
    "h200": "H200-SXM-141GB",  # the driver's whole name for it; the other board is "H200 NVL"
    "b300-sxm-ac": "B300-SXM-288GB",  # air-cooled
    "rtx-pro-6000-blackwell-server-edition": "RTX-PRO-6000-Server-96GB",
    "r-arc-tm-pro-b60-graphics": "Arc-Pro-B60-24GB",
    "mi300x-oam": "MI300X-192GB",
    "gh200-480gb": "GH200-96GB",  # 480 GB is the CPU's memory
    "a16": "A16-per-GPU",
    "rtx-6000-ada-generation": "RTX-6000-Ada",
    "gaudi-2": "Gaudi2-96GB",
    "gaudi-3": "Gaudi3-128GB",
}

_MODEL_ALIASES = {
    "bloom-176b": "bigscience/bloom",
    "deepseek-r1": "deepseek-ai/DeepSeek-V3",  # same shape, trained further
    "deepseek-v3-0324": "deepseek-ai/DeepSeek-V3",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "llama-33b": "huggyllama/llama-30b",
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
        elif any(not _SHARED.fullmatch(part) for part in used):
            partial.append(candidate)
    found = whole or partial
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownNameError("GPU", name, found, ambiguous=True)
    raise UnknownNameError("GPU", name, all_nearest(name, [*also, *known]))


@functools.lru_cache(maxsize=1024)
def _gpu_parts(name: str) -> tuple[str, ...]:
    """Return lower-case parts in a common spelling: ``SXM4`` and ``SXM2`` are ``sxm``, ``80G`` and ``80GiB`` are
    ``80gb``.
    """
    parts = [part for part in re.split(r"[^a-z0-9]+", name.lower()) if part and part not in _IGNORED]
    parts = [re.sub(r"^sxm\d$", "sxm", re.sub(r"^(\d+)g(i?b)?$", r"\1gb", part)) for part in parts]
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
    by_short = {candidate.rpartition("/")[2]: candidate for candidate in known}
    near = found[0] if found else by_short.get(nearest(name.rpartition("/")[2], by_short) or "")
    raise UnknownNameError("model", name, [near] if near else [])


def _model_key(name: str) -> str:
    """Return the common part of a model's spellings: ``llama270b`` for ``meta-llama/Llama-2-70b-hf`` and
    ``Llama2-70B``.
    """
    short = name.lower().rpartition("/")[2].removeprefix("meta-").removeprefix("meta_")
    while (cut := _MODEL_ENDINGS.sub("", short)) != short:
        short = cut
    return re.sub(r"[^a-z0-9]+", "", short)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9.]+", name.lower().rpartition("/")[2]) if word]


def resolve_workload(name: str, known: Collection[str]) -> str:
    """Return the workload of ``known`` that ``name`` means; see `hetis.formats.catalogue.find_workload`."""
    wanted = name.lower().replace("-", "_")
    for candidate in known:
        if wanted in (candidate, candidate.removesuffix("_lengths")):
            return candidate
    raise UnknownNameError("workload", name, all_nearest(wanted, known))
