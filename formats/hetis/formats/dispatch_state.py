"""DispatchState files: a replica stage, its devices, its requests. See ``examples/dispatch/`` and docs/dispatch.md."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetis.formats import units
from hetis.formats.dispatch_state_checks import check_state
from hetis.formats.fields import (
    API_VERSION,
    UNLIMITED,
    DocumentPart,
    Duration,
    GpuName,
    ModelName,
    Ratio,
    SecondsPerByte,
    Size,
    Title,
)
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text
from hetis.formats.saved_state import AttentionPiece, SavedDevice, SavedMove, SavedRequest, SavedState
from hetis.formats.stage_heads import InlineHeads, blocks_in, heads_of, kv_element_bytes
from hetis.solver.dispatch.snapshot import DeviceStatus

MAX_TOKENS = 10**9
MAX_BLOCKS = 2**40

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Groups = Annotated[int, Field(ge=0, le=100_000)]
Heads = Annotated[int, Field(ge=1, le=100_000)]
Bytes = Annotated[float, Field(ge=0, le=1e12)]


def _dtype(value: str) -> str:
    kv_element_bytes(value)
    return value


class HeadsPart(DocumentPart):
    """Attention heads of one layer. ``head_dim`` tells the bytes of MHA and GQA; the two byte counts tell any."""

    groups: Heads
    queries_per_group: Heads
    head_dim: Annotated[int, Field(ge=1, le=100_000)] | None = None
    kv_bytes_per_token: Bytes | None = None
    exchange_bytes_per_head: Bytes | None = None


class AttentionPart(DocumentPart):
    """One affine piece of decode attention on one card: time per query head, rate of reading KV, time per call."""

    head: Duration = 0.0
    kv_read: SecondsPerByte = 0.0
    call: Duration = 0.0


class StageLinkPart(DocumentPart):
    """What an exchange with the primary takes: ``latency + bytes / bandwidth``, as reached, not nominal."""

    bandwidth: SecondsPerByte
    latency: Duration


class DevicePart(DocumentPart):
    """A device. Costs are ``attention`` (the slowest piece counts), or else modelled from the ``gpu`` type.

    KV memory is a number of ``blocks`` per layer or ``kv_memory`` for all layers; of the primary: of all its cards.
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


class RunningPart(DocumentPart):
    """A running request: tokens attended to, output tokens still expected, head groups by device."""

    id: Title
    context_tokens: Tokens
    remaining_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)]
    groups: dict[str, Groups]


class MovePart(DocumentPart):
    """Head groups under way; ``from`` owns them until they have arrived, blocks are taken at both ends."""

    number: Annotated[int, Field(ge=0, le=2**53)]
    request: str
    groups: Annotated[int, Field(ge=1, le=100_000)]
    source: Annotated[str, Field(alias="from")]
    target: Annotated[str, Field(alias="to")]


class DispatchStateDocument(DocumentPart):
    """One replica stage: the shape of its attention heads, its devices, and the requests that run on them."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
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


def load_state(path: str | os.PathLike[str]) -> SavedState:
    """Return the state in a YAML or JSON file (``-``: standard input).

    Raises:
        DocumentError: with every problem of the file.
    """
    return parse_state(*read_data(path))


def parse_state(data: Any, source: Text) -> SavedState:
    """Return the state in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(DispatchStateDocument, data, source, to_value=_to_state, check=check_state)


def state_to_data(state: SavedState) -> dict[str, Any]:
    """Return a state's document as plain data. Reading it again gives an equal state."""
    data: dict[str, Any] = {"apiVersion": API_VERSION, "kind": "DispatchState", "name": state.name}
    if state.model is not None:
        data["model"] = state.model
    if state.inline is not None:
        data["heads"] = _heads_data(state.inline)
    if state.kv_dtype is not None:
        data["kv_dtype"] = state.kv_dtype
    data |= {"block_tokens": state.block_tokens, "num_layers": state.num_layers}
    data["devices"] = [_device_data(device) for device in state.devices]
    data["requests"] = [
        {
            "id": request.id,
            "context_tokens": request.context_tokens,
            "remaining_tokens": request.remaining_tokens,
            "groups": dict(request.groups),
        }
        for request in state.requests
    ]
    if state.moves:
        data["moves"] = [
            {"number": m.number, "request": m.request, "groups": m.groups, "from": m.source, "to": m.target}
            for m in state.moves
        ]
    return data


