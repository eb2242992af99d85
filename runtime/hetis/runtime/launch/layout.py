"""Which devices an engine gets and how much KV each holds: from a plan's replica, from options, or from free memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetis.runtime.kv.memory import free_memory_bytes
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.room import DeviceRoom
from hetis.runtime.measured.coefficients import Coefficients
from hetis.runtime.measured.planned import planned_coefficients
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.model.errors import ModelError
from hetis.runtime.model.shard import Shard
from hetis.solver.plan import Plan, ReplicaPlan, StagePlan

_SHARE = re.compile(r"(/\d+)\.stage\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePages:
    """A device and its KV pages; ``device`` is torch's name of it where it is in this process."""

    name: str
    pages: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayout:
    """A stage, or one copy of it.

    Attributes:
        layers: of the model.
        ranks: tensor-parallel ranks of its primary.
        devices: the primary's ranks first, then its attention workers.
    """

    layers: range
    ranks: int
    devices: tuple[DevicePages, ...]

    @property
    def primary(self) -> tuple[str, ...]:
        """Devices of torch that the ranks compute on."""
        return tuple(device.device for device in self.devices[: self.ranks])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a replica's plan asks of the engine.

    Attributes:
        stages: in the order of their layers, copies of a stage one after another, with the KV that the plan counts on.
        seats: requests that decode together; 0 of a prefill replica, whose chunks take as many prompts as they hold.
        in_flight: micro-batches on their way through the pipeline.
        chunk_tokens: prompt tokens per step; 0 of a decode replica.
        costs: of attention on the devices, by name, as far as the plan says.
    """

    stages: tuple[StageLayout, ...]
    seats: int
    in_flight: int
    chunk_tokens: int
    costs: Mapping[str, Coefficients] = field(default_factory=dict)

    @property
    def attention_workers(self) -> tuple[str, ...]:
        """Names of the devices that are no primary."""
        return tuple(device.name for stage in self.stages for device in stage.devices[stage.ranks :])


def share_of(card: str, stage: int) -> str:
    """What the part of a shared card is called that serves one stage, counted with copies one after another."""
    return f"{card}.stage{stage}"


def card_of(device: str) -> str:
    """The plan's name of the card that a device of a layout is on: a shared card has a device for each stage."""
    return _SHARE.sub(r"\1", device)


