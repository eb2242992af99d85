"""Hosts as ``nvidia-smi -q -x`` describes them, one file per host; ``nvidia-smi topo -m`` optionally adds NVLinks.

The output does not name its host, so the file does: ``gpu-7.xml`` and ``gpu-7.topo.txt`` describe the host gpu-7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from xml.parsers import expat

from hetis.formats.discovery.driver_gpus import DriverGpu, host_node
from hetis.formats.discovery.found import FoundNode, Inventory, inventory, some_of
from hetis.formats.errors import DocumentError, Problem, single_problem

ROOT = "nvidia_smi_log"
STDIN_HOST = "host"  # standard input has no name

_ENDINGS = re.compile(r"(\.topo)?\.(xml|txt|topo|log)$|\.topo$", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CELL = re.compile(r"X|NV(\d{1,2})|SYS|NODE|PHB|PXB|PIX|C2C|N/A")
_MEBIBYTES = re.compile(r"(\d{1,9}) MiB")
# The XML reader below is safe for untrusted text. It uses Python's own expat, and dangerous XML is refused before it
# can do harm: an entity declaration ends the reading, so nothing expands; expat loads nothing external unless told to;
# and the depth and number of elements are bounded. The document type that nvidia-smi names is ignored.
MAX_DEPTH = 64
MAX_ELEMENTS = 1_000_000


def is_topology(text: str) -> bool:
    """Return whether a text is the output of ``nvidia-smi topo -m``."""
    return bool(_rows(text[:100_000]))


def read_nvidia_smi(files: Sequence[tuple[str, str]], *, with_busy: bool = False) -> Inventory:
    """Return the hosts in files, given as label and text. With ``with_busy``, GPUs in use count as free.

    Raises:
        DocumentError: a text is not the output of ``nvidia-smi``, or a topology has no host.
    """
    hosts = {label: content for label, content in files if not is_topology(content)}
    if not hosts:
        raise single_problem(files[0][0], "is a topology alone: nvidia-smi -q -x of the same host is needed, too")
    problems: list[Problem] = []
    links: dict[str, list[int]] = {}
    names = {_host(label) for label in hosts}
    for label, content in files:
        if label not in hosts:
            name = next(iter(names)) if len(names) == 1 else _host(label)
            if name not in names:
                told = f"is a topology of the host {name!r}, but there are {some_of(sorted(names))}"
                problems.append(Problem(file=label, message=told))
            links[name] = _nvlinks(content)
    nodes = []
    for label, content in hosts.items():
        try:
            nodes.append(_node(label, parse_xml(content, label), links.get(_host(label), []), with_busy))
        except DocumentError as error:
            problems += error.problems
    notes = ["nvidia-smi does not say in which zone a host is"] if len(nodes) > 1 else []
    return inventory(nodes, problems, notes)


def _host(label: str) -> str:
    return STDIN_HOST if label == "stdin" else _ENDINGS.sub("", PurePath(label).name)


def _node(label: str, root: Element, pairs: Sequence[int], with_busy: bool) -> FoundNode:
    if root.tag != ROOT:
        raise single_problem(label, f"is XML of {root.tag[:40]!r}, expected {ROOT!r}: nvidia-smi -q -x", line=root.line)
    where = Problem(file=label, message="", line=root.line)
    gpus = [_gpu(gpu) for gpu in root.all("gpu")]
    return host_node(_host(label), gpus, pairs=pairs, with_busy=with_busy, where=where)


def _gpu(gpu: Element) -> DriverGpu:
    name = gpu.text_of("product_name")
    is_sliced = gpu.text_of("mig_mode/current_mig") == "Enabled"
    return DriverGpu(
        product="" if "error" in name.lower() or name.startswith(("ERR", "[")) else name,
        memory_bytes=_memory(gpu),
        used_bytes=_memory(gpu, "used"),
        processes=tuple(_processes(gpu)),
        num_parts=len(list((gpu.find("mig_devices") or gpu).all("mig_device"))) if is_sliced else None,
        recovery=_recovery(gpu),
        is_prohibited=gpu.text_of("compute_mode") == "Prohibited",
    )


def _memory(gpu: Element, which: str = "total") -> int | None:
    found = _MEBIBYTES.fullmatch(gpu.text_of(f"fb_memory_usage/{which}"))
    return int(found[1]) * 2**20 if found else None


def _recovery(gpu: Element) -> str:
    action = gpu.text_of("gpu_recovery_action")
    if action not in ("", "None", "N/A"):
        return f"recovery ({action[:40]})"
    status = ("reset_required", "drain_and_reset_recommended")  # before the action
    return "a reset" if any(gpu.text_of(f"gpu_reset_status/{one}") == "Yes" for one in status) else ""


def _processes(gpu: Element) -> Iterator[str]:
    found = gpu.find("processes")
    for one in found.all("process_info") if found else ():
        if "C" in one.text_of("type"):  # G alone is a desktop; C, C+G and M+C compute
            yield PurePath(one.text_of("process_name")).name or f"process {one.text_of('pid')}"


def _rows(text: str) -> list[list[str]]:
    """Return the cells between GPUs of every GPU's row, or nothing if the text is not a topology table."""
    lines = [_COLOURS.sub("", line).split() for line in text.splitlines()]
    header = next((i for i, line in enumerate(lines) if line[:1] == ["GPU0"] and "X" not in line[:2]), None)
    if header is None:
        return []
    num_gpus = sum(1 for _ in _numbered(lines[header]))
    rows = [line[1 : 1 + num_gpus] for line in lines[header + 1 :] if line and re.fullmatch(r"GPU\d{1,4}", line[0])]
    is_table = len(rows) == num_gpus and all(
        len(row) == num_gpus and all(_CELL.fullmatch(cell) for cell in row) for row in rows
    )
    return rows if is_table else []


