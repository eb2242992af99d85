"""Names of resources and of enum values, times and durations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.timestamp_pb2 import Timestamp

ID = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
ID_RULE = "1 to 63 of a-z 0-9 -, beginning and ending with a letter or digit"
_NODE_ID = r"[^\W_][\w.-]{0,199}"  # a node's name in the cluster's document
_MADE_ID = r"[A-Za-z0-9_-]{1,100}"  # an id chosen by the planner


def is_id(text: str) -> bool:
    """Return whether a text is an id that callers may choose for a resource."""
    return re.fullmatch(ID, text) is not None


@dataclass(frozen=True, slots=True)
class NameForm:
    """The form of the names of one kind of resource; ``text`` is the form in the API's notation."""

    text: str

    def matches(self, name: str) -> bool:
        return _pattern(self.text).fullmatch(name) is not None


@cache  # names are checked in every call, a certificate's as well
def _pattern(form: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", lambda found: _PARTS.get(found[1], ID), form))


_PARTS = {"node": _NODE_ID, "replica": _MADE_ID, "redispatch": _MADE_ID}
CLUSTER = NameForm("clusters/{cluster}")
NODE = NameForm("clusters/{cluster}/nodes/{node}")
INVENTORY = NameForm("clusters/{cluster}/inventory")
TRAFFIC = NameForm("clusters/{cluster}/traffic")
REPLICA = NameForm("clusters/{cluster}/replicas/{replica}")
REDISPATCH = NameForm("clusters/{cluster}/redispatches/{redispatch}")
PROFILE = NameForm("profiles/{profile}")
PLAN = NameForm("plans/{plan}")


def cluster_of(name: str) -> str:
    """Return ``clusters/{cluster}`` for the name of anything in a cluster."""
    return "/".join(name.split("/")[:2])


def last_part(name: str) -> str:
    """Return the id: ``l4-3`` for ``clusters/night/nodes/l4-3``."""
    return name.rpartition("/")[2]


def node_name(cluster: str, node: str) -> str:
    """Return the resource name of a node id in ``clusters/{cluster}``."""
    return f"{cluster}/nodes/{node}"


def name_of(enum: object, value: int) -> str:
    """Return the name of a value in a generated enum, or its number if this version has no name: enums are open."""
    assert isinstance(enum, EnumTypeWrapper)
    found = enum.DESCRIPTOR.values_by_number.get(value)
    return str(value) if found is None else str(found.name)


def word_of(enum: object, value: int) -> str:
    """Return a value's name without the enum's prefix: ``READY`` for ``NODE_STATE_READY``."""
    return name_of(enum, value).removeprefix(name_of(enum, 0).removesuffix("UNSPECIFIED"))


def timestamp(time_s: float) -> Timestamp:
    """Return the timestamp of a Unix time, to the microsecond."""
    whole = int(time_s // 1)
    return Timestamp(seconds=whole, nanos=min(round((time_s - whole) * 1e6), 999_999) * 1000)


def duration(seconds: float) -> Duration:
    """Return seconds as a Duration message, exact to the nanosecond."""
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def seconds_of(duration: Duration | Timestamp) -> float:
    """Return a Duration in seconds, or a Timestamp as Unix time."""
    return duration.seconds + duration.nanos / 1e9
