"""Checks of DispatchState files across several fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from hetis.formats import units
from hetis.formats.catalogue import UnknownNameError
from hetis.formats.dispatch.saved_state import HeadsPart, blocks_in, heads_of
from hetis.formats.errors import did_you_mean, shown
from hetis.formats.fields import Found, duplicates, entries, whole
from hetis.solver.dispatch.dispatch_problem import HeadShape
from hetis.solver.errors import InvalidProblemError

Entries = list[tuple[int, dict[str, Any]]]
count_of = partial(whole, least=0)


def check_state(data: Mapping[str, Any]) -> Found:
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