def _numbered(header: Sequence[str]) -> list[str]:
    """Return ``GPU0``, ``GPU1``, ... from the header, which NICs and affinities follow."""
    found = []
    for i, name in enumerate(header):
        if name != f"GPU{i}":
            break
        found.append(name)
    return found


def _nvlinks(text: str) -> list[int]:
    """Return the NVLinks between the two GPUs of every pair, in both directions."""
    return [
        int(found[1] or 0) if (found := _CELL.fullmatch(cell)) else 0
        for i, row in enumerate(_rows(text))
        for j, cell in enumerate(row)
        if i != j
    ]


@dataclass(slots=True)
class Element:
    """An element with its own text, stripped of surrounding blanks."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, path: str) -> Element | None:
        """Return the first element at a path such as ``mig_mode/current_mig``, or None."""
        here: Element | None = self
        for tag in path.split("/"):
            here = next((child for child in here.children if child.tag == tag), None) if here is not None else None
        return here

    def text_of(self, path: str) -> str:
        """Return the text of the element at a path, or an empty string if there is none."""
        found = self.find(path)
        return found.text if found is not None else ""

    def all(self, tag: str) -> Iterator[Element]:
        """Return the children with a tag."""
        return (child for child in self.children if child.tag == tag)


def parse_xml(text: str, file: str) -> Element:
    """Return the root element of a document.

    Raises:
        DocumentError: it is not XML, declares entities, is nested too deep, or is too large.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    top = Element("", 0)
    stack, num_elements = [top], 0

    def refuse(message: str) -> DocumentError:
        return single_problem(file, message, line=parser.CurrentLineNumber)

    def start(tag: str, attributes: object) -> None:
        nonlocal num_elements
        num_elements += 1
        if len(stack) > MAX_DEPTH or num_elements > MAX_ELEMENTS:
            limit = f"{MAX_DEPTH} levels" if len(stack) > MAX_DEPTH else f"{MAX_ELEMENTS} elements"
            raise refuse(f"has more than {limit}")
        element = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(tag: str) -> None:
        element = stack.pop()
        element.text = element.text.strip()

    def characters(some: str) -> None:
        if not stack[-1].children:  # blanks between elements belong to no text
            stack[-1].text += some

    def entity(name: str, *rest: object) -> None:
        raise refuse(f"declares the entity {name[:40]!r}, which no nvidia-smi does")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = characters, entity
    try:
        parser.Parse(text.lstrip(), True)
    except expat.ExpatError as error:
        raise single_problem(file, f"is not XML: {expat.ErrorString(error.code)}", line=error.lineno) from None
    return top.children[0]
