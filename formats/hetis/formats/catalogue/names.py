"""What names of GPUs and models mean, in the spellings of people, drivers, clouds and lists of devices."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable

from hetis.formats.errors import all_nearest, did_you_mean_one_of
from hetis.solver.errors import HetisError


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
_IGNORED = {"nvidia", "geforce", "tesla", "amd", "instinct", "intel", "habana", "generation", "oam", "blackwell"}
_IGNORED |= {"edition", "huawei", "google", "radeon", "jetson", "vf"}  # a virtual function is a whole MI300X
# Parts that several boards share: on their own they name nothing.
_SHARED = re.compile(r"\d+gb|pcie|sxm|nvl|per|gpu|die|rtx|rx|quadro|pro|ai|server|ada|arc|ascend|tpu")
_ASCEND = ("ascend-", "ascend", "")  # as vllm-ascend, CANN and npu-smi spell it
# Names that `nvidia-smi` and `rocm-smi` give to boards whose catalogue name has other parts.
_GPU_ALIASES = {
    "h100-80gb-hbm3": "H100-SXM-80GB",
    "h200": "H200-SXM-141GB",  # the driver's whole name for it; the other board is "H200 NVL"
    "b300-sxm-ac": "B300-SXM-288GB",  # air-cooled
    "rtx-pro-6000-blackwell-server-edition": "RTX-PRO-6000-Server-96GB",
    "r-arc-tm-pro-b60-graphics": "Arc-Pro-B60-24GB",
    # 480 and 120 GB are the CPU's memory
    **dict.fromkeys(("gh200-480gb", "gh200-120gb", "gh200-120gb-480gb", "gh200-96gb-hbm3"), "GH200-96GB"),
    "h100-96gb-hbm3": "H100-SXM-96GB",
    "h800-80gb-hbm3": "H800-SXM-80GB",
    "mi300x-o": "MI300X-192GB",  # earlier versions of amd-smi
    "mi325": "MI325X-256GB",
    "mi250-mcm-ac-mba": "MI250-per-die",  # rocm-smi's name of each die
    "h100-64gb-hbm2": "H100-SXM-64GB",
    "gh200-144gb-hbm3e": "GH200-144GB",
    "h800": "H800-SXM-80GB",  # the driver's whole name for it
    "a800": "A800-SXM-80GB",
    "rtx-pro-6000-max-q-workstation": "RTX-PRO-6000-MaxQ-96GB",
    "a16": "A16-per-GPU",
    "a30-pcie": "A30",
    "rtx-6000-ada-generation": "RTX-6000-Ada",
    **dict.fromkeys(("gaudi-2", "hl-225", "hl-225h", "hl-225b"), "Gaudi2-96GB"),
    **dict.fromkeys(("gaudi-3", "hl-325", "hl-325l"), "Gaudi3-128GB"),
    "jetson-thor": "Thor",
    "agx-thor": "Thor",
    "7900-xtx": "RX-7900-XTX",
    "r9700": "Radeon-AI-PRO-R9700",
    **dict.fromkeys(("mi50-mi60", "pro-vii-mi50-32gb"), "MI50-32GB"),
    **{f"{name}910b{number}": "Ascend-910B-64GB" for name in _ASCEND for number in ("", 1, 2, 3)},
    **{f"{name}910b4": "Ascend-910B4-32GB" for name in _ASCEND},
    **{f"{name}910c": "Ascend-910C-per-die" for name in _ASCEND},
    **{f"ascend910-93{number}": "Ascend-910C-per-die" for number in (91, 92, 81, 82)},
    **dict.fromkeys(("tpu-v5-lite", "tpu-v5-lite-podslice", "tpu-v5-lite-device", "tpu-v5lite"), "TPU-v5e"),
    **dict.fromkeys(("tpu-v6-lite", "tpu-v6e-slice", "tpu-v6e-device", "trillium"), "TPU-v6e"),
}

# Boards that nobody means who does not say so, with their memory.
_RARE = {"A100-SXM-64GB", "H100-SXM-64GB", "H100-SXM-96GB", "GH200-144GB", "RTX-2080Ti-22GB", "RTX-4090-48GB"}
_RARE |= {"RTX-3080-20GB"}

# Checkpoints by the model of the same shape from which they were trained further.
TUNINGS = {
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
    **TUNINGS,
}
# Suffixes that change the weights but not the shape.
_MODEL_ENDINGS = re.compile(r"[-_](hf|instruct|chat|it|base|v0\.1|2501)$")


def resolve_gpu(name: str, known: Collection[str], also: Collection[str] = ()) -> str:
    """Return the GPU of ``known`` that ``name`` means; see `hetis.formats.catalogue.find_gpu`."""
    wanted = _gpu_parts(_product_in(name))
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
    if name.endswith("...") and any(map(str.isdigit, compact)):  # older drivers' table cuts names
        if any(word.startswith(wanted[-1]) for word in _IGNORED):  # "NVIDIA RTX PRO 6000 Blac..."
            compact = "".join(wanted[:-1])
        found = [one for one in known if "".join(_gpu_parts(one)).startswith(compact)]
        raise UnknownNameError("GPU", name, found, ambiguous=bool(found))
    names = [*also, *(one for one in known if one not in _RARE)]
    # Without the vendor's words, too: they make a short name unlike every other.
    nearest = all_nearest(name, names) or all_nearest("-".join(wanted), names)
    boards = {number for one in known for number in _numbers(_gpu_parts(one))}
    hints = [one for one in nearest if one in also or not _is_another_card(wanted, one, boards)]
    raise UnknownNameError("GPU", name, hints)


def _product_in(name: str) -> str:
    """Return the board in a line of ``lspci``, which is in its last brackets, or in a TPU's type with its chips."""
    bracketed = re.search(r"\w .*\[([^\[\]]+)\](?: \(rev \w+\))?$", name.strip())
    return re.sub(r"^(?:tpu-)?(v5lite|v\d[ep])(?:pod)?-\d+$", r"tpu-\1", bracketed[1] if bracketed else name.strip())


