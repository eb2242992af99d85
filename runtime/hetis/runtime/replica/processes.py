"""Which processes a replica of a plan is, and where each runs: the one list that every way to start them reads."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from hetis.runtime.engine.stage import kv_shape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import Layout, card_of, layout_of
from hetis.runtime.model.config import ModelConfig
from hetis.solver.plan import Plan

_DEVICE = re.compile(r".+/\d{1,4}")


class ProcessKind(StrEnum):
    """What a process is. ``engine`` has the scheduler, the front, the store and the first stage."""

    ENGINE = "engine"
    STAGE = "stage"
    ATTENTION_WORKER = "attention-worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProcess:
    """One process.

    Attributes:
        name: its device as the layout calls it, of a stage the first; ``engine`` for the engine.
        stage: that it is part of, counted from 0 with copies of a stage one after another.
        node: where it runs.
        gpus: which of the node's GPUs are its own, counted from 0.
        kv_bytes: memory for KV, as much as the plan counts on.
        sharing: how many of the replica's processes use these GPUs: a card that stages share has one for each of them.
    """

    name: str
    kind: ProcessKind
    stage: int
    node: str
    gpus: tuple[int, ...]
    kv_bytes: int
    sharing: int = 1


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
    """The engine with the first stage, the other stages, each in a process so that all work at the same time, and every
    attention worker, of a card that stages share one for each stage.

    Raises:
        LayoutError: the engine cannot run this replica; all the reasons.
    """
    layout = layout_of(plan, replica, config, page_tokens=sizes.page_tokens, kv_tokens=sizes.kv_tokens)
    _check_devices(layout)
    used = Counter(card_of(name) for name in layout.attention_workers)
    primaries, workers = [], []
    for number, stage in enumerate(layout.stages):
        dtype = sizes.dtype or config.dtype
        shape = kv_shape(config, stage.layers, page_tokens=sizes.page_tokens, dtype=dtype, ranks=stage.ranks)
        ranks = stage.devices[: stage.ranks]
        primaries.append(
            PlannedProcess(
                name=ranks[0].name if number else ProcessKind.ENGINE.value,
                kind=ProcessKind.STAGE if number else ProcessKind.ENGINE,
                stage=number,
                node=node_of(ranks[0].name),
                gpus=tuple(_gpu(rank.name) for rank in ranks),
                kv_bytes=sum(rank.pages for rank in ranks) * shape.page_bytes,
            )
        )
        workers += [
            PlannedProcess(
                name=device.name,
                kind=ProcessKind.ATTENTION_WORKER,
                stage=number,
                node=node_of(device.name),
                gpus=(_gpu(device.name),),
                kv_bytes=device.pages * shape.page_bytes,
                sharing=used[card_of(device.name)],
            )
            for device in stage.devices[stage.ranks :]
        ]
    return (*primaries, *workers)


def _check_devices(layout: Layout) -> None:
    names = [device.name for stage in layout.stages for device in stage.devices]
    wrong = [f"device {name!r} of the plan must be NODE/INDEX, such as gpu2/0" for name in names if not _is_gpu(name)]
    for number, stage in enumerate(layout.stages):
        ranks = [rank.name for rank in stage.devices[: stage.ranks]]
        if len({node_of(name) for name in ranks}) > 1:
            wrong.append(f"stage {number} is on several nodes, must be on one: {', '.join(ranks)}")
    if wrong:
        raise LayoutError(*wrong)


def _is_gpu(name: str) -> bool:
    return bool(_DEVICE.fullmatch(card_of(name)))


def node_of(name: str) -> str:
    """The node of a device."""
    return card_of(name).rpartition("/")[0]


def _gpu(name: str) -> int:
    return int(card_of(name).rpartition("/")[2])
