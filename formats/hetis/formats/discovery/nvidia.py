"""The GPUs of a host as ``nvidia-smi`` describes them.

``nvidia-smi -q -x`` describes one host per file; ``nvidia-smi topo -m`` optionally adds NVLinks. The output does not
name its host, so the file does: ``gpu-7.xml`` and ``gpu-7.topo.txt`` describe the host gpu-7.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from hetis.formats.discovery.found import FoundGpus, FoundNode, Inventory, counted, grouped, inventory, some_of
from hetis.formats.discovery.pci import board_of_device
from hetis.formats.errors import DocumentError, Problem, attempt, single_problem

# Memory in use above this share of a GPU without a visible process is a job of another user or container; a desktop
# holds less. What an idle driver keeps is below the step to which the rest is rounded up.
_DESKTOP_SHARE = 0.25
_STEP_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverGpu:
    """One GPU of a host."""

    product: str  # the driver's name for it. Empty: the driver cannot read it.
    # memory_bytes, used_bytes: None if unknown
    memory_bytes: int | None = None
    used_bytes: int | None = None
    processes: tuple[str, ...] = ()  # names of the processes that compute on it
    num_parts: int | None = None  # number of its MIG parts, 0 if they cannot be counted. None: it is whole.
    parts: tuple[str, ...] = ()  # the profiles of its MIG parts, as far as they are named
    mode: str = ""  # of a part of an AMD GPU, such as CPX. Empty: it is whole.
    recovery: str = ""  # action that the driver requires before the GPU can be used. Empty: none.
    is_prohibited: bool = False  # whether no process may compute on it

    def reason(self, *, with_busy: bool) -> str:
        """Return why a plan may not use the GPU, or an empty string if it may."""
        if not self.product:
            return "the driver cannot read it"
        if self.num_parts is not None:
            parts = f" ({counted(self.num_parts, 'part')})" if self.num_parts else ""
            return f"MIG is on{parts}; nvidia-smi -L names its slices"
        if self.mode:
            return f"parts of GPUs ({self.mode[:40]}), not whole GPUs"
        if self.recovery:
            return f"the driver asks for {self.recovery}"
        if self.is_prohibited:
            return "its compute mode is Prohibited"
        if with_busy:
            return ""
        if self.processes:
            return f"in use by {some_of(self.processes)}"
        held = memory_in_use(self.used_bytes, self.memory_bytes)
        return f"{held}, but not by a visible process" if held else ""


def memory_in_use(used_bytes: int | None, memory_bytes: int | None) -> str:
    """Return how much of a GPU's memory is in use, or an empty string if it is no more than a desktop holds."""
    if used_bytes is None or not memory_bytes or used_bytes <= memory_bytes * _DESKTOP_SHARE:
        return ""
    return f"{used_bytes / 2**30:.0f} of {memory_bytes / 2**30:.0f} GiB in use"


