"""DispatchState files, a replica stage with its devices and requests: see docs/dispatch.md, and ``examples/dispatch/``
for samples.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetis.formats import units
from hetis.formats.dispatch.checks import check_state
from hetis.formats.dispatch.saved_state import (
    AttentionPiece,
    HeadsPart,
    RunningPart,
    SavedDevice,
    SavedState,
    blocks_in,
    heads_of,
    kv_element_bytes,
)
from hetis.formats.fields import (
    UNLIMITED,
    Document,
    DocumentPart,
    Duration,
    GpuName,
    ModelName,
    Ratio,
    SecondsPerByte,
    Size,
    Title,
    plain,
    present,
    value_of,
)
from hetis.formats.kinds import kind_of
from hetis.solver.dispatch.snapshot import DeviceStatus, PreparedMove

MAX_BLOCKS = 2**40


def _dtype(value: str) -> str:
    kv_element_bytes(value)
    return value


class AttentionPart(DocumentPart):
    """One affine piece of decode attention on one card: time per query head, rate of reading KV, time per call."""

    head: Duration = 0.0
    kv_read: Annotated[SecondsPerByte, Field(json_schema_extra={"default": UNLIMITED})] = 0.0
    call: Duration = 0.0


class StageLinkPart(DocumentPart):
    """Time of an exchange with the primary: ``latency + bytes / bandwidth``, at achieved rather than nominal rates."""

    bandwidth: SecondsPerByte
    latency: Duration


class DevicePart(DocumentPart):
    """A device. Its costs are given by ``attention`` (the slowest piece counts), or modelled from the ``gpu`` type.

    KV memory is the number of ``blocks`` per layer, or ``kv_memory`` for all layers; for the primary, of all its cards
    together.
    """

    name: Title
    role: Literal["primary", "worker"] = "worker"
    tp: Annotated[int, Field(ge=1, le=1024)] = 1
    gpu: GpuName | None = None
    attention: Annotated[list[AttentionPart], Field(min_length=1, max_length=100)] | None = None
    link: StageLinkPart | None = None
    move_bandwidth: SecondsPerByte | None = None
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)] | None = None
    kv_memory: Size | None = None
    status: Literal["ok", "draining", "lost"] = "ok"
    high_water: Ratio = 0.9
    changed: bool = False


class MovePart(DocumentPart):
    """Head groups in transit. ``from`` owns them until they have arrived; both ends hold blocks for them."""

    number: Annotated[int, Field(ge=0, le=2**53)]
    request: str
    groups: Annotated[int, Field(ge=1, le=100_000)]
    source: Annotated[str, Field(alias="from")]
    target: Annotated[str, Field(alias="to")]


class DispatchStateDocument(Document):
    """One stage of a replica: the shape of its attention heads, its devices, and the running requests."""

    kind: Literal["DispatchState"]
    name: Title
    model: ModelName | None = None
    heads: HeadsPart | None = None
    kv_dtype: Annotated[str, AfterValidator(_dtype)] | None = None
    block_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    devices: Annotated[list[DevicePart], Field(min_length=1, max_length=100_000)]
    requests: list[RunningPart] = Field(default_factory=list)
    moves: list[MovePart] = Field(default_factory=list)


# --- to values and back


def _to_state(document: DispatchStateDocument) -> SavedState:
    heads = heads_of(document.model, document.heads, document.kv_dtype, document.block_tokens)

    def device(part: DevicePart) -> SavedDevice:
        blocks = part.blocks
        if blocks is None:
            blocks = blocks_in(part.kv_memory or 0, heads=heads, num_layers=document.num_layers, tp=part.tp)
        pieces = part.attention
        return value_of(
            SavedDevice,
            part,
            attention=pieces
            and tuple(AttentionPiece(head_s=p.head, kv_byte_s=p.kv_read, call_s=p.call) for p in pieces),
            link_byte_s=part.link.bandwidth if part.link else 0.0,
            link_s=part.link.latency if part.link else 0.0,
            move_byte_s=part.move_bandwidth,
            total_blocks=blocks,
        )

    index = {part.name: i for i, part in enumerate(document.devices)}

    def request(part: RunningPart) -> RunningPart:
        return part.model_copy(update={"groups": {name: count for name, count in part.groups.items() if count}})

    return value_of(
        SavedState,
        document,
        inline=document.heads,
        devices=tuple(map(device, document.devices)),
        requests=tuple(map(request, document.requests)),
        moves=tuple(value_of(PreparedMove, m, source=index[m.source], target=index[m.target]) for m in document.moves),
    )


def _state_data(state: SavedState) -> dict[str, Any]:
    names = [device.name for device in state.devices]
    moves = [
        {"number": m.number, "request": m.request, "groups": m.groups, "from": names[m.source], "to": names[m.target]}
        for m in state.moves
    ]
    return present(
        {
            "name": state.name,
            "model": state.model,
            "heads": state.inline and state.inline.model_dump(exclude_none=True),
            "kv_dtype": state.kv_dtype,
            "block_tokens": state.block_tokens,
            "num_layers": state.num_layers,
            "devices": [_device_data(device) for device in state.devices],
            "requests": plain(state.requests),
            "moves": moves or None,
        }
    )


def _device_data(device: SavedDevice) -> dict[str, Any]:
    has_link = device.role == "worker" or device.link_byte_s or device.link_s
    usual = DevicePart.model_fields["high_water"].default
    return present(
        {
            "name": device.name,
            "role": device.role,
            "tp": device.tp if device.role == "primary" else None,
            "gpu": device.gpu,
            "attention": None if device.attention is None else [_piece_data(piece) for piece in device.attention],
            "link": {"bandwidth": _rate(device.link_byte_s), "latency": units.format_duration(device.link_s)}
            if has_link
            else None,
            "move_bandwidth": None if device.move_byte_s is None else _rate(device.move_byte_s),
            "blocks": device.total_blocks,
            "status": device.status.value if device.status is not DeviceStatus.OK else None,
            "high_water": units.format_ratio(device.high_water) if device.high_water != usual else None,
            "changed": device.changed or None,
        }
    )


def _piece_data(piece: AttentionPiece) -> dict[str, Any]:
    return present(
        {
            "head": units.format_duration(piece.head_s) if piece.head_s else None,
            "kv_read": _rate(piece.kv_byte_s) if piece.kv_byte_s else None,
            "call": units.format_duration(piece.call_s),
        }
    )


def _rate(byte_s: float) -> str:
    return units.format_seconds_per_byte(byte_s) if byte_s else UNLIMITED


DISPATCH_STATE = kind_of(DispatchStateDocument, SavedState, to_value=_to_state, to_data=_state_data, check=check_state)
load_state, parse_state, state_to_data = DISPATCH_STATE.load, DISPATCH_STATE.parse, DISPATCH_STATE.to_data
