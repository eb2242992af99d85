"""What the devices of this process compute on: GPUs that it sees, or the CPU; refused where these lack the room."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from hetis.runtime.attention.cuda import cuda_count
from hetis.runtime.kv.memory import free_memory_bytes
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import DevicePages, StageLayout, card_of, refuse_if_too_large
from hetis.runtime.launch.room import Compute

_log = logging.getLogger(__name__)


def torch_devices(compute: Compute, needed: int) -> list[str]:
    """So many devices of torch: GPUs from the first on, or the CPU again and again.

    Raises:
        LayoutError: CUDA is asked for, and torch finds fewer GPUs.
    """
    found = cuda_count()
    if compute is Compute.AUTO and 0 < found < needed:
        _log.warning("%d CUDA devices are needed, torch finds %d: the CPU computes", needed, found)
    if compute is Compute.CPU or (compute is Compute.AUTO and found < needed):
        return ["cpu"] * needed
    if found < needed:
        raise LayoutError(f"{needed} CUDA devices are needed, one for each device here, torch finds {found}")
    return [f"cuda:{number}" for number in range(needed)]


def on_devices(
    stages: Sequence[StageLayout], compute: Compute, *, workers: Collection[str], elsewhere: Collection[int] = ()
) -> tuple[StageLayout, ...]:
    """The same stages, every device of this process with its device of torch: the ranks first, then the others.

    What stages have of a card that they share is on the same one. Not of this process are ``workers``, by name, and all
    devices of the stages ``elsewhere``, by number.

    Raises:
        LayoutError: CUDA is asked for, and torch finds fewer GPUs than there are devices here.
    """
    here = [stage for number, stage in enumerate(stages) if number not in elsewhere]
    ranks = [device.name for stage in here for device in stage.devices[: stage.ranks]]
    others = [device.name for stage in here for device in stage.devices[stage.ranks :] if device.name not in workers]
    names = [*ranks, *others]
    cards = list(dict.fromkeys(map(card_of, names)))
    computing = dict(zip(cards, torch_devices(compute, len(cards)), strict=True))
    found = {name: computing[card_of(name)] for name in names}
    return tuple(
        replace(stage, devices=tuple(replace(d, device=found.get(d.name, d.device)) for d in stage.devices))
        for stage in stages
    )


def refuse_missing(devices: Iterable[str]) -> None:
    """Raises LayoutError: one of these devices of torch is not there; all that are not."""
    found = cuda_count()
    missing = [name for name in dict.fromkeys(devices) if name != "cpu" and int(name.partition(":")[2]) >= found]
    if missing:
        raise LayoutError(*(f"{name} is not there: torch finds {found} CUDA devices" for name in missing))


def refuse_too_large(
    devices: Iterable[tuple[DevicePages, KvShape]], *, prompt_bytes: Mapping[str, int] | None = None
) -> None:
    """Raises LayoutError: KV of devices does not fit into the memory of what they compute on.

    ``prompt_bytes``: by device of torch, what is to be left there for prompts under way.
    """
    needed: Counter[str] = Counter()
    for device, shape in devices:
        needed[device.device] += device.pages * shape.page_bytes
    beside = prompt_bytes or {}
    for name in sorted({*needed, *beside}):
        where = "this machine" if name == "cpu" else name
        free_bytes = free_memory_bytes(name)
        refuse_if_too_large(needed[name], free_bytes=free_bytes, prompt_bytes=beside.get(name, 0), where=where)


@contextmanager
def refusing_out_of_memory() -> Iterator[None]:
    """A GPU that has too little memory, of weights for example, is a LayoutError with what torch says of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LayoutError(f"weights and KV do not fit: {str(error).splitlines()[0]}") from error
