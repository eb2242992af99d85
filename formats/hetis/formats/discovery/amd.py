"""AMD's GPUs of a host, as ``amd-smi static``, ``amd-smi metric`` and ``rocm-smi`` print them, also with ``--json``.

A file describes one host, which its name names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hetis.formats.discovery.found import Inventory, inventory, text
from hetis.formats.discovery.nvidia import DriverGpu, host_node, host_of
from hetis.formats.discovery.pci import board_of_device
from hetis.formats.errors import Problem
from hetis.formats.fields import listed, mapping
from hetis.formats.positions import Text

_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}  # of amd-smi, which are binary
_PARTS = ("asic", "board", "vram", "mem_usage")
_OF_ROCM = re.compile(r"(?m)^GPU\[(\d{1,4})\]\s*: ([^:\n]+?):\s*(.*?)\s*$")
# Of rocm-smi's own table: number, device, modes of memory and compute, and the share of memory in use.
_OF_TABLE = re.compile(
    r"(?m)^(\d{1,4}) +\d+ +0x([\da-f]{4}), .* (?:NPS\d|N/A), ([\w/]+), \d+ .* (\d{1,3})% +\d{1,3}% *$"
)
_OF_AMD_SMI = re.compile(r"(?m)^ +(MARKET_NAME|(?:ACCELERATOR|COMPUTE)_PARTITION|SIZE): (.*?) *$")
_MOST_GPUS = 1024


def is_amd(data: Any) -> bool:
    """Return whether data is the output of one of the tools."""
    return bool(_cards(data))


def cards_of_text(written: str) -> dict[str, Mapping[str, Any]]:
    """Return the cards that a tool prints without ``--json``, in the form of ``rocm-smi --json``."""
    found = defaultdict[str, dict[str, Any]](dict)
    for number, name, value in _OF_ROCM.findall(written[: _MOST_GPUS * 10_000]):
        found[f"card{number}"][name] = value
    for number, device, mode, used in _OF_TABLE.findall(written):
        found[f"card{number}"] = {
            "Card Series": board_of_device(device) or f"0x{device}",
            "Compute Partition": mode,
            "GPU Memory Allocated (VRAM%)": used,
        }
    for part in re.split(r"(?m)^GPU: (?=\d)", written)[1 : _MOST_GPUS + 1]:
        fields = dict(reversed(_OF_AMD_SMI.findall(part)))  # the first size is that of its memory
        size, _, unit = fields.get("SIZE", "").partition(" ")
        found[f"card{part.split()[0]}"] = {
            "Card Series": fields.get("MARKET_NAME", ""),
            "VRAM Total Memory (B)": {"value": size, "unit": unit},
            "Compute Partition": fields.get("ACCELERATOR_PARTITION") or fields.get("COMPUTE_PARTITION"),
        }
    return dict(found)


def read_amd(files: Sequence[tuple[Any, Text]], *, with_busy: bool = False) -> Inventory:
    """Return the hosts of all files. With ``with_busy``, GPUs in use count as free. Raises DocumentError."""
    nodes, problems = [], list[Problem]()
    for data, source in files:
        gpus = [_gpu(card) for card in _cards(data)]
        if not all(gpu.product for gpu in gpus):
            how = "amd-smi static --json, or rocm-smi --showproductname --showmeminfo vram --json"
            problems.append(source.problem((), f"has GPUs without a name: {how}"))
        where = source.problem((), "")
        nodes.append(host_node(host_of(source.file), gpus, pairs=(), with_busy=with_busy, where=where))
    return inventory(nodes, problems, ["AMD's tools do not report the zone of a host"] if len(nodes) > 1 else [])


def _cards(data: Any) -> list[Mapping[str, Any]]:
    """Return what is said of each GPU, in the order of their numbers."""
    rocm: dict[str, Mapping[str, Any]] = {key[4:]: mapping(data[key]) for key in mapping(data) if key[:4] == "card"}
    if rocm and all(number.isdecimal() for number in rocm):
        return [rocm[number] for number in sorted(rocm, key=int)]
    found: list[Mapping[str, Any]] = [mapping(one) for one in listed(data) or listed(mapping(data).get("gpu_data"))]
    return found if all("gpu" in one and any(part in one for part in _PARTS) for one in found) else []


def _gpu(card: Mapping[str, Any]) -> DriverGpu:
    asic, board, vram, usage = (mapping(card.get(part)) for part in _PARTS)
    names = [asic.get("market_name"), board.get("product_name"), *map(card.get, ("Card Series", "Card series"))]
    partition = mapping(card.get("partition"))
    modes = (partition.get("accelerator_partition"), partition.get("compute_partition"), card.get("Compute Partition"))
    mode = next(filter(None, map(text, modes)), "")
    share = text(card.get("GPU Memory Allocated (VRAM%)"))
    is_in_use = share.isdecimal() and int(share) > 25
    return DriverGpu(
        processes=(f"what holds {share}% of its memory",) if is_in_use else (),
        mode="" if mode in ("SPX", "N/A") else mode,
        product=next((name for name in map(text, names) if name and name != "N/A"), ""),
        memory_bytes=_bytes(card.get("VRAM Total Memory (B)", usage.get("total_vram", vram.get("size")))),
        used_bytes=_bytes(card.get("VRAM Total Used Memory (B)", usage.get("used_vram"))),
    )


def _bytes(value: Any) -> int | None:
    """Return the bytes of a number, of its text, or of ``{"value": 196592, "unit": "MB"}``."""
    number, unit = mapping(value).get("value", value), _UNITS.get(text(mapping(value).get("unit")).upper(), 1)
    written = str(number).strip()
    return int(written) * unit if written.isdecimal() and len(written) < 16 else None
