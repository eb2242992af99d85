"""Bearer tokens: a file of their hashes, each with a role and an expiry. The tokens themselves are stored nowhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetis.formats.documents import dump_data
from hetis.formats.errors import DocumentError, single_problem
from hetis.formats.fields import API_VERSION, DocumentPart, Name
from hetis.formats.files import read_text, unreadable
from hetis.formats.loading import validated
from hetis.formats.positions import parse_text
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.service.identity import CallerRole, Identity

_START = "hetis_"  # lets scanners for leaked secrets recognise a token
_TOKEN = re.compile(r"hetis_[A-Za-z0-9_-]{43}")
_ID = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
NODE = re.compile(rf"clusters/({_ID})/nodes/([A-Za-z0-9][A-Za-z0-9._-]*)")
CLUSTER = re.compile(rf"clusters/({_ID})")


def _moment(value: str) -> str:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f"{value!r} is not a moment: write it like 2027-01-31T00:00:00Z")
    return value


def _scope(value: str) -> str:
    if not NODE.fullmatch(value) and not CLUSTER.fullmatch(value):
        raise ValueError(f"{value!r} is neither clusters/CLUSTER/nodes/NODE nor clusters/CLUSTER")
    return value


class TokenPart(DocumentPart):
    """One token, by its hash. ``scope`` is the node or cluster of an agent's token."""

    name: Name
    role: Literal["viewer", "orchestrator", "admin", "agent"]
    scope: Annotated[str, AfterValidator(_scope)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: Annotated[str, AfterValidator(_moment)]


class PlannerTokens(DocumentPart):
    """The token file."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["PlannerTokens"]
    tokens: list[TokenPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The effect of a token: an identity, until a moment (Unix seconds)."""

    identity: Identity
    expires_s: float


class Tokens:
    """The tokens of a file."""

    def __init__(self, grants: Mapping[str, Grant]) -> None:
        self._grants = dict(grants)

    @classmethod
    def load(cls, path: str) -> Tokens:
        """Return the tokens of a file.

        Raises:
            DocumentError: with every problem of the file, including write permission for everybody.
        """
        text = read_text(path)
        if Path(path).stat().st_mode & 0o002:
            raise single_problem(path, "can be written by everybody, who could give themselves roles: chmod 600")
        return cls(_grants(text, path))

    @property
    def expiries_s(self) -> list[float]:
        """The expiry of each token, Unix seconds."""
        return [grant.expires_s for grant in self._grants.values()]

    def __len__(self) -> int:
        return len(self._grants)

    def identify(self, token: str, *, now_s: float) -> Identity:
        """Return the identity that a token grants.

        Raises:
            ServiceError: CREDENTIALS if it is malformed, unknown or expired.
        """
        if not _TOKEN.fullmatch(token):
            raise refused("the bearer token is malformed: it is not one that `hetis-planner token create` printed")
        # Looked up by its hash, so that timing reveals nothing about how much of a guess was right.
        grant = self._grants.get(digest(token))
        if grant is None:
            raise refused("the bearer token is unknown: it was never made or has been taken out of the file")
        if grant.expires_s <= now_s:
            ended = datetime.fromtimestamp(grant.expires_s, UTC).isoformat(timespec="seconds")
            raise refused(f"the bearer token {grant.identity.name} expired at {ended}")
        return grant.identity


def refused(message: str) -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_CREDENTIALS, message)


def digest(token: str) -> str:
    """Return the SHA-256 of a token. It has 256 random bits, so a slow hash would protect no better."""
    return hashlib.sha256(token.encode()).hexdigest()


def create_token(path: str, *, name: str, role: CallerRole, scope: str | None, expires: datetime) -> str:
    """Make a token, append its hash to the file, which is created (mode 0600) if missing, and return the token.

    Raises:
        DocumentError: the file is not a token file or cannot be written, the name is taken, or a value is wrong.
    """
    token = _START + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": name, "role": role.value}
    if scope is not None:
        entry["scope"] = scope
    entry |= {"sha256": digest(token), "expires": expires.astimezone(UTC).isoformat(timespec="seconds")}
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unreadable(path, error) from None
    with open(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # for two writers at once: neither is lost, neither takes the other's name
        before = file.read().decode("utf-8", errors="replace")
        added = _entry_text(entry, before)
        _grants(before + added, path)
        try:
            file.write(added.encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise single_problem(path, f"cannot be written: {error.strerror}") from None
    return token


def _entry_text(entry: Mapping[str, Any], before: str) -> str:
    lines = dump_data({"tokens": [entry]}).splitlines(keepends=True)
    if not before.strip():
        return f"apiVersion: {API_VERSION}\nkind: PlannerTokens\n" + "".join(lines)
    return ("" if before.endswith("\n") else "\n") + "".join(lines[1:])


def _grants(text: str, path: str) -> dict[str, Grant]:
    data, source = parse_text(text, path)
    document = validated(
        PlannerTokens, data, source, to_value=lambda value: value, check=lambda found: _clashes(found.get("tokens"))
    )
    return {entry.sha256: _grant(entry) for entry in document.tokens}


def _grant(entry: TokenPart) -> Grant:
    identity = Identity(name=entry.name, roles=CallerRole(entry.role).includes, scope=entry.scope)
    return Grant(identity=identity, expires_s=datetime.fromisoformat(entry.expires).timestamp())


def _clashes(tokens: object) -> Iterator[tuple[Sequence[str | int], str]]:
    """Yield duplicate names, agents without a scope, and scopes of others."""
    first: dict[str, int] = {}
    for position, entry in enumerate(tokens if isinstance(tokens, list) else ()):
        if not isinstance(entry, dict):
            continue
        name, role = entry.get("name"), entry.get("role")
        if isinstance(name, str) and first.setdefault(name, position) != position:
            yield ("tokens", position, "name"), f"{name} is taken by tokens[{first[name]}]"
        if role == "agent" and "scope" not in entry:
            yield ("tokens", position), "scope is missing: an agent's token is of a node or a cluster"
        if role != "agent" and "scope" in entry:
            yield ("tokens", position, "scope"), f"is for agents, not for role {role}"


__all__ = ["CLUSTER", "NODE", "DocumentError", "Grant", "Tokens", "create_token", "digest", "refused"]
