"""Identification of callers by bearer tokens, whose hashes are in a file, or by the certificates of connections."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hetis.commands.x509 import ends_of_certificates
from hetis.formats.documents import dump_data
from hetis.formats.errors import single_problem
from hetis.formats.fields import API_VERSION, DocumentPart, Name, entries
from hetis.formats.files import read_text, unreadable
from hetis.formats.kinds import validated
from hetis.formats.positions import parse_text
from hetis.formats.units import parse_moment
from hetis.planner.callers import ANYBODY, CallerRole, Identity
from hetis.planner.convert.names import CLUSTER, NODE
from hetis.planner.failures import Reason, ServiceError

_START = "hetis_"  # lets scanners for leaked secrets recognise a token
_TOKEN = re.compile(r"hetis_[A-Za-z0-9_-]{43}")
_NO_TOKENS = re.compile(
    r"^tokens:[ \t]*(\[\s*\]|null\b|~)", re.MULTILINE
)  # what remains after the last token was deleted


def _moment(value: str) -> str:
    parse_moment(value, needs_zone=True)
    return value


def _scope(value: str) -> str:
    if not NODE.matches(value) and not CLUSTER.matches(value):
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
    tokens: Annotated[list[TokenPart], BeforeValidator(lambda value: [] if value is None else value)]  # null: none left


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The effect of a token: the identity that it grants until a Unix time."""

    identity: Identity
    expires_s: float


class Tokens:
    """The tokens of a file."""

    def __init__(self, grants: Mapping[str, Grant]) -> None:
        self._grants = dict(grants)

    @classmethod
    def load(cls, path: str) -> Tokens:
        """Return a file's tokens. Raises DocumentError with every problem, such as a file that everyone may write."""
        text = read_text(path)
        if Path(path).stat().st_mode & 0o002:
            raise single_problem(path, "is writable by all users, who could grant themselves roles: chmod 600")
        return cls(_grants(text, path))

    @property
    def expiries_s(self) -> list[float]:
        """The expiry of each token, as Unix time."""
        return [grant.expires_s for grant in self._grants.values()]

    def bearer(self, name: str) -> Identity | None:
        """Return the identity that the tokens of this name grant, None if there are none."""
        return next((grant.identity for grant in self._grants.values() if grant.identity.name == name), None)

    def __len__(self) -> int:
        return len(self._grants)

    def identify(self, token: str, *, now_s: float) -> Identity:
        """Return the identity that a token grants. Raises CREDENTIALS if it is malformed, unknown or expired."""
        if not _TOKEN.fullmatch(token):
            raise refused("the bearer token is malformed: it was not printed by `hetis-planner token create`")
        # Looked up by its hash, so that timing does not reveal how much of a guess was right.
        grant = self._grants.get(digest(token))
        if grant is None:
            raise refused("the bearer token is unknown: it was never created, or has been removed from the file")
        if grant.expires_s <= now_s:
            ended = datetime.fromtimestamp(grant.expires_s, UTC).isoformat(timespec="seconds")
            raise refused(f"the bearer token {grant.identity.name} expired at {ended}")
        return grant.identity


def refused(message: str) -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_CREDENTIALS, message)


def digest(token: str) -> str:
    """Return the SHA-256 of a token. A token has 256 random bits, so a slow hash would not protect it any better."""
    return hashlib.sha256(token.encode()).hexdigest()


