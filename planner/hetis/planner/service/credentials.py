"""Identification of callers by a call's credentials: a bearer token, or the certificate of its connection."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from hetis.planner.failures import ServiceError
from hetis.planner.service.certificates import ends_of_certificates
from hetis.planner.service.identity import ANYBODY, CallerRole, Identity
from hetis.planner.service.tokens import NODE, Tokens, refused

AuthContext = Mapping[str, Iterable[bytes]]
Metadata = Sequence[tuple[str, str | bytes]]
_PERSON = re.compile(r"(viewer|orchestrator|admin)/([A-Za-z0-9][A-Za-z0-9._-]{0,199})")


class Authenticator(Protocol):
    """Identifies callers."""

    @property
    def reads_certificates(self) -> bool:
        """Return whether the connection may identify the caller, and not only the call's metadata."""
        ...

    def identify(self, metadata: Metadata, connection: AuthContext) -> Identity:
        """Return the caller's identity.

        Raises:
            ServiceError: CREDENTIALS.
        """
        ...


class NoCredentials:
    """Allows everybody everything: for loopback only."""

    reads_certificates = False

    def identify(self, metadata: Metadata, connection: AuthContext) -> Identity:
        return ANYBODY


class Credentials:
    """Identifies the caller by its bearer token if one is sent, else by the certificate of the connection.

    Args:
        tokens: the present tokens; None if tokens are not accepted.
        trust_domain: of the certificates' names; None if certificates are ignored.
        clock: Unix seconds.
    """

    def __init__(
        self, *, tokens: Callable[[], Tokens] | None, trust_domain: str | None, clock: Callable[[], float]
    ) -> None:
        self._tokens = tokens
        self._trust_domain = trust_domain
        self._clock = clock

    @property
    def reads_certificates(self) -> bool:
        return self._trust_domain is not None

    def identify(self, metadata: Metadata, connection: AuthContext) -> Identity:
        """Return the caller's identity.

        Raises:
            ServiceError: CREDENTIALS.
        """
        given = [value for key, value in metadata if key == "authorization"]
        if len(given) > 1:
            raise refused("the call has more than one authorization")
        if given and self._tokens is not None:
            return self._tokens().identify(_bearer(given[0]), now_s=self._clock())
        if self._trust_domain is not None:
            return identity_of_certificate(connection, self._trust_domain, now_s=self._clock())
        if given:
            raise refused("this planner takes no bearer tokens")
        raise refused("the call has no credentials: send the metadata `authorization: Bearer TOKEN`")


def identity_of_certificate(connection: AuthContext, trust_domain: str, *, now_s: float) -> Identity:
    """Return the caller that a verified certificate names by a URI in its subject alternative names.

    ``spiffe://DOMAIN/clusters/C/nodes/N`` is the agent of a node, ``spiffe://DOMAIN/ROLE/NAME`` somebody with a role.

    TLS checks the dates of a certificate only in the handshake, but connections last longer.

    Raises:
        ServiceError: CREDENTIALS if there is no such URI, or more than one, or if the certificate has expired since.
    """
    if any(_end_of_certificate(pem) <= now_s for pem in connection.get("x509_pem_cert", ())):
        raise refused("the client certificate has expired: connect again with a new one")
    start = f"spiffe://{trust_domain}/"
    # `peer_uri`, not all alternative names: the content of a DNS entry need not be a URI.
    uris = [uri.decode(errors="replace") for uri in connection.get("peer_uri", ())]
    ours = [uri for uri in uris if uri.startswith(start)]
    if len(ours) != 1:
        how_many = "more than one" if ours else "no"
        raise refused(f"the client certificate has {how_many} URI {start}... among its subject alternative names")
    path = ours[0].removeprefix(start)
    if NODE.fullmatch(path):
        return Identity(name=ours[0], roles=CallerRole.AGENT.includes, scope=path)
    if person := _PERSON.fullmatch(path):
        return Identity(name=ours[0], roles=CallerRole(person[1]).includes)
    raise refused(f"the client certificate is of {ours[0]}, expected {start}clusters/C/nodes/N or {start}ROLE/NAME")


@lru_cache(maxsize=16_384)  # one per agent; used in every call
def _end_of_certificate(pem: bytes) -> float:
    return min(ends_of_certificates(pem.decode(errors="replace")), default=math.inf)


def _bearer(value: str | bytes) -> str:
    text = value if isinstance(value, str) else value.decode("ascii", errors="replace")
    scheme, _, token = text.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise refused("the authorization is malformed: write `Bearer TOKEN`")
    return token.strip()


__all__ = ["AuthContext", "Authenticator", "Credentials", "NoCredentials", "ServiceError", "identity_of_certificate"]