def layout_of(
    plan: Plan, replica: int, config: ModelConfig, *, page_tokens: int, kv_tokens: int | None = None
) -> Layout:
    """The layout of one replica; ``kv_tokens`` in place of the plan's KV room, for a smaller machine.

    Raises:
        LayoutError: there is no such replica, the plan is of another model, or it asks for what this engine lacks.
        DocumentError: a document in the plan is not usable.
    """
    if not 0 <= replica < len(plan.replicas):
        raise LayoutError(f"there is no replica {replica}, the plan has {len(plan.replicas)}, counted from 0")
    found = plan.replicas[replica]
    wrong = [*_other_model(plan, config), *_not_possible(found, config)]
    if wrong:
        raise LayoutError(*wrong)
    tokens = kv_tokens or found.kv_tokens
    copies = [(number, copy) for number, stage in enumerate(found.stages) for copy in range(stage.copies)]
    stages = tuple(
        _copy_layout(found, number, copy, place=place, pages=-(-tokens // found.stages[number].copies // page_tokens))
        for place, (number, copy) in enumerate(copies)
    )
    costs = planned_coefficients(plan, replica)
    names = [device.name for stage in stages for device in stage.devices]
    return Layout(
        stages=stages,
        seats=found.micro_batch * found.in_flight,
        in_flight=found.in_flight,
        chunk_tokens=found.chunk_tokens,
        costs={name: costs[card_of(name)] for name in names if card_of(name) in costs},
    )


def _copy_layout(replica: ReplicaPlan, number: int, copy: int, *, place: int, pages: int) -> StageLayout:
    """One copy of a stage, whose heads hold ``pages`` each; ``place``: its own among stages and their copies.

    Of a card that the stages share it has what its own heads need: the plan's KV room is what fits there with the heads
    of all stages.
    """
    stage = replica.stages[number]
    ranks = stage.devices[copy * stage.tp : (copy + 1) * stage.tp]
    devices = [DevicePages(name=name, pages=stage.kv_head_groups_kept * pages) for name in ranks]
    for pool in replica.attention_workers:
        if pool.stage == number:
            cards = len(pool.devices) // stage.copies
            each = -(-pool.kv_head_groups * stage.tp * pages // cards)
            own = pool.devices[copy * cards : (copy + 1) * cards]
            names = [share_of(card, place) for card in own] if pool.shared else own
            devices += [DevicePages(name=name, pages=each) for name in names]
    first = stage.first_layer
    return StageLayout(layers=range(first, first + stage.num_layers), ranks=stage.tp, devices=tuple(devices))


def pages_of(
    rooms: Sequence[DeviceRoom], shape: KvShape, *, free_bytes: Callable[[str], int] = free_memory_bytes
) -> tuple[DevicePages, ...]:
    """As many pages as fit into each device's memory; ``free_bytes`` says what is free on a device of torch.

    Raises:
        LayoutError: into one not even a single page.
    """
    unsized = Counter(room.device for room in rooms if room.kv_bytes is None)
    halves = {device: free_bytes(device) // 2 // count for device, count in unsized.items()}
    sizes = [halves[room.device] if room.kv_bytes is None else room.kv_bytes for room in rooms]
    wrong = [
        f"--device {room.name} has {size} bytes for KV, one page of this model takes {shape.page_bytes}"
        for room, size in zip(rooms, sizes, strict=True)
        if size < shape.page_bytes
    ]
    if wrong:
        raise LayoutError(*wrong)
    return tuple(
        DevicePages(name=room.name, pages=size // shape.page_bytes, device=room.device)
        for room, size in zip(rooms, sizes, strict=True)
    )


def one_device(
    config: ModelConfig,
    shape: KvShape,
    *,
    seats: int,
    max_tokens: int,
    chunk_tokens: int,
    free_bytes: int,
    device: str = "cpu",
) -> DevicePages:
    """The primary alone, with room for all seats at full length, or half of the free memory with that of prompts."""
    wanted = seats * config.kv_heads * shape.pages(max_tokens)
    # Prompts under way take the longest context and a chunk; the longest context is no longer than all KV there is.
    half = free_bytes // 2 // shape.page_bytes
    chunk, longest = (config.kv_heads * shape.pages(tokens) for tokens in (chunk_tokens, max_tokens))
    pages = max(1, min(wanted, max(half - chunk - longest, (half - chunk) // 2)))
    return DevicePages(name=f"{device.partition(':')[0]}0", pages=pages, device=device)


def refuse_if_too_large(
    needed_bytes: int, *, free_bytes: int, prompt_bytes: int = 0, where: str = "this machine"
) -> None:
    """Raises LayoutError: KV of all devices here, with that of prompts under way, is more than ``where`` has free."""
    if needed_bytes + prompt_bytes > free_bytes:
        beside = f", and {_mib(prompt_bytes)} MiB for prompts under way" if prompt_bytes else ""
        raise LayoutError(
            f"KV of {_mib(needed_bytes)} MiB is asked for{beside}, {_mib(free_bytes)} MiB of {where}'s memory are free"
        )


def _other_model(plan: Plan, config: ModelConfig) -> list[str]:
    """Differences between the model that was planned for and the one in the folder."""
    documents = plan.inputs.get("documents")
    model = documents.get("model") if isinstance(documents, Mapping) else None
    if not isinstance(model, Mapping):
        planned_layers = sum(stage.num_layers for stage in plan.replicas[0].stages)
        same = planned_layers == config.layers
        return [] if same else [f"the plan is of a model with {planned_layers} layers, this one has {config.layers}"]
    here: dict[str, Any] = {
        "num_layers": config.layers,
        "hidden": config.hidden,
        "intermediate": config.intermediate,
        "q_heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab,
    }
    other = [f"{name} {model.get(name)}, not {value}" for name, value in here.items() if model.get(name) != value]
    if not other:
        return []
    return [f"the plan is of another model ({model.get('name', 'without a name')}): {', '.join(other)}"]


def _not_possible(replica: ReplicaPlan, config: ModelConfig) -> list[str]:
    """What the replica needs that this engine cannot do."""
    wrong = []
    for number, stage in enumerate(replica.stages):
        wrong += _wrong_split(replica, number, stage, config)
    planned = sum(stage.num_layers for stage in replica.stages)
    if planned != config.layers:
        wrong.append(f"the plan's stages have {planned} layers, the model {config.layers}")
    return wrong


def _wrong_split(replica: ReplicaPlan, number: int, stage: StagePlan, config: ModelConfig) -> list[str]:
    """Whether a stage's ranks divide the model, and together with its attention workers hold all heads."""
    where = f"stage {number}: " if len(replica.stages) > 1 else ""
    if stage.tp > 1:
        try:
            Shard(size=stage.tp).check(config)
        except ModelError as error:
            return [f"{where}{error}"]
    on_workers = sum(pool.kv_head_groups for pool in replica.attention_workers if pool.stage == number)
    kept = (stage.kv_head_groups_kept + on_workers) * stage.tp
    heads = max(config.kv_heads, stage.tp)
    return [] if kept == heads else [f"{where}the plan places {kept} KV heads, the model has {heads}"]


def _mib(size: int) -> int:
    return size // 2**20
