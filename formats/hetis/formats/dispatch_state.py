"""DispatchState files, a replica stage with its devices and requests, and DispatchRequests files: see docs/dispatch.md.

See ``examples/dispatch/`` for samples. New requests may also be a bare list, or ``8000/300``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from hetis.formats import units
from hetis.formats.catalogue import UnknownNameError
from hetis.formats.errors import DocumentError, Problem, did_you_mean, shown
from hetis.formats.fields import (
    API_VERSION,
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
    kind_of,
    plain,
    present,
    read_data,
    value_of,
    whole,
)
from hetis.formats.positions import Path, Text
from hetis.formats.saved_state import (
    MAX_TOKENS,
    AttentionPiece,
    HeadsPart,
    RunningPart,
    SavedDevice,
    SavedState,
    blocks_in,
    heads_of,
    kv_element_bytes,
)
from hetis.solver.dispatch.dispatch_problem import HeadShape, Requests
from hetis.solver.dispatch.snapshot import DeviceStatus, PreparedMove
from hetis.solver.errors import InvalidProblemError

Entries = list[tuple[int, dict[str, Any]]]
count_of = partial(whole, least=0)
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


# --- checks across several fields


def _check_state(data: Mapping[str, Any]) -> Found:
    """Yield problems with names, heads, costs, head groups, moves and KV blocks, as (path, message)."""
    devices, requests, moves = (entries(data.get(name)) for name in ("devices", "requests", "moves"))
    yield from _check_heads(data)
    yield from duplicates(("devices",), devices, "name", "device")
    yield from duplicates(("requests",), requests, "id", "request")
    yield from duplicates(("moves",), moves, "number", "move")
    stage = _Stage(_heads(data), {d["name"]: (i, d) for i, d in devices if isinstance(d.get("name"), str)})
    yield from _check_devices(devices, data, stage)
    for j, request in requests:
        yield from _check_groups(j, request, stage)
    yield from _check_moves(moves, requests, stage)
    yield from _check_memory(requests, moves, data.get("num_layers"), stage)


@dataclass(frozen=True, slots=True, kw_only=False)
class _Stage:
    """The valid part of the stage: its heads, and its devices by name with their places."""

    heads: HeadShape | None
    devices: dict[str, tuple[int, dict[str, Any]]]

    def unit(self, name: str) -> int:
        """Return the number of head groups that a device takes together."""
        device = self.devices[name][1]
        tp, groups = count_of(device.get("tp")) or 1, self.heads.head_groups if self.heads else 1
        return min(tp, groups) if device.get("role") == "primary" and not (groups % tp and tp % groups) else 1


def _check_heads(data: Mapping[str, Any]) -> Found:
    heads = data.get("heads")
    if data.get("model") is None and heads is None:
        yield (), "one of model or heads is missing"
    elif data.get("model") is not None and heads is not None:
        yield ("heads",), "cannot be combined with model: both define the heads"
    if not isinstance(heads, dict):
        return
    counts = [name for name in ("kv_bytes_per_token", "exchange_bytes_per_head") if heads.get(name) is not None]
    if heads.get("head_dim") is not None:
        for name in counts:
            yield ("heads", name), "cannot be combined with head_dim, from which it follows"
    elif len(counts) < 2:
        yield ("heads",), "head_dim is missing, or kv_bytes_per_token with exchange_bytes_per_head"
    elif data.get("kv_dtype") is not None:
        yield ("kv_dtype",), "cannot be combined with heads.kv_bytes_per_token: both define the bytes"


def _check_devices(devices: Entries, data: Mapping[str, Any], stage: _Stage) -> Found:
    primary: int | None = None
    has_primary = any(device.get("role") == "primary" for _, device in devices)
    heads = data.get("heads")
    no_dim = isinstance(heads, dict) and data.get("model") is None and heads.get("head_dim") is None
    for i, device in devices:
        here = ("devices", i)
        is_primary = device.get("role") == "primary"
        if is_primary and primary is not None:
            yield (*here, "role"), f"a stage has only one primary, which is devices[{primary}]"
        primary = i if is_primary and primary is None else primary
        tp = count_of(device.get("tp"))
        if tp and tp > 1 and not is_primary and device.get("role") in (None, "worker"):
            yield (*here, "tp"), f"is {tp}, only the primary has several cards"
        groups = stage.heads.head_groups if stage.heads else None
        if tp and is_primary and groups and groups % tp and tp % groups:
            yield (*here, "tp"), f"is {tp}, must be a divisor or a multiple of {groups} head groups"
        if device.get("attention") is None and device.get("gpu") is None:
            yield here, "attention is missing: give its pieces, or a gpu type to model them"
        if device.get("attention") is None and device.get("gpu") is not None and no_dim:
            yield (*here, "gpu"), "cannot be modelled without model or heads.head_dim: give attention"
        if has_primary and not is_primary and device.get("link") is None:
            yield here, "link is missing: the time of an exchange with the primary"
        if device.get("blocks") is None and device.get("kv_memory") is None:
            yield here, "one of blocks or kv_memory is missing"
        elif device.get("blocks") is not None and device.get("kv_memory") is not None:
            yield (*here, "kv_memory"), "cannot be combined with blocks: both define the memory"


def _check_groups(j: int, request: dict[str, Any], stage: _Stage) -> Found:
    groups = request.get("groups")
    if not isinstance(groups, dict):
        return
    path = ("requests", j, "groups")
    for name, count in groups.items():
        if name not in stage.devices:
            yield (*path, name), f"unknown device {shown(name)}{did_you_mean(name, stage.devices)}"
            continue
        unit, held = stage.unit(name), count_of(count)
        if held and held % unit:
            yield (*path, name), f"is {held}, the primary takes {unit} head groups at a time"
        if held and stage.devices[name][1].get("status") == "lost":
            yield (*path, name), f"is {held}, but {name} is lost and holds nothing"
    counts = [count_of(count) for count in groups.values()]
    total = sum(count or 0 for count in counts)
    if stage.heads and None not in counts and total != stage.heads.head_groups:
        yield path, f"sum to {total}, must be {stage.heads.head_groups}: each head group is on one device"


def _check_moves(moves: Entries, requests: Entries, stage: _Stage) -> Found:
    held = {request["id"]: request.get("groups") for _, request in requests if isinstance(request.get("id"), str)}
    leaving = Counter[tuple[str, str]]()
    for i, move in moves:
        here = ("moves", i)
        request, source, target = (move.get(name) for name in ("request", "from", "to"))
        if isinstance(request, str) and request not in held:
            yield (*here, "request"), f"unknown request {shown(request)}{did_you_mean(request, held)}"
        for name, device in (("from", source), ("to", target)):
            if isinstance(device, str) and device not in stage.devices:
                yield (*here, name), f"unknown device {shown(device)}{did_you_mean(device, stage.devices)}"
        if isinstance(target, str) and source == target:
            yield (*here, "to"), f"is {shown(target)}, which is also the source of the head groups"
        count, groups = count_of(move.get("groups")), held.get(request) if isinstance(request, str) else None
        if not (count and isinstance(groups, dict) and isinstance(request, str) and source in stage.devices):
            continue
        leaving[request, source] += count
        there = count_of(groups.get(source, 0))
        if there is not None and leaving[request, source] > there:
            message = f"is {count}, {leaving[request, source]} in all leave {source}, which holds {there} of {request}"
            yield (*here, "groups"), message


def _check_memory(requests: Entries, moves: Entries, num_layers: Any, stage: _Stage) -> Found:
    if stage.heads is None:
        return
    used, blocks_of = Counter[str](), dict[str, int]()
    for _, request in requests:
        context, groups = count_of(request.get("context_tokens")), request.get("groups")
        if not context or not isinstance(groups, dict):
            continue
        blocks = -(-context // stage.heads.block_tokens)
        if isinstance(request.get("id"), str):
            blocks_of[request["id"]] = blocks
        for name, count in groups.items():
            used[name] += blocks * (count_of(count) or 0)
    for _, move in moves:
        mover, target = move.get("request"), move.get("to")
        if isinstance(mover, str) and isinstance(target, str):
            used[target] += blocks_of.get(mover, 0) * (count_of(move.get("groups")) or 0)
    for name, (i, device) in stage.devices.items():
        total, field = _total_blocks(device, count_of(num_layers), stage.heads)
        if total is not None and used[name] > total:
            yield ("devices", i, field), f"holds {total} KV blocks per layer, {used[name]} are in use"


def _total_blocks(device: dict[str, Any], num_layers: int | None, heads: HeadShape) -> tuple[int | None, str]:
    blocks, memory = device.get("blocks"), device.get("kv_memory")
    if blocks is not None or not num_layers or not heads.kv_bytes_per_token or not isinstance(memory, str):
        return count_of(blocks), "blocks"
    try:
        size = units.parse_bytes(memory)
    except ValueError:
        return None, "kv_memory"
    return blocks_in(size, heads=heads, num_layers=num_layers, tp=count_of(device.get("tp")) or 1), "kv_memory"


def _heads(data: Mapping[str, Any]) -> HeadShape | None:
    """Return the heads, or None if they are invalid."""
    model, heads, dtype = data.get("model"), data.get("heads"), data.get("kv_dtype")
    block_tokens = count_of(data.get("block_tokens", 16))
    inline = None
    if isinstance(heads, dict):
        groups, queries, dim = (count_of(heads.get(name)) for name in ("groups", "queries_per_group", "head_dim"))
        if not groups or not queries:
            return None
        kv_bytes = heads.get("kv_bytes_per_token")
        inline = HeadsPart.model_construct(
            groups=groups,
            queries_per_group=queries,
            head_dim=dim or None,
            kv_bytes_per_token=kv_bytes if isinstance(kv_bytes, int | float) and 0 <= kv_bytes < 1e12 else 0.0,
        )
    if not (model is None or isinstance(model, str)) or not (dtype is None or isinstance(dtype, str)):
        return None
    try:
        return heads_of(model, inline, dtype, block_tokens or 16)
    except (InvalidProblemError, UnknownNameError, ValueError):
        return None


DISPATCH_STATE = kind_of(DispatchStateDocument, SavedState, to_value=_to_state, to_data=_state_data, check=_check_state)
load_state, parse_state, state_to_data = DISPATCH_STATE.load, DISPATCH_STATE.parse, DISPATCH_STATE.to_data


# --- new requests


class NewRequestPart(DocumentPart):
    """A new request: tokens of context after its prefill, and expected output tokens, for which memory is reserved."""

    id: Title
    context_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    output_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequests:
    """New requests in their order of admission."""

    requests: tuple[NewRequestPart, ...]

    def to_solver(self) -> Requests:
        """Return the same as arrays."""
        return Requests(
            ids=tuple(request.id for request in self.requests),
            context_tokens=np.array([request.context_tokens for request in self.requests], np.int64),
            growth_tokens=np.array([request.output_tokens for request in self.requests], np.int64),
        )


class DispatchRequestsDocument(Document):
    """New requests in order of admission: if memory is short, the later ones wait."""

    kind: Literal["DispatchRequests"]
    requests: list[NewRequestPart]


DISPATCH_REQUESTS = kind_of(
    DispatchRequestsDocument,
    NewRequests,
    to_value=lambda document: NewRequests(requests=tuple(document.requests)),
    to_data=plain,
    check=lambda data: duplicates(("requests",), entries(data.get("requests")), "id", "request"),
)


def load_requests(path: str | os.PathLike[str]) -> NewRequests:
    """Return the requests in a document or its bare list (``-``: stdin). Raises DocumentError with every problem."""
    data, source = read_data(path)
    if isinstance(data, list):
        data, source = {"apiVersion": API_VERSION, "kind": "DispatchRequests", "requests": data}, _BareList(source)
    return DISPATCH_REQUESTS.parse(data, source)


def requests_from_words(words: Iterable[str], taken: Collection[str] = ()) -> NewRequests:
    """Return requests written as ``CONTEXT/OUTPUT``, named ``new-0``, ``new-1``, ... avoiding the names in ``taken``.
    Raises DocumentError with every word that is not a pair of this form.
    """
    found, problems = list[NewRequestPart](), list[Problem]()
    names = (name for n in range(2**31) if (name := f"new-{n}") not in taken)
    for word in words:
        match = re.fullmatch(r"(\d{1,10})/(\d{1,10})", word)
        context, output = (int(match[1]), int(match[2])) if match else (0, 0)
        if 1 <= context <= MAX_TOKENS >= output:
            found.append(NewRequestPart(id=next(names), context_tokens=context, output_tokens=output))
        else:
            message = f"{word[:80]!r} is not a pair of context and expected output tokens such as 8000/300"
            problems.append(Problem(file="request", message=message))
    if problems:
        raise DocumentError(problems)
    return NewRequests(requests=tuple(found))


@dataclass(slots=True, init=False)
class _BareList(Text):
    """The text of a document given as only its list: paths in problems omit the list's field."""

    def __init__(self, source: Text) -> None:
        Text.__init__(self, file=source.file, text=source.text, _root=source._root, problems=source.problems)

    def problem(self, path: Path, message: str) -> Problem:
        return Text.problem(self, path[1:], message)