def create_token(
    path: str,
    *,
    name: str,
    role: CallerRole,
    scope: str | None,
    expires: datetime,
    hand_over: Callable[[str], None] | None = None,
    is_further: bool = False,
) -> str:
    """Create a token and return it, and append its hash to the file, which is created (mode 0600) if it is missing.

    ``is_further``: whether its caller may have tokens already, which remain valid.

    ``hand_over`` is called with the token, such as to print it. If it fails, the file gets back what it held, since
    nobody has the token: otherwise its name would be taken, and it would stay valid.

    Raises DocumentError if the file is not a token file or cannot be written, the name is taken, or a value is wrong.
    """
    token = _START + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": name, "role": role.value}
    if scope is not None:
        entry["scope"] = scope
    entry |= {"sha256": digest(token), "expires": expires.astimezone(UTC).isoformat(timespec="seconds")}
    if not os.path.exists(path):
        _grants(_entry_text(entry, ""), path)  # a wrong value creates no file
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unreadable(path, error) from None
    with open(descriptor, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of two concurrent writers neither is lost, nor takes the other's name
        found = file.read()
        before = found.decode("utf-8", errors="replace")
        if emptied := _NO_TOKENS.search(before):
            before = f"{before[: emptied.start()]}tokens:{before[emptied.end() :]}"
        added = _entry_text(entry, before)
        bearer = Identity(name=name, roles=role.includes, scope=scope)
        if not is_further and before.strip() and bearer in [one.identity for one in _grants(before, path).values()]:
            again = f"hetis-planner token rotate --file {path} --name {name}"
            raise single_problem(path, f"has a token of {name} already; make a further one: {again}")
        _grants(before + added, path)
        try:
            if emptied:  # no token is lost whenever the process ends, since there was none
                file.truncate(0)
                added = before + added
            _write_synced(file, added.encode(), path)
            if hand_over is not None:
                hand_over(token)
        except BaseException:
            # With half an entry no planner could start any more, so the file gets back what it held.
            file.truncate(0 if emptied else len(found))
            if emptied:
                with suppress(OSError):
                    _write_all(file, found)
            raise
    return token


def _write_synced(file: FileIO, content: bytes, path: str) -> None:
    try:
        _write_all(file, content)
        os.fsync(file.fileno())
    except OSError as error:
        raise single_problem(path, f"cannot be written: {error.strerror}") from None


def _write_all(file: FileIO, content: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time, as where the disk is nearly full."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


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
    return {
        entry.sha256: Grant(
            identity=Identity(name=entry.name, roles=CallerRole(entry.role).includes, scope=entry.scope),
            expires_s=datetime.fromisoformat(entry.expires).timestamp(),
        )
        for entry in document.tokens
    }


def _clashes(tokens: object) -> Iterator[tuple[Sequence[str | int], str]]:
    """Yield names of different callers, agents' tokens without a scope, and other tokens with one."""
    first: dict[str, tuple[int, object, object]] = {}
    for position, entry in entries(tokens):
        name, role = entry.get("name"), entry.get("role")
        if isinstance(name, str):
            earlier, *bearer = first.setdefault(name, (position, role, entry.get("scope")))
            if bearer != [role, entry.get("scope")]:
                message = f"{name} is already used by tokens[{earlier}], which has another role or scope"
                yield ("tokens", position, "name"), message
        if role == "agent" and "scope" not in entry:
            yield ("tokens", position), "scope is missing: an agent's token needs a node or a cluster"
        if role != "agent" and "scope" in entry:
            yield ("tokens", position, "scope"), f"is only for agents, not for role {role}"


AuthContext = Mapping[str, Iterable[bytes]]
Metadata = Sequence[tuple[str, str | bytes]]
_PERSON = re.compile(r"(viewer|orchestrator|admin)/([A-Za-z0-9][A-Za-z0-9._-]{0,199})")


class NoCredentials:
    """Grants everything to every caller, and tells callers apart by their connections; for loopback only."""

    def identify(self, metadata: Metadata, connection: AuthContext, peer: str) -> Identity:
        return replace(ANYBODY, connection=peer)


class Credentials:
    """Identifies the caller by its bearer token if there is one, else by the certificate of its connection.

    Args:
        tokens: the present tokens; None if tokens are not accepted.
        trust_domain: the trust domain in the certificates' names; None if certificates are ignored.
        clock: Unix seconds.
    """

    def __init__(
        self, *, tokens: Callable[[], Tokens] | None, trust_domain: str | None, clock: Callable[[], float]
    ) -> None:
        self._tokens = tokens
        self._trust_domain = trust_domain
        self._clock = clock

    def identify(self, metadata: Metadata, connection: AuthContext, peer: str) -> Identity:
        """Return the caller's identity, whatever its address. Raises CREDENTIALS."""
        given = [value for key, value in metadata if key == "authorization"]
        if len(given) > 1:
            raise refused("the call has more than one `authorization` in its metadata")
        if given and self._tokens is not None:
            return self._tokens().identify(_bearer(given[0]), now_s=self._clock())
        if self._trust_domain is not None:
            return identity_of_certificate(connection, self._trust_domain, now_s=self._clock())
        if given:
            raise refused("this planner does not accept bearer tokens")
        raise refused("the call has no credentials: send the metadata `authorization: Bearer TOKEN`")


Authenticator = Credentials | NoCredentials


def identity_of_certificate(connection: AuthContext, trust_domain: str, *, now_s: float) -> Identity:
    """Return the caller that a verified certificate names by a URI in its subject alternative names.

    ``spiffe://DOMAIN/clusters/C/nodes/N`` is the agent of a node, ``spiffe://DOMAIN/ROLE/NAME`` a caller with a role.

    TLS checks the dates of a certificate only in the handshake, but connections last longer. Raises CREDENTIALS if
    there is no such URI, or more than one, or if the certificate has expired in the meantime.
    """
    if any(_end_of_certificate(pem) <= now_s for pem in connection.get("x509_pem_cert", ())):
        raise refused("the client certificate has expired: reconnect with a new one")
    start = f"spiffe://{trust_domain}/"
    # `peer_uri` rather than all alternative names: the content of a DNS entry need not be a URI.
    uris = [uri.decode(errors="replace") for uri in connection.get("peer_uri", ())]
    ours = [uri for uri in uris if uri.startswith(start)]
    if len(ours) != 1:
        how_many = "more than one" if ours else "no"
        raise refused(f"the client certificate has {how_many} URI {start}... among its subject alternative names")
    path = ours[0].removeprefix(start)
    if NODE.matches(path):
        return Identity(name=ours[0], roles=CallerRole.AGENT.includes, scope=path)
    if person := _PERSON.fullmatch(path):
        return Identity(name=ours[0], roles=CallerRole(person[1]).includes)
    raise refused(f"the client certificate names {ours[0]}, expected {start}clusters/C/nodes/N or {start}ROLE/NAME")


@lru_cache(maxsize=16_384)  # one entry per agent; looked up in every call
def _end_of_certificate(pem: bytes) -> float:
    return min(ends_of_certificates(pem.decode(errors="replace")), default=math.inf)


def _bearer(value: str | bytes) -> str:
    text = value if isinstance(value, str) else value.decode("ascii", errors="replace")
    scheme, _, token = text.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise refused("the authorization is malformed: write `authorization: Bearer TOKEN`")
    return token.strip()
