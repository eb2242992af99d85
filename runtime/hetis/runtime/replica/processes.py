"""Which processes a replica of a plan is, and where each runs: the one list that every way to start them reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from hetis.runtime.engine.stage import kv_shape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import Layout, layout_of
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
    """The engine, which runs all stages, then every attention worker in a process of its own.

    Raises:
        LayoutError: the engine cannot run this replica; all the reasons.
    """
    layout = layout_of(plan, replica, config, page_tokens=sizes.page_tokens, kv_tokens=sizes.kv_tokens)
    _check_devices(layout)
    primaries, kept_bytes, workers = [], 0, []
    for stage in layout.stages:
        dtype = sizes.dtype or config.dtype
        shape = kv_shape(config, stage.layers, page_tokens=sizes.page_tokens, dtype=dtype, ranks=stage.ranks)
        for number, device in enumerate(stage.devices):
            if number < stage.ranks:
                primaries.append(device.name)
                kept_bytes += device.pages * shape.page_bytes
            else:
                workers.append((device.name, device.pages * shape.page_bytes))
    engine = PlannedProcess(
        name=ProcessKind.ENGINE.value,
        kind=ProcessKind.ENGINE,
        node=_node(primaries[0]),
        gpus=tuple(_gpu(name) for name in primaries),
        kv_bytes=kept_bytes,
    )
    return (
        engine,
        *(
            PlannedProcess(
                name=name,
                kind=ProcessKind.ATTENTION_WORKER,
                node=_node(name),
                gpus=(_gpu(name),),
                kv_bytes=kv_bytes,
            )
            for name, kv_bytes in workers
        ),
    )


def _check_devices(layout: Layout) -> None:
    names = [device.name for stage in layout.stages for device in stage.devices]
    wrong = [f"device {name!r} of the plan must be NODE/INDEX, such as gpu2/0" for name in names if not _is_gpu(name)]
    if not wrong:
        first = _node(layout.stages[0].devices[0].name)
        wrong = [
            f"the engine is on {first}, and {device.name} of stage {number} is not; all stages are in one process here"
            for number, stage in enumerate(layout.stages)
            for device in stage.devices[: stage.ranks]
            if _node(device.name) != first
        ]
    if wrong:
        raise LayoutError(*wrong)


def _is_gpu(name: str) -> bool:
    return bool(_DEVICE.fullmatch(name))


def _node(name: str) -> str:
    return name.rpartition("/")[0]


def _gpu(name: str) -> int:
    return int(name.rpartition("/")[2])
