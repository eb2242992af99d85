"""DispatchState files, a replica stage with its devices and requests: see docs/dispatch.md, and ``examples/dispatch/``
for samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

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
from hetis.formats.errors import did_you_mean, shown
from hetis.formats.fields import (
    UNLIMITED,
    Document,
    DocumentPart,
    Duration,
    Found,
    GpuName,
    ModelName,
    Ratio,
    SecondsPerByte,
    Size,
    Title,
    duplicates,
    entries,
    mapping,
    value_of,
)
from hetis.formats.kinds import kind_of
from hetis.formats.positions import Path
from hetis.solver.dispatch.dispatch_problem import HeadShape
from hetis.solver.dispatch.snapshot import PreparedMove

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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tp > 1 and self.role == "worker":
            raise ValueError(f"tp is {self.tp}, only the primary has several cards")
        if self.attention is None and self.gpu is None:
            raise ValueError("attention is missing: give its pieces, or a gpu type to model them")
        if (self.blocks is None) == (self.kv_memory is None):
            raise ValueError("one of blocks or kv_memory is needed, and not both: each defines the memory")
        return self


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


def _heads(document: DispatchStateDocument) -> HeadShape:
    return heads_of(document.model, document.heads, document.kv_dtype, document.block_tokens)


def _blocks(part: DevicePart, heads: HeadShape, num_layers: int) -> int:
    if part.blocks is not None:
        return part.blocks
    return blocks_in(part.kv_memory or 0, heads=heads, num_layers=num_layers, tp=part.tp)


def _to_state(document: DispatchStateDocument) -> SavedState:
    heads = _heads(document)

    def device(part: DevicePart) -> SavedDevice:
        pieces = part.attention
        return value_of(
            SavedDevice,
            part,
            attention=pieces
            and tuple(AttentionPiece(head_s=p.head, kv_byte_s=p.kv_read, call_s=p.call) for p in pieces),
            link_byte_s=part.link.bandwidth if part.link else 0.0,
            link_s=part.link.latency if part.link else 0.0,
            move_byte_s=part.move_bandwidth,
            total_blocks=_blocks(part, heads, document.num_layers),
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


def check_state(data: Mapping[str, Any]) -> Found:
    """Yield problems with names of devices and requests, roles and links, as (path, message)."""
    devices, requests, moves = (entries(data.get(name)) for name in ("devices", "requests", "moves"))
    yield from duplicates(("devices",), devices, "name", "device")
    yield from duplicates(("requests",), requests, "id", "request")
    primaries = [i for i, device in devices if device.get("role") == "primary"]
    for i in primaries[1:]:
        yield ("devices", i, "role"), f"a stage has only one primary, which is devices[{primaries[0]}]"
    for i, device in devices:
        if primaries and i not in primaries and device.get("link") is None:
            yield ("devices", i), "link is missing: the time of an exchange with the primary"
    known = {"device": [device.get("name") for _, device in devices], "request": [one.get("id") for _, one in requests]}
    named: list[tuple[str, Path, Any]] = [
        ("device", ("requests", j, "groups", name), name) for j, one in requests for name in mapping(one.get("groups"))
    ]
    for i, move in moves:
        named += [("device", ("moves", i, end), move.get(end)) for end in ("from", "to")]
        named.append(("request", ("moves", i, "request"), move.get("request")))
    for what, path, name in named:
        if isinstance(name, str) and name not in known[what]:
            names = [one for one in known[what] if isinstance(one, str)]
            yield path, f"unknown {what} {shown(name)}{did_you_mean(name, names)}"


def check_sums(document: DispatchStateDocument) -> Found:
    """Yield problems with sums of head groups and of KV blocks; the solver's values refuse other contradictions."""
    heads, used = _heads(document), Counter[str]()
    blocks_of = {request.id: -(-request.context_tokens // document.block_tokens) for request in document.requests}
    lost = {device.name for device in document.devices if device.status == "lost"}
    for j, request in enumerate(document.requests):
        total = sum(request.groups.values())
        if total != heads.head_groups:
            message = f"sum to {total}, must be {heads.head_groups}: each head group is on one device"
            yield ("requests", j, "groups"), message
        for name, count in request.groups.items():
            used[name] += blocks_of[request.id] * count
            if count and name in lost:
                yield ("requests", j, "groups", name), f"is {count}, but {name} is lost and holds nothing"
    for move in document.moves:
        used[move.target] += blocks_of[move.request] * move.groups
    for i, device in enumerate(document.devices):
        total = _blocks(device, heads, document.num_layers)
        if used[device.name] > total:
            field = "kv_memory" if device.blocks is None else "blocks"
            yield ("devices", i, field), f"holds {total} KV blocks per layer, {used[device.name]} are in use"


DISPATCH_STATE = kind_of(
    DispatchStateDocument, SavedState, to_value=_to_state, check=check_state, check_sums=check_sums
)
load_state, parse_state = DISPATCH_STATE.load, DISPATCH_STATE.parse
