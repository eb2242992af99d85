"""Checks of what agents send: versions, epochs, names, and the sizes of what the planner keeps."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence, Sized
from typing import Any

from google.protobuf.message import Message

from hetis.formats.cluster import MAX_GPUS_PER_NODE
from hetis.planner.failures import Reason, ServiceError, invalid_field
from hetis.planner.fleet.agents.deltas import MOST_GENERATION, protocol_violation
from hetis.planner.fleet.settings import FleetCounters
from hetis.v1 import agent_service_pb2, failure_pb2, inventory_pb2, report_pb2, traffic_pb2

_log = logging.getLogger("hetis.planner.fleet")
PROTOCOL_VERSION = 1
MOST_CHARACTERS = 255  # limit on any text that is kept: names, versions, digests
MOST_BYTES = 128 * 2**10  # limit on an inventory, and on the reports of all devices: enough for the largest node
MOST_NUMBER = 1e15  # limit on any measured number; sums of those of all replicas remain finite
MOST_FAILURE_BYTES, MOST_FAILURE_CHARACTERS = 16 * 2**10, 4_000  # a larger failure is kept with so much of its message
_ENDPOINT = re.compile(r"[\w.:\[\]-]{1,255}", re.ASCII)  # host:port; routers are configured with it

Request = agent_service_pb2.ConnectNodeRequest


def check_hello(request: Request, *, epoch: int) -> agent_service_pb2.Hello:
    """Return the Hello in a stream's first message.

    Raises PROTOCOL_VIOLATION, PROTOCOL_VERSION, STALE_EPOCH or INVALID_FIELD.
    """
    if request.WhichOneof("message") != "hello":
        kind = request.WhichOneof("message") or "none"
        raise protocol_violation(f"the first message of a stream must be a hello, this is {kind}")
    hello = request.hello
    if not hello.min_protocol_version <= PROTOCOL_VERSION <= hello.protocol_version:
        raise ServiceError(
            Reason.ERROR_REASON_PROTOCOL_VERSION,
            f"this planner supports protocol version {PROTOCOL_VERSION}, the agent {hello.min_protocol_version} to"
            f" {hello.protocol_version}",
            metadata={
                "protocol_version": hello.protocol_version,
                "min_version": PROTOCOL_VERSION,
                "max_version": PROTOCOL_VERSION,
            },
        )
    newest = max((hello.newest_epoch, *(held.epoch for held in hello.replicas)))
    if newest > epoch:
        raise stale_epoch("has followed", newest, epoch)
    check_replicas([*hello.replicas, *hello.changes])
    for field in ("agent_version", "boot_id", "inventory_digest"):
        if not getattr(hello, field):
            raise invalid_field(f"hello.{field}", "is required")
    _check_texts(hello, "hello")
    return hello


def stale_epoch(obeys: str, newest: int, epoch: int) -> ServiceError:
    message = f"the agent {obeys} epoch {newest}, but this planner's epoch is {epoch}"
    return ServiceError(Reason.ERROR_REASON_STALE_EPOCH, message, metadata={"epoch": epoch, "newest_epoch": newest})


def check_replicas(listed: Iterable[Any]) -> None:
    """Check the names and generations in an agent's list of replicas or changes. Raises PROTOCOL_VIOLATION.

    The names become parameters of queries, and PostgreSQL has no texts with NUL.
    """
    for one in listed:
        if one.generation > MOST_GENERATION:
            raise protocol_violation(f"a generation is above {MOST_GENERATION}, the maximum")
        for name in (one.replica, getattr(one, "change_id", "")):
            if len(name) > MOST_CHARACTERS:
                message = f"the name of a replica or change has more than {MOST_CHARACTERS} characters, the maximum"
                raise protocol_violation(message)
            if not name.isprintable():
                raise protocol_violation(f"the name of a replica or change is {name[:80]!r}, must be printable")


def check_inventory(inventory: inventory_pb2.NodeInventory) -> None:
    """Check the sizes of an inventory, which stays in memory and in the store. Raises INVALID_FIELD."""
    _check_number(inventory.devices, "inventory.devices")
    _check_texts(inventory, "inventory")
    for position, device in enumerate(inventory.devices):
        field = f"inventory.devices[{position}]"
        _check_number(device.linked_devices, f"{field}.linked_devices")
        _check_texts(device, field)
    _check_bytes(inventory.ByteSize(), "inventory")  # it may have fields that only newer versions know


def check_device_reports(devices: Sequence[report_pb2.DeviceReport]) -> None:
    """Check the sizes of the reports of a node's devices, which stay in memory. Raises INVALID_FIELD."""
    _check_number(devices, "report.devices")
    _check_bytes(sum(device.ByteSize() for device in devices), "report.devices")