def _is_another_card(wanted: tuple[str, ...], candidate: str, boards: Collection[tuple[str, str]]) -> bool:
    """Return whether a name has the number of another card than a similar one: an RTX 3050 is no slip of RTX-3090, nor
    an M40 of P40; or other memory, or the profile of a virtual GPU (``48Q``).

    A letter O counts as a zero, and a number may be cut short unless it is one of ``boards``. Letters behind it may be
    slips (``L40X``, ``80GX``).
    """
    own = _gpu_parts(candidate)
    parts = [part for part in wanted if part in _VARIANTS or not _SHARED.fullmatch(part)]

    def has(letters: str, number: str) -> bool:
        may_be_cut = len(number) > 1 and (letters, number) not in boards
        same = (each for each in _numbers(own) if each[1] == number or (may_be_cut and each[1].startswith(number)))
        return any(letters in ("", theirs) for theirs, _ in same)

    sizes = [{part for part in of if _MEMORY.fullmatch(part)} for of in (wanted, own)]
    is_other = all(sizes) and sizes[0].isdisjoint(sizes[1])
    is_other |= any(_VIRTUAL.fullmatch(part) or (part in _VARIANTS and part not in own) for part in parts)
    return is_other or not all(has(*one) for one in _numbers(parts))


_MEMORY, _VIRTUAL = re.compile(r"\d+gb"), re.compile(r"\d+[abcq]")


# Words behind a number or in place of one, each another card than that without it; boards for laptops have names like
# those of desktops.
_VARIANTS = {"xt", "xtx", "gre", "ti", "super", "d", "laptop", "mobile", "design", "sff", "hf", "v", "x", "xp", "dgxs"}
_VARIANTS |= {"fhhl", "ls", "mig"}
_VARIANTS |= {"a30x", "a100x", "l40g", "l20x", "l20y", "a10m", "t4g", "6000d", "mi300a", "v5p", "910a", "ascend910a"}
_VARIANTS |= {"72gb"}  # RTX PRO 5000


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
    key = model_key(name)
    for alias, target in _MODEL_ALIASES.items():
        if model_key(alias) == key and organisation in ("", target.lower().partition("/")[0]):
            return target
    same_organisation = [c for c in known if organisation in ("", c.lower().partition("/")[0])]
    found = [candidate for candidate in same_organisation if model_key(candidate) == key]
    if len(found) == 1:
        return found[0]
    words = set(_words(name))
    found = found or [c for c in same_organisation if words and words <= set(_words(c))]
    if len(found) > 1:
        raise UnknownNameError("model", name, found, ambiguous=True)
    by_key = dict[str, str]()
    for candidate in known:
        by_key.setdefault(model_key(candidate), candidate)
    near = found or [by_key[near] for near in all_nearest(key, by_key)]
    raise UnknownNameError("model", name, near[:1])


def model_key(name: str) -> str:
    """Return what spellings share: ``llama270b`` for ``meta-llama/Llama-2-70b-hf`` and ``Llama2-70B``."""
    short = name.lower().rpartition("/")[2].removeprefix("meta-").removeprefix("meta_")
    while (cut := _MODEL_ENDINGS.sub("", short)) != short:
        short = cut
    return re.sub(r"[^a-z0-9]+", "", short)


def tunings_in(name: str) -> frozenset[str]:
    """Return the endings of a model's name that tell tunings apart."""
    found, short = set[str](), name.lower()
    while (ending := _MODEL_ENDINGS.search(short)) is not None:
        found.add(ending[1])
        short = short[: ending.start()]
    return frozenset(found & {"instruct", "chat", "it", "base"})


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9.]+", name.lower().rpartition("/")[2]) if word]
