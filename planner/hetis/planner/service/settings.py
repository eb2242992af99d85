"""The settings of `hetis-planner`: the PlannerConfig document, and the variables and flags that override it."""

from __future__ import annotations

import difflib
import os
import pathlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer

from hetis.commands import endpoints
from hetis.commands.endpoints import is_loopback
from hetis.formats import units
from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.formats.fields import API_VERSION, DocumentPart, Duration
from hetis.formats.kinds import bare_type, read_data, validated
from hetis.formats.positions import Path, Text, parse_text


def split_address(address: str) -> tuple[str, int]:
    """Return the host, without the brackets of IPv6, and the port up to 65535; 0 is any free one. Raises ValueError."""
    try:
        host, port = endpoints.split_address(address, least_port=0)
    except ValueError:
        message = f"{address!r} is not an address: write host:port with a port up to 65535, 0 for a free one"
        raise ValueError(message) from None
    if ":" in host and not address.startswith(f"[{host}]:"):
        raise ValueError(f"{address!r} is not an address: put brackets around IPv6, like [::1]:8470")
    return host, port


def reachable_from_elsewhere(address: str) -> str:
    """Return the address; if it listens on all interfaces, its host is this machine's name."""
    host, port = split_address(address)
    return endpoints.joined(socket.getfqdn(), port) if host in ("0.0.0.0", "::") else address


def is_socket_path(address: str) -> bool:
    """Return whether the address is a Unix socket, such as ``unix:/run/hetis/planner.sock``."""
    return address.startswith("unix:")


OFF = "off"


def _address(value: str) -> str:
    if is_socket_path(value):
        if not value.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{value!r} is not an address: write unix: and an absolute path")
    else:
        split_address(value)
    return value


def _status_address(value: str) -> str:
    if value != OFF:
        split_address(value)
    return value


def _store_url(value: str) -> str:
    scheme, colon, rest = value.partition("://")
    if not colon or scheme.partition("+")[0] not in ("sqlite", "postgresql") or not rest:
        raise ValueError("is not a store URL: write sqlite:///hetis.db or postgresql://user@host/database")
    return value


def _domain(value: str) -> str:
    if not value or any(not (c.isascii() and (c.islower() or c.isdigit() or c in ".-_")) for c in value):
        raise ValueError(f"{value!r} is not a trust domain: use only a-z, 0-9, '.', '-' and '_'")
    return value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def default_store() -> str:
    """Return the URL of an SQLite file in ``$XDG_STATE_HOME/hetis``, by default ``~/.local/state/hetis``."""
    state = os.environ.get("XDG_STATE_HOME") or str(pathlib.Path.home() / ".local" / "state")
    return f"sqlite:///{state}/hetis/planner.db"


def half_of_the_cores() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


Address = Annotated[str, AfterValidator(_address)]
Seconds = Annotated[Duration, PlainSerializer(units.format_duration)]
FilePath = Annotated[str, Field(min_length=1)]


class StatusPagePart(DocumentPart):
    """The read-only JSON page over HTTP. It requires no credentials, so it is local unless ``public``.

    ``hosts`` are the names that requests may use besides addresses, ``localhost`` and this machine's own name.
    """

    address: Annotated[str, AfterValidator(_status_address)] = "127.0.0.1:8471"
    public: bool = False
    hosts: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list)


class SolverPart(DocumentPart):
    """Searches, which run in processes of their own and wait if none is free.

    The number of running and waiting searches per caller is limited. By default, one process and three quarters of the
    queue are left to others; a planner without credentials cannot tell callers apart, and has no limits per caller.
    """

    processes: Annotated[int, Field(ge=1, le=256)] = Field(default_factory=half_of_the_cores)
    queue: Annotated[int, Field(ge=1, le=100_000)] = 32
    max_search: Annotated[Seconds, Field(gt=0, le=86_400)] = 3600.0
    running_per_caller: Annotated[int, Field(ge=1, le=256)] | None = None
    queued_per_caller: Annotated[int, Field(ge=1, le=100_000)] | None = None


class WritesPart(DocumentPart):
    """The rate at which one caller may make changes, and its burst. Dispatch is not included."""

    per_second: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 500


class ConnectionsPart(DocumentPart):
    """Most open connections of one host to the gRPC ports; by default a quarter of all that the descriptors allow."""

    per_host: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class TlsPart(DocumentPart):
    """The planner's certificate, and the authority for client certificates. Files are PEM."""

    certificate: FilePath
    key: FilePath
    client_ca: FilePath | None = None
    trust_domain: Annotated[str, AfterValidator(_domain)] = "hetis"


class LogPart(DocumentPart):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class AgentsPart(DocumentPart):
    """The interval of agents' heartbeats, and the silence after which a node is lost."""

    heartbeat: Annotated[Seconds, Field(ge=0.05, le=600)] = 5.0
    lease: Annotated[Seconds, Field(ge=0.1, le=3600)] = 20.0


