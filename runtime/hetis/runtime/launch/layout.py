"""Which devices an engine gets and how much KV each holds: from a plan's replica, from options, or from free memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.room import DeviceRoom
from hetis.runtime.measured.coefficients import Coefficients
from hetis.runtime.measured.planned import planned_coefficients
from hetis.runtime.model.config import ModelConfig
from hetis.solver.plan import Plan, ReplicaPlan, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePages:
    """A device and its KV pages."""

    name: str
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a replica's plan asks of the engine.

    Attributes:
        devices: the primary first, then its attention workers, with the KV that the plan counts on.
        seats: requests that decode together.
        chunk_tokens: prompt tokens per step.
        costs: of attention on the devices, by name, as far as the plan says.
    """

    devices: tuple[DevicePages, ...]
    seats: int
    chunk_tokens: int
    costs: Mapping[str, Coefficients] = field(default_factory=dict)


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
    (stage,) = found.stages
    pages = -(-(kv_tokens or found.kv_tokens) // page_tokens)
    devices = [DevicePages(name=stage.devices[0], pages=stage.kv_head_groups_kept * pages)]
    for pool in found.attention_workers:
        each = -(-pool.kv_head_groups * pages // len(pool.devices))
        devices += [DevicePages(name=name, pages=each) for name in pool.devices]
    return Layout(
        devices=tuple(devices),
        seats=found.micro_batch * found.in_flight,
        chunk_tokens=found.chunk_tokens,
        costs=planned_coefficients(plan, replica),
    )


def pages_of(rooms: tuple[DeviceRoom, ...], shape: KvShape) -> tuple[DevicePages, ...]:
    """As many pages as fit into each device's memory.

    Raises:
        LayoutError: into one not even a single page.
    """
    wrong = [
        f"--device {room.name} has {room.kv_bytes} bytes for KV, one page of this model takes {shape.page_bytes}"
        for room in rooms
        if room.kv_bytes < shape.page_bytes
    ]
    if wrong:
        raise LayoutError(*wrong)
    return tuple(DevicePages(name=room.name, pages=room.kv_bytes // shape.page_bytes) for room in rooms)


def one_device(config: ModelConfig, shape: KvShape, *, seats: int, max_tokens: int, free_bytes: int) -> DevicePages:
    """The primary alone, with room for all seats at full length, or half of the free memory."""
    wanted = seats * config.kv_heads * shape.pages(max_tokens)
    return DevicePages(name="cpu0", pages=max(1, min(wanted, free_bytes // 2 // shape.page_bytes)))


def refuse_if_too_large(devices: tuple[DevicePages, ...], shape: KvShape, *, free_bytes: int) -> None:
    """Raises LayoutError: the devices are all in this machine's memory, and it has less."""
    needed = sum(device.pages for device in devices) * shape.page_bytes
    if needed > free_bytes:
        raise LayoutError(
            f"KV of {_mib(needed)} MiB is asked for, {_mib(free_bytes)} MiB of this machine's memory are free"
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
    if replica.role is not Role.UNIFIED:
        wrong.append(f"the replica's role is {replica.role}; this engine runs unified ones")
    if len(replica.stages) > 1:
        wrong.append(f"the replica is a pipeline of {len(replica.stages)} stages; this engine runs one")
    for number, stage in enumerate(replica.stages):
        if stage.tp > 1:
            wrong.append(f"stage {number} has tensor parallelism of {stage.tp}; this engine has none")
        if stage.copies > 1:
            wrong.append(f"stage {number} has {stage.copies} copies; this engine runs one")
    if any(pool.shared for pool in replica.attention_workers):
        wrong.append("attention workers are shared between stages; this engine's have one stage each")
    kept = replica.stages[0].kv_head_groups_kept + sum(pool.kv_head_groups for pool in replica.attention_workers)
    if not wrong and kept != config.kv_heads:
        wrong.append(f"the plan places {kept} KV heads, the model has {config.kv_heads}")
    return wrong


def _mib(size: int) -> int:
    return size // 2**20