def reserved_bytes(used_bytes: int | None, *, with_busy: bool) -> int:
    """Return the memory beside which a plan uses a GPU: that in use, in steps in which equal hosts hardly differ.

    ``with_busy``: what is in use will be free.
    """
    if with_busy or used_bytes is None or used_bytes < _STEP_BYTES:
        return 0
    return _STEP_BYTES * -(-used_bytes // _STEP_BYTES)


def host_node(
    name: str, gpus: Sequence[DriverGpu], *, pairs: Iterable[int], with_busy: bool, where: Problem
) -> FoundNode:
    """Return a host with the GPUs that a plan may use, of all in the order of their indices.

    ``pairs`` are the NVLinks between the two GPUs of every pair, empty if unknown. With ``with_busy``, GPUs in use
    count as free.
    """
    reasons = [gpu.reason(with_busy=with_busy) for gpu in gpus]
    free = [gpu for gpu, reason in zip(gpus, reasons, strict=True) if not reason]
    links = list(pairs)
    return FoundNode(
        name=name,
        gpus=(
            *grouped(
                (gpu.product, gpu.memory_bytes, reserved_bytes(gpu.used_bytes, with_busy=with_busy)) for gpu in free
            ),
            *(
                FoundGpus(product=product, count=count, part=part)
                for (product, part), count in Counter((gpu.product, part) for gpu in gpus for part in gpu.parts).items()
            ),
        ),
        left_out=left_out_together(
            (index, gpu.product, "" if gpu.parts else reason)
            for index, (gpu, reason) in enumerate(zip(gpus, reasons, strict=True))
        ),
        nvlinks=min(links, default=None) if len(gpus) > 1 else None,
        bridged=bool(links) and min(links) == 0 < max(links),
        indices=tuple(index for index, reason in enumerate(reasons) if not reason),
        where=where,
    )


def left_out_together(gpus: Iterable[tuple[int, str, str]]) -> tuple[str, ...]:
    """Return a sentence for each reason why GPUs of a host are left out. ``gpus``: index, product and reason of each.
    Those with an empty reason may be used.
    """
    alike: dict[str, list[tuple[int, str]]] = {}
    for index, product, reason in gpus:
        if reason:
            alike.setdefault(reason, []).append((index, product or "no name"))
    sentences = []
    for reason, found in alike.items():
        numbers = ", ".join(str(index) for index, _ in found[:16]) + (", ..." if len(found) > 16 else "")
        products = some_of(product for _, product in found)
        sentences.append(f"{counted(len(found))} (index {numbers}; {products}): {reason}")
    return tuple(sentences)


ROOT = "nvidia_smi_log"
STDIN_HOST = "host"  # standard input has no name

_ENDINGS = re.compile(r"(\.topo)?\.(xml|txt|topo|log|csv|json)$|\.topo$", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CELL = re.compile(r"X|NV(\d{1,2})|SYS|NODE|PHB|PXB|PIX|C2C|N/A")
_MEBIBYTES = re.compile(r"(\d{1,9}) MiB")
# The XML reader below is safe for untrusted text. It uses Python's own expat, and dangerous XML is refused before it
# can do harm: an entity declaration ends the reading, so nothing expands; expat loads nothing external by default;
# and the depth and number of elements are bounded. The document type that nvidia-smi names is ignored.
MAX_DEPTH = 64
MAX_ELEMENTS = 1_000_000


def is_topology(text: str) -> bool:
    """Return whether a text is the output of ``nvidia-smi topo -m``, and does not name the GPUs as well."""
    return bool(_rows(text[:100_000])) and not is_table(text)


def is_table(text: str) -> bool:
    """Return whether a text is ``nvidia-smi``'s own table, its list (``-L``), its log (``-q``), or CSV of
    ``--query-gpu`` with names; the table of ``npu-smi info``, ``hl-smi`` or ``amd-smi``; the list of ``lspci``,
    ``gpustat``, ``dcgmi discovery`` or ``xpu-smi discovery``; or what vLLM's and PyTorch's ``collect_env`` print.
    """
    return bool(_table_gpus(text[:200_000]))


def _table_gpus(text: str) -> list[DriverGpu]:
    """Return the GPUs of a table, a list or CSV, or nothing if the text is none of these."""
    lines = [_COLOURS.sub("", line).strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return []
    if lines[0].startswith("=") and "NVSMI LOG" in lines[0]:
        return [_logged_gpu(part) for part in re.split(r"(?m)^GPU [\da-fA-F:.]+$", text)[1:]]
    if in_lines := list(_in_lines(lines)):
        return in_lines
    if any(line.startswith("GPU models and configuration") for line in lines):
        lines = list(_of_environment(lines))
    header = [column.strip().lower() for column in lines[0].split(",")]
    if "name" in header and (len(header) > 1 or len(lines) > 1) and "node" not in header:
        return [_csv_gpu(dict(zip(header, map(str.strip, line.split(",")), strict=False))) for line in lines[1:]]
    if all(_NAMED.match(line) for line in lines):  # noheader
        rows = [[cell.strip() for cell in line.split(",")] for line in lines]
        columns = [next((name for name, of in _COLUMNS.items() if of.match(cell)), "") for cell in rows[0]]
        return [_csv_gpu(dict(zip(columns, row, strict=False))) for row in rows]
    if all(_LISTED.fullmatch(line) or line.startswith("MIG ") for line in lines):
        places = [i for i, line in enumerate(lines) if _LISTED.fullmatch(line)]
        ends = [*places[1:], len(lines)]
        products = [_LISTED.sub(r"\1", lines[place]) for place in places]
        within = [lines[place + 1 : end] for place, end in zip(places, ends, strict=True)]  # MIG parts follow their GPU
        parts = [tuple(line.split()[1] for line in each) for each in within]
        pairs = zip(products, parts, strict=True)
        return [DriverGpu(product=name, num_parts=len(each) or None, parts=each) for name, each in pairs]
    if on_bus := [found for line in lines if (found := _ON_BUS.match(line))]:
        return [DriverGpu(product=found[2] or board_of_device(found[1]) or f"Device {found[1]}") for found in on_bus]
    slices = defaultdict[str, list[str]](list)  # by the number of their GPU
    for line in lines:
        if found := _MIG_DEVICE.match(line):
            sevenths, gibibytes = min(7, max(1, int(found["engines"]))), math.ceil(int(found["total"]) / 1024)
            slices[found["gpu"]].append(f"{sevenths}g.{gibibytes}gb")
    table = next((table for table in _TABLES if any(line.startswith(table[0]) for line in lines)), None)
    gpus = list[DriverGpu]()
    for place, (line, following) in enumerate(itertools.pairwise(lines if table else ())):
        if table and (named := table[1].match(line)) and (found := table[2].search(following)):
            used, total = (int(number) * 2**20 if number else None for number in (found["used"], found["total"]))
            num_parts = 0 if "".join(lines[place + 2 : place + 3]).endswith(" Enabled |") else None  # MIG M.
            mode = found.groupdict().get("mode") or ""
            own = tuple(slices[line.split()[1]]) if num_parts is not None else ()
            num_parts = len(own) or num_parts
            one = DriverGpu(
                product=named[1].strip(), memory_bytes=total, used_bytes=used, num_parts=num_parts, parts=own
            )
            gpus.append(replace(one, mode="" if mode == "SPX" else mode))
    return gpus


# Tables by how a line of them begins: the names of GPUs, and on the line below memory in use and in all, in MiB. The
# last column of npu-smi's is the memory with high bandwidth. A GPU that shares its host's memory (GB10) reports none.
_OF_NVIDIA = (
    re.compile(r"\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|"),
    re.compile(r"(?P<used>\d{1,9})MiB\s*/\s*(?P<total>\d{1,9})MiB|\| +Not Supported +\|"),
)
_TABLES = (
    ("| NVIDIA-SMI", *_OF_NVIDIA),
    ("| HL-SMI", *_OF_NVIDIA),
    (
        "| npu-smi",
        re.compile(r"\|\s*\d+\s+(\S+)\s*\|\s*\w+\s*\|"),
        re.compile(r"(?P<used>\d{1,9})\s*/\s*(?P<total>\d{1,9})\s*\|$"),
    ),
    (
        "| AMD-SMI",
        re.compile(r"\|\s[\da-f:]+\.\d\s+(\S.*?)\s+\|"),
        re.compile(r"\s(?P<mode>\w+)/\S+\s+\|.*\s(?P<used>\d{1,9})/(?P<total>\d{1,9}) MB\s*\|$"),
    ),
)
# A MIG device: its GPU, memory, and copy engines, of which a slice has one for each seventh of a card, and a whole card
# one more (``nvidia-smi mig -lgip``).
_MIG_DEVICE = re.compile(
    r"\|\s+(?P<gpu>\d+)(?:\s+\d+){3}\s+\|\s+\d+MiB\s*/\s*(?P<total>\d{1,7})MiB\s+\|[^|]*\|\s+(?P<engines>\d)\s"
)
_NAMED = re.compile(r"(?:\d+, ?)?(?:NVIDIA|Tesla|GeForce|Quadro|TITAN|GRID) [^|:]*$")
_COLUMNS = {"name": re.compile(r"[A-Z][A-Za-z]+ "), "memory.total": re.compile(r"\d+ MiB$")}
_ON_BUS = re.compile(
    r"(?:[\da-f]{4}:)?[\da-f]{2}:[\da-f]{2}\.\d (?:3D controller|VGA compatible controller|Processing accelerators|"
    r"Display controller)(?: \[\d{4}\])?: (?:NVIDIA|Advanced Micro Devices, Inc\. \[AMD/ATI\]) ?"
    r"(?:(?:Corporation )?Device (?:\[[\da-f]{4}:)?([\da-f]{4})\]?|(.*?\[[^\[\]]+\]))"
    r"(?: \[[\da-f]{4}:[\da-f]{4}\])?(?: \(rev \w+\))?(?: \(prog-if .*)?$"
)
_LISTED = re.compile(r"GPU \d+: (.+?)(?: \(UUID: [^)]*\))?$")


# A GPU of gpustat, with memory in MiB, and of dcgmi and xpu-smi.
_LINES = (
    re.compile(r"\[\d+\] (?P<name>[^|]+?) +\|.*\| +(?P<used>\d{1,9}) / +(?P<total>\d{1,9}) MB\b"),
    re.compile(r"\| *\d+ +\| (?:Device )?Name: (?P<name>.+?) +\|$"),
)


def _in_lines(lines: Iterable[str]) -> Iterator[DriverGpu]:
    for found in (found for line in lines for form in _LINES if (found := form.match(line))):
        said = found.groupdict()
        used, total = (int(said[name]) * 2**20 if said.get(name) else None for name in ("used", "total"))
        yield DriverGpu(product=said["name"].strip(), memory_bytes=total, used_bytes=used)


def _of_environment(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of ``nvidia-smi -L`` that ``collect_env`` repeats; equal GPUs are in one, as ``GPU 0-7: ...``."""
    for line in lines:
        line = line.removeprefix("GPU models and configuration").lstrip(" :")
        if found := re.match(r"GPU (\d{1,3})(?:-(\d{1,3}))?(?=: )", line):
            yield from [line.replace(found[0], f"GPU {found[1]}", 1)] * (1 + int(found[2] or found[1]) - int(found[1]))
        elif line.startswith("MIG "):
            yield line


def _logged_gpu(part: str) -> DriverGpu:
    """Return a GPU of ``nvidia-smi -q``, whose fields follow each other as ``Product Name : NVIDIA L4``."""

    def value(name: str, within: str = "") -> str:
        """Return a field, of a group if it is ``within`` one."""
        _, _, behind = part.partition(f"    {within}\n") if within else ("", "", part)
        found = re.search(rf"(?m)^ +{name} *: *(.*?) *$", behind)
        return found[1] if found else ""

    used, total = (_MEBIBYTES.fullmatch(value(name, "FB Memory Usage")) for name in ("Used", "Total"))
    return DriverGpu(
        product=value("Product Name"),
        memory_bytes=int(total[1]) * 2**20 if total else None,
        used_bytes=int(used[1]) * 2**20 if used else None,
        num_parts=0 if value("Current", "MIG Mode") == "Enabled" else None,
        is_prohibited=value("Compute Mode") == "Prohibited",
    )


def _csv_gpu(row: dict[str, str]) -> DriverGpu:
    def mebibytes(what: str) -> int | None:
        written = next((value for name, value in row.items() if name.startswith(f"memory.{what}")), "")
        number = written.removesuffix("MiB").strip()
        return int(number) * 2**20 if number.isdecimal() and len(number) < 10 else None

    return DriverGpu(product=row.get("name", ""), memory_bytes=mebibytes("total"), used_bytes=mebibytes("used"))


def read_nvidia_smi(files: Sequence[tuple[str, str]], *, with_busy: bool = False) -> Inventory:
    """Return the hosts in files, given as label and text. With ``with_busy``, GPUs in use count as free. Raises
    DocumentError if a text is not the output of ``nvidia-smi``, or a topology has no host.
    """
    hosts = {label: content for label, content in files if not is_topology(content)}
    if not hosts:
        raise single_problem(files[0][0], "is only a topology: also give nvidia-smi -q -x of the same host")
    problems: list[Problem] = []
    links: dict[str, list[int]] = {}
    names = {host_of(label) for label in hosts}
    for label, content in files:
        if label not in hosts:
            name = next(iter(names)) if len(names) == 1 else host_of(label)
            if name not in names:
                told = f"is a topology of the host {name!r}, but the files are of {some_of(sorted(names))}"
                problems.append(Problem(file=label, message=told))
            links[name] = _nvlinks(content)
    read = (partial(_node, *host, links.get(host_of(host[0]), []), with_busy) for host in hosts.items())
    nodes = [node for one in read if (node := attempt(one, problems)) is not None]
    notes = ["nvidia-smi does not report the zone of a host"] if len(nodes) > 1 else []
    if STDIN_HOST in names and "stdin" in hosts:
        notes.append(f"the host is named {STDIN_HOST}, because standard input does not name it: give a file HOST.xml")
    return inventory(nodes, problems, notes)


def host_of(label: str) -> str:
    """Return the name of the host that a file describes."""
    return STDIN_HOST if label == "stdin" else _ENDINGS.sub("", PurePath(label).name)


def _node(label: str, content: str, pairs: Sequence[int], with_busy: bool) -> FoundNode:
    if found := [] if content.lstrip().startswith("<") else _table_gpus(content):
        here, pairs = Problem(file=label, message="", line=1), pairs or _nvlinks(content)
        return host_node(host_of(label), found, pairs=pairs, with_busy=with_busy, where=here)
    root, line = parse_xml(content, label)
    if root.tag != ROOT:
        raise single_problem(label, f"is XML of {root.tag[:40]!r}, expected {ROOT!r}: nvidia-smi -q -x", line=line)
    where = Problem(file=label, message="", line=line)
    gpus = [_gpu(gpu) for gpu in root.findall("gpu")]
    return host_node(host_of(label), gpus, pairs=pairs, with_busy=with_busy, where=where)


def _gpu(gpu: Element) -> DriverGpu:
    name = _text(gpu, "product_name")
    is_sliced = _text(gpu, "mig_mode/current_mig") == "Enabled"
    return DriverGpu(
        product="" if "error" in name.lower() or name.startswith(("ERR", "[")) else name,
        memory_bytes=_memory(gpu, "total"),
        used_bytes=_memory(gpu, "used"),
        processes=tuple(_processes(gpu)),
        num_parts=len(gpu.findall("mig_devices/mig_device") or gpu.findall("mig_device")) if is_sliced else None,
        recovery=_recovery(gpu),
        is_prohibited=_text(gpu, "compute_mode") == "Prohibited",
    )


def _memory(gpu: Element, which: str) -> int | None:
    found = _MEBIBYTES.fullmatch(_text(gpu, f"fb_memory_usage/{which}"))
    return int(found[1]) * 2**20 if found else None


def _recovery(gpu: Element) -> str:
    action = _text(gpu, "gpu_recovery_action")
    if action not in ("", "None", "N/A"):
        return f"recovery ({action[:40]})"
    status = ("reset_required", "drain_and_reset_recommended")  # for drivers that report no recovery action
    return "a reset" if any(_text(gpu, f"gpu_reset_status/{one}") == "Yes" for one in status) else ""


def _processes(gpu: Element) -> Iterator[str]:
    for one in gpu.findall("processes/process_info"):
        if "C" in _text(one, "type"):  # G alone is a desktop; C, C+G and M+C compute
            yield PurePath(_text(one, "process_name")).name or f"process {_text(one, 'pid')}"


def _rows(text: str) -> list[list[str]]:
    """Return the cells between GPUs of every GPU's row, or nothing if the text is not a topology table."""
    lines = [_COLOURS.sub("", line).split() for line in text.splitlines()]
    header = next((i for i, line in enumerate(lines) if line[:1] == ["GPU0"] and "X" not in line[:2]), None)
    if header is None:
        return []
    # NICs and affinities follow GPU0, GPU1, ... in the header.
    num_gpus = next((i for i, name in enumerate(lines[header]) if name != f"GPU{i}"), len(lines[header]))
    rows = [line[1 : 1 + num_gpus] for line in lines[header + 1 :] if line and re.fullmatch(r"GPU\d{1,4}", line[0])]
    whole = all(len(row) == num_gpus and all(map(_CELL.fullmatch, row)) for row in rows)
    return rows if whole and len(rows) == num_gpus else []


def _nvlinks(text: str) -> list[int]:
    """Return the NVLinks between the two GPUs of every pair, in both directions."""
    return [
        int(found[1] or 0) if (found := _CELL.fullmatch(cell)) else 0
        for i, row in enumerate(_rows(text))
        for j, cell in enumerate(row)
        if i != j
    ]


def parse_xml(text: str, file: str) -> tuple[Element, int]:
    """Return the root element and its line. Raises DocumentError if it is not XML, has entities, or is too big."""
    parser, builder = expat.ParserCreate(), TreeBuilder()
    parser.buffer_text = True
    lines, depth = list[int](), 0

    def refuse(message: str) -> DocumentError:
        return single_problem(file, message, line=parser.CurrentLineNumber)

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        lines.append(parser.CurrentLineNumber)
        depth += 1
        if depth > MAX_DEPTH or len(lines) > MAX_ELEMENTS:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_ELEMENTS} elements"
            raise refuse(f"has more than {limit}")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def entity(name: str, *rest: object) -> None:
        raise refuse(f"declares the entity {name[:40]!r}, which nvidia-smi never writes")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = builder.data, entity
    try:
        parser.Parse(text.lstrip(), True)
    except expat.ExpatError as error:
        raise single_problem(file, f"is not XML: {expat.ErrorString(error.code)}", line=error.lineno) from None
    return builder.close(), lines[0]


def _text(element: Element, path: str) -> str:
    """Return the text of the element at a path such as ``mig_mode/current_mig``, or an empty string."""
    return element.findtext(path, "").strip()