class LeadershipPart(DocumentPart):
    """Leadership among planners that share a store.

    ``standby``: whether this planner waits while another one leads; by default it does on PostgreSQL. ``lease``: how
    long a planner on PostgreSQL leads without its store. ``advertise``: where callers of the others reach this one; by
    default its addresses in ``listen``.
    """

    standby: bool | None = None
    lease: Annotated[Seconds, Field(ge=0.5, le=300)] = 5.0
    advertise: Annotated[list[Address], BeforeValidator(_listed)] = Field(default_factory=list)


class RetentionPart(DocumentPart):
    """After how long plans that are not in use, and lines of the audit log, are deleted; by default never."""

    plans: Annotated[Seconds, Field(ge=3600, le=1e9)] | None = None
    audit: Annotated[Seconds, Field(ge=3600, le=1e9)] | None = None


class PlannerConfig(DocumentPart):
    """The configuration of a planner. Times are seconds inside, ``30s`` in files.

    ``reload`` is how often certificate and token files are checked for changes; ``backups`` is the folder in which
    backups are made, so that the time of the newest is a metric.
    """

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["PlannerConfig"]
    listen: Annotated[list[Address], Field(min_length=1), BeforeValidator(_listed)] = Field(
        default_factory=lambda: ["127.0.0.1:8470"]
    )
    status_page: StatusPagePart = StatusPagePart()
    store: Annotated[str, AfterValidator(_store_url)] = Field(default_factory=default_store)
    solver: SolverPart = Field(default_factory=SolverPart)
    writes: WritesPart = WritesPart()
    connections: ConnectionsPart = ConnectionsPart()
    tls: TlsPart | None = None
    tokens: FilePath | None = None
    reload: Annotated[Seconds, Field(ge=0.05, le=86_400)] = 30.0
    log: LogPart = LogPart()
    agents: AgentsPart = AgentsPart()
    leadership: LeadershipPart = LeadershipPart()
    backups: FilePath | None = None
    retention: RetentionPart = RetentionPart()
    drain_timeout: Annotated[Seconds, Field(ge=0, le=3600)] = 30.0

    @property
    def requires_credentials(self) -> bool:
        return self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)

    @property
    def stands_by(self) -> bool:
        standby = self.leadership.standby
        return self.store.startswith("postgres") if standby is None else standby

    def reached_at(self, addresses: Sequence[str]) -> PlannerConfig:
        """Return the configuration with advertised addresses for a planner that listens on ``addresses``."""
        if self.leadership.advertise:
            return self
        reachable = [reachable_from_elsewhere(address) for address in addresses if not is_socket_path(address)]
        leadership = self.leadership.model_copy(update={"advertise": reachable or list(addresses)})
        return self.model_copy(update={"leadership": leadership})

    def contradictions(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Yield contradictions between fields that are valid by themselves, as (path, message)."""
        for position, address in enumerate(self.listen):
            if not is_loopback(address) and not (self.tls is not None and self.requires_credentials):
                yield (
                    ("listen", position),
                    f"{address} can be reached from other machines, which requires tls.certificate and tls.key,"
                    " and tokens or tls.client_ca to identify callers; without them only loopback is allowed, such as"
                    " 127.0.0.1:8470",
                )
        if (
            self.status_page.address != OFF
            and not is_loopback(self.status_page.address)
            and not self.status_page.public
        ):
            yield (
                ("status_page", "address"),
                f"{self.status_page.address} can be reached from other machines, and the page requires no"
                " credentials: set status_page.public: true if this is intended",
            )
        if self.agents.lease < 2 * self.agents.heartbeat:
            lease, heartbeat = units.format_duration(self.agents.lease), units.format_duration(self.agents.heartbeat)
            yield ("agents", "lease"), f"is {lease}, but must be at least twice agents.heartbeat ({heartbeat})"

    def to_data(self) -> dict[str, Any]:
        """Return the document with every default filled in, without secrets."""
        data = self.model_dump(by_alias=True, exclude_none=True)
        data["store"] = without_password(self.store)
        return {name: value for name, value in data.items() if value != {}}


def without_password(url: str) -> str:
    """Return a store's URL for display: ``postgresql://user:***@host/database``."""
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    shown = f"{scheme}://{name}:***@{host}" if at and colon else url
    head, mark, query = shown.partition("?")
    if not mark:
        return shown
    pairs = [pair.partition("=") for pair in query.split("&")]
    return f"{head}?" + "&".join(f"{k}=***" if "pass" in k.lower() else f"{k}{e}{v}" for k, e, v in pairs)


PREFIX = "HETIS_"
Leaf = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A setting from outside the file: its dotted name, its text, and its source (such as ``--store``)."""

    name: str
    text: str
    by: str


def load_config(
    path: str | os.PathLike[str] | None,
    *,
    environment: Mapping[str, str],
    flags: Iterable[Given] = (),
    look_further: Callable[[PlannerConfig], Iterable[Problem]] = lambda _config: (),
) -> PlannerConfig:
    """Return the configuration of a file (None: no file), overridden by ``HETIS_*`` variables, and both by flags.

    Args:
        look_further: returns further problems of a configuration whose values are all valid, such as a missing file.

    Raises:
        DocumentError: with every problem of all sources.
    """
    if path is None:
        data: Any = {"apiVersion": API_VERSION, "kind": "PlannerConfig"}
        layers = _Layers(file="configuration", text=None)
    else:
        data, text = read_data(path)
        layers = _Layers(file=text.file, text=text.text, _root=text._root, problems=list(text.problems))
    for given in (*_from_environment(environment, layers), *flags):
        _put(data, given, layers)
    mistakes, layers.problems[:] = list(layers.problems), []  # unknown names: the values may still be valid
    try:
        config = validated(PlannerConfig, data, layers, to_value=lambda document: document)
    except DocumentError as error:
        raise DocumentError(_in_order([*mistakes, *error.problems])) from None
    contradictions = [layers.problem(place, message) for place, message in config.contradictions()]
    if problems := [*mistakes, *contradictions, *look_further(config)]:
        raise DocumentError(_in_order(problems))
    return config


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems in the order that `validated` uses, with those that have no line first."""
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.line or 0, problem.column or 0))


