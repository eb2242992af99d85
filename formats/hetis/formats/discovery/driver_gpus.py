"""The GPUs of a host as NVIDIA's driver describes them, by ``nvidia-smi`` or by its library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hetis.formats.discovery.found import FoundNode, counted, grouped, some_of
from hetis.formats.errors import Problem

# Memory in use above this without a visible process belongs to another user or container. An idle driver keeps less.
_IDLE_BYTES = 2**30
_IDLE_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverGpu:
    """One GPU of a host.

    Attributes:
        product: the driver's name for it. Empty: the driver cannot read it.
        memory_bytes, used_bytes: None if unknown.
        processes: names of those that compute on it.
        num_parts: number of its MIG parts. None: it is whole.
        recovery: what the driver asks for before the GPU can be used. Empty: nothing.
        is_prohibited: no process may compute on it.
    """

    product: str
    memory_bytes: int | None = None
    used_bytes: int | None = None
    processes: tuple[str, ...] = ()
    num_parts: int | None = None
    recovery: str = ""
    is_prohibited: bool = False

    def reason(self, *, with_busy: bool) -> str:
        """Return why a plan may not use the GPU, or an empty string if it may."""
        if not self.product:
            return "the driver cannot read it"
        if self.num_parts is not None:
            return f"MIG is on ({self.num_parts} parts)"
        if self.recovery:
            return f"the driver asks for {self.recovery}"
        if self.is_prohibited:
            return "its compute mode is Prohibited"
        if with_busy:
            return ""
        if self.processes:
            return f"in use by {some_of(self.processes)}"
        held = memory_in_use(self.used_bytes, self.memory_bytes)
        return f"{held}, by no process that can be seen" if held else ""


def memory_in_use(used_bytes: int | None, memory_bytes: int | None) -> str:
    """Return how much of a GPU's memory is in use, or an empty string if it is no more than an idle driver keeps."""
    if used_bytes is None or not memory_bytes or used_bytes <= max(_IDLE_BYTES, memory_bytes * _IDLE_SHARE):
        return ""
    return f"{used_bytes / 2**30:.0f} of {memory_bytes / 2**30:.0f} GiB in use"


def host_node(
    name: str, gpus: Sequence[DriverGpu], *, pairs: Iterable[int], with_busy: bool, where: Problem
) -> FoundNode:
    """Return a host with the GPUs that a plan may use.

    Args:
        name: of the host.
        gpus: all of them, in the order of their indices.
        pairs: NVLinks between the two GPUs of every pair. Empty: unknown.
        with_busy: GPUs that are in use count as free.
        where: the place in its file, for problems.
    """
    reasons = [gpu.reason(with_busy=with_busy) for gpu in gpus]
    free = [gpu for gpu, reason in zip(gpus, reasons, strict=True) if not reason]
    links = list(pairs)
    return FoundNode(
        name=name,
        gpus=grouped((gpu.product, gpu.memory_bytes) for gpu in free),
        left_out=left_out_together(
            (index, gpu.product, reason) for index, (gpu, reason) in enumerate(zip(gpus, reasons, strict=True))
        ),
        nvlinks=min(links, default=None) if len(gpus) > 1 else None,
        bridged=bool(links) and min(links) == 0 < max(links),
        indices=tuple(index for index, reason in enumerate(reasons) if not reason),
        where=where,
    )


def left_out_together(gpus: Iterable[tuple[int, str, str]]) -> tuple[str, ...]:
    """Return a sentence for each reason why GPUs of a host are left out.

    Args:
        gpus: index, product and reason of each. Those with an empty reason may be used.
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