def drop_impossible(report: agent_service_pb2.NodeReport) -> list[str]:
    """Set what cannot be to "not known" in a report, and return the names of those fields.

    Scrapers report NaN now and then: the node stays, but sums, plans, pages and routers never see such values.
    """
    found = list[str]()

    def drop(message: Message, name: str, is_possible: bool) -> None:
        if not is_possible:
            message.ClearField(name)
            found.append(name)

    def check(message: Message, *names: str, least: float = 0.0) -> None:
        for name in names:
            drop(message, name, least <= getattr(message, name) <= MOST_NUMBER)

    for device in report.devices:
        check(device, "busy_ratio", "clock_hz", "power_w")
        check(device, "temperature_c", least=-MOST_NUMBER)
    for one in report.replicas:
        check(one, "ttft_s", "tpot_s")
        for load in (load for stage in one.stages for load in stage.devices):
            check(load, "observed_s", "predicted_s")
        if one.HasField("traffic"):
            drop(one, "traffic", all(0 <= number <= MOST_NUMBER for number in _numbers(one.traffic)))
        drop(one, "endpoint", not one.endpoint or _ENDPOINT.fullmatch(one.endpoint) is not None)
        drop(one, "engine_id", len(one.engine_id) <= MOST_CHARACTERS)
    return found


def _numbers(traffic: traffic_pb2.Traffic) -> Iterable[float]:
    yield from (traffic.observed_s, traffic.arrivals, traffic.cached_tokens)
    for field, value in traffic.ListFields():
        if field.message_type is not None:
            yield from (value.total, *value.counts)


def shorten_failures(said: Iterable[Any]) -> None:
    """Shorten failures that are too large to be kept: they go to the store, and into lists of replicas."""
    for one in said:
        if one.HasField("failure") and one.failure.ByteSize() > MOST_FAILURE_BYTES:
            message = one.failure.message[:MOST_FAILURE_CHARACTERS] + "..."
            one.failure.CopyFrom(failure_pb2.Failure(reason=one.failure.reason, message=message))


def _check_texts(message: Message, field: str) -> None:
    for part, value in message.ListFields():
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            raise invalid_field(
                f"{field}.{part.name}", f"has {len(value)} characters, at most {MOST_CHARACTERS} are allowed"
            )


def _check_number(entries: Sized, field: str) -> None:
    if len(entries) > MAX_GPUS_PER_NODE:
        raise invalid_field(field, f"has {len(entries)} entries, at most {MAX_GPUS_PER_NODE} are allowed")


def _check_bytes(num_bytes: int, field: str) -> None:
    if num_bytes > MOST_BYTES:
        raise invalid_field(field, f"has {num_bytes} bytes, at most {MOST_BYTES} are allowed")


def note_refused(error: ServiceError, counters: FleetCounters) -> None:
    """Count a refused stream, and log what an operator must do about it."""
    counters.hellos_refused[error.reason_name] += 1
    if error.reason == Reason.ERROR_REASON_STALE_EPOCH:
        # Without the node's name: one line, and not one per agent.
        _log.error(
            "agents have followed a later planner than this one, which they refuse until its epoch is higher."
            " Either another planner leads, or the store was replaced by a new or an older one:"
            " see docs/operations.md",
            extra=dict(error.metadata),
        )