def _to_state(document: DispatchStateDocument) -> SavedState:
    inline = None if document.heads is None else _to_heads(document.heads)
    heads = heads_of(document.model, inline, document.kv_dtype, document.block_tokens)

    def device(part: DevicePart) -> SavedDevice:
        blocks = part.blocks
        if blocks is None:
            blocks = blocks_in(part.kv_memory or 0, heads=heads, num_layers=document.num_layers, tp=part.tp)
        return SavedDevice(
            name=part.name,
            role=part.role,
            tp=part.tp,
            gpu=part.gpu,
            attention=None if part.attention is None else tuple(map(_to_piece, part.attention)),
            link_byte_s=part.link.bandwidth if part.link else 0.0,
            link_s=part.link.latency if part.link else 0.0,
            move_byte_s=part.move_bandwidth,
            total_blocks=blocks,
            status=DeviceStatus(part.status),
            high_water=part.high_water,
            changed=part.changed,
        )

    return SavedState(
        name=document.name,
        model=document.model,
        inline=inline,
        kv_dtype=document.kv_dtype,
        block_tokens=document.block_tokens,
        num_layers=document.num_layers,
        devices=tuple(map(device, document.devices)),
        requests=tuple(
            SavedRequest(
                id=part.id,
                context_tokens=part.context_tokens,
                remaining_tokens=part.remaining_tokens,
                groups={name: count for name, count in part.groups.items() if count},
            )
            for part in document.requests
        ),
        moves=tuple(
            SavedMove(
                number=part.number, request=part.request, groups=part.groups, source=part.source, target=part.target
            )
            for part in document.moves
        ),
    )


def _to_heads(part: HeadsPart) -> InlineHeads:
    return InlineHeads(
        groups=part.groups,
        queries_per_group=part.queries_per_group,
        head_dim=part.head_dim,
        kv_bytes_per_token=part.kv_bytes_per_token or 0.0,
        exchange_bytes_per_head=part.exchange_bytes_per_head or 0.0,
    )


def _to_piece(part: AttentionPart) -> AttentionPiece:
    return AttentionPiece(head_s=part.head, kv_byte_s=part.kv_read, call_s=part.call)


def _heads_data(heads: InlineHeads) -> dict[str, Any]:
    data: dict[str, Any] = {"groups": heads.groups, "queries_per_group": heads.queries_per_group}
    if heads.head_dim is not None:
        return data | {"head_dim": heads.head_dim}
    return data | {
        "kv_bytes_per_token": heads.kv_bytes_per_token,
        "exchange_bytes_per_head": heads.exchange_bytes_per_head,
    }


def _device_data(device: SavedDevice) -> dict[str, Any]:
    data: dict[str, Any] = {"name": device.name, "role": device.role}
    if device.role == "primary":
        data["tp"] = device.tp
    if device.gpu is not None:
        data["gpu"] = device.gpu
    if device.attention is not None:
        data["attention"] = [_piece_data(piece) for piece in device.attention]
    if device.role == "worker" or device.link_byte_s or device.link_s:
        data["link"] = {"bandwidth": _rate(device.link_byte_s), "latency": units.format_duration(device.link_s)}
    if device.move_byte_s is not None:
        data["move_bandwidth"] = _rate(device.move_byte_s)
    data["blocks"] = device.total_blocks
    if device.status is not DeviceStatus.OK:
        data["status"] = device.status.value
    if device.high_water != DevicePart.model_fields["high_water"].default:
        data["high_water"] = units.format_ratio(device.high_water)
    return data | ({"changed": True} if device.changed else {})


def _piece_data(piece: AttentionPiece) -> dict[str, str]:
    data = {"head": units.format_duration(piece.head_s)} if piece.head_s else {}
    if piece.kv_byte_s:
        data["kv_read"] = _rate(piece.kv_byte_s)
    return data | {"call": units.format_duration(piece.call_s)}


def _rate(byte_s: float) -> str:
    return units.format_seconds_per_byte(byte_s) if byte_s else UNLIMITED
