"""Which processes a replica of a plan is, and where each runs: the one list that every way to start them reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from hetis.runtime.engine.stage import kv_shape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import layout_of
from hetis.runtime.model.config import ModelConfig
from hetis.solver.plan import Plan

_DEVICE = re.compile(r".+/\d{1,4}")


class ProcessKind(StrEnum):
    """What a process is. ``engine`` has the scheduler, the front, the store and the dense layers."""

    ENGINE = "engine"
    ATTENTION_WORKER = "attention-worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProcess:
    """One process.

    Attributes:
        name: its device as the plan calls it; ``engine`` for the engine, of which a replica has one.
        node: where it runs.
        gpus: which of the node's GPUs are its own, counted from 0.
        kv_bytes: memory for KV, as much as the plan counts on.
    """

    name: str
    kind: ProcessKind
    node: str
    gpus: tuple[int, ...]
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the memory for KV follows from, beside plan and model.

    Attributes:
        dtype: of weights and KV; None: the checkpoint's.
        kv_tokens: KV room in tokens in place of the plan's.
    """

    dtype: str | None = None
    page_tokens: int = 16
    kv_tokens: int | None = None


def processes_of(plan: Plan, replica: int, config: ModelConfig, sizes: Sizes) -> tuple[PlannedProcess, ...]:
    """The engine, then every attention worker in a process of its own.

    Raises:
        LayoutError: the engine cannot run this replica; all the reasons.
    """
    layout = layout_of(plan, replica, config, page_tokens=sizes.page_tokens, kv_tokens=sizes.kv_tokens)
    dtype = sizes.dtype or config.dtype
    page_bytes = kv_shape(config, range(config.layers), page_tokens=sizes.page_tokens, dtype=dtype).page_bytes
    wrong = [device.name for device in layout.devices if not _DEVICE.fullmatch(device.name)]
    if wrong:
        raise LayoutError(*(f"device {name!r} of the plan must be NODE/INDEX, such as gpu2/0" for name in wrong))
    found = []
    for number, device in enumerate(layout.devices):
        node, _, index = device.name.rpartition("/")
        found.append(
            PlannedProcess(
                name=device.name if number else ProcessKind.ENGINE.value,
                kind=ProcessKind.ATTENTION_WORKER if number else ProcessKind.ENGINE,
                node=node,
                gpus=(int(index),),
                kv_bytes=device.pages * page_bytes,
            )
        )
    return tuple(found)