def variables() -> dict[str, str]:
    """Return the name of every environment variable that is read, with its setting."""
    return {PREFIX + "__".join(leaf).upper(): ".".join(leaf) for leaf in _leaves(PlannerConfig)}


def mistaken_variables(environment: Mapping[str, str]) -> list[str]:
    """Return ``HETIS_*`` variables that set nothing but resemble one that does, each with the nearest name."""
    known = variables()
    hints = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and name not in _OTHERS:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            hints += [f"{name} is not a setting, did you mean {meant}?" for meant in close]
    return hints


_OTHERS = {"HETIS_DEBUG", "HETIS_CONFIG", "HETIS_SERVER", "HETIS_TOKEN"}  # read elsewhere, or by other commands


@dataclass(slots=True)
class _Layers(Text):
    """The text of the file, and the settings from other sources."""

    given: dict[Leaf, str] = field(default_factory=dict)

    def problem(self, path: Path, message: str) -> Problem:
        for length in range(len(path), 0, -1):
            by = self.given.get(tuple(str(part) for part in path[:length]))
            if by is not None:
                return Problem(file=by, message=message)
        return Text.problem(self, path, message)


def _from_environment(environment: Mapping[str, str], layers: _Layers) -> Iterator[Given]:
    known = variables()
    sections = {name.partition("__")[0] + "__" for name in known if "__" in name}
    for name in sorted(environment):
        if name in known:
            if environment[name]:  # empty means unset, as in compose files
                yield Given(name=known[name], text=environment[name], by=name)
        elif any(name.startswith(section) for section in sections):
            layers.problems.append(Problem(file=name, message=f"is not a setting{did_you_mean(name, known)}"))


def _put(data: Any, given: Given, layers: _Layers) -> None:
    leaves = _leaves(PlannerConfig)
    leaf = tuple(given.name.split("."))
    if leaf not in leaves:
        hint = did_you_mean(given.name, (".".join(known) for known in leaves))
        layers.problems.append(Problem(file=given.by, message=f"{given.name} is not a setting{hint}"))
        return
    holder = data
    for part in leaf[:-1]:
        if not isinstance(holder, dict):
            return  # the file is invalid at this place, which validation reports
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
    if isinstance(holder, dict):
        try:
            holder[leaf[-1]] = _value(given, leaves[leaf])
        except DocumentError as error:
            layers.problems += error.problems
            return
        layers.given[leaf] = given.by


def _value(given: Given, annotation: Any) -> Any:
    """Return a setting's text as its field needs it: text is unchanged, lists are split at commas, the rest is YAML."""
    if get_origin(annotation) is list:
        return [part.strip() for part in given.text.split(",")]
    if annotation is str or get_origin(annotation) is Literal:
        return given.text
    return parse_text(given.text, given.by)[0]


def _leaves(document: type[BaseModel], above: Leaf = ()) -> dict[Leaf, Any]:
    """Return the path and bare type of every setting."""
    found: dict[Leaf, Any] = {}
    for name, info in document.model_fields.items():
        if name in ("api_version", "kind"):
            continue
        bare = bare_type(info.annotation)
        if isinstance(bare, type) and issubclass(bare, BaseModel):
            found |= _leaves(bare, (*above, name))
        else:
            found[*above, name] = bare
    return found
