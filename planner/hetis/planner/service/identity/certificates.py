"""Files that are read again when they change, mainly the planner's certificates."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import grpc

from hetis.commands.x509 import ends_of_certificates, moment, validities
from hetis.formats.errors import DocumentError, Problem, attempt
from hetis.formats.files import FileStamp, file_stamp, read_text

T = TypeVar("T")
_log = logging.getLogger("hetis.planner.reloading")


class NotYetValidError(DocumentError):
    """Files will be valid later without having changed."""


class Reloaded(Generic[T]):
    """The value of some files, which is loaded again when they change.

    If new files are invalid, that is logged and the old value is kept; if they are only invalid as yet
    (`NotYetValidError`), they are loaded again at every refresh. Raises DocumentError on construction if the files are
    invalid from the start.
    """

    def __init__(self, what: str, paths: Sequence[str], load: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._seen = self._awaited = self._stamps()
        self.value = load()
        self.version = 1

    def refresh(self) -> bool:
        now = self._stamps()
        if now == self._seen:
            return False
        try:
            value = self._load()
        except NotYetValidError as error:
            if now != self._awaited:
                self._awaited = now
                _log.error("%s: the old files remain in use until the new ones become valid: %s", self._what, error)
            return False
        except DocumentError as error:
            if None not in now:  # a missing file is probably being replaced
                self._seen = now
            _log.error("%s: the new files are invalid, the old ones remain in use: %s", self._what, error)
            return False
        if self._stamps() != now:
            return False  # changed while being read: try again next time
        self._seen = now
        self.value = value
        self.version += 1
        _log.info("%s: reloaded from %s", self._what, ", ".join(self._paths))
        return True

    def _stamps(self) -> tuple[FileStamp | None, ...]:
        return tuple(map(file_stamp, self._paths))


async def keep_fresh(
    sources: Iterable[Reloaded[Any]], interval_s: float, *, then: Callable[[], None] = lambda: None
) -> None:
    """Refresh sources periodically until cancelled; call ``then`` after each round, in the event loop."""
    kept = tuple(sources)
    while True:
        await asyncio.sleep(interval_s)
        for source in kept:
            try:
                await asyncio.to_thread(source.refresh)
            except Exception:
                _log.exception("checking for new files failed")
        try:
            then()
        except Exception:  # one failure must not end the loop
            _log.exception("the follow-up to a check for new files failed")


_NO_PASSWORD = ""


class TlsFiles(Protocol):
    """The paths of the planner's certificate and key, and of the authority for client certificates."""

    @property
    def certificate(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def client_ca(self) -> str | None: ...


class Certificates:
    """Server credentials that follow their files. Open connections keep the certificate with which they began.

    Raises DocumentError, with every problem, if the files cannot be used.
    """

    def __init__(self, tls: TlsFiles) -> None:
        self._tls, self._paths = tls, _paths_of(tls)
        self.files = Reloaded("certificate", self._paths, partial(_load, tls))

    @property
    def expiries_s(self) -> dict[str, float]:
        """The Unix time at which each file's first certificate expires, from the present contents of the files."""
        found = dict[str, float]()
        for path in self._paths:
            pem = attempt(partial(read_text, path), [])  # problems are reported by `files`
            if ends_s := ends_of_certificates(pem or ""):
                found[path] = min(ends_s)
        return found

    @property
    def warnings(self) -> list[str]:
        """What is dangerous about the files, but so common (Kubernetes mounts secrets with 0644) that it works."""
        if not _mode(self._tls.key) & stat.S_IROTH:
            return []
        what = "is readable by all users, who could impersonate the planner: chmod 600, or 640 for a group"
        return [f"{self._tls.key}: {what}"]

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one address, which checks on its own whether the files have changed."""
        known, first = self.files.version, self.files.value

        def newer() -> grpc.ServerCertificateConfiguration | None:
            """Return a newer configuration, or None if there is none. Called in a thread before each handshake."""
            nonlocal known
            version, value = self.files.version, self.files.value
            if version == known:
                return None
            known = version
            return value

        may_return_none: Any = newer  # which grpc's stubs rule out
        asks_clients = self._tls.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(first, may_return_none, require_client_authentication=asks_clients)


def _paths_of(tls: TlsFiles) -> list[str]:
    return [path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None]


def _load(tls: TlsFiles) -> grpc.ServerCertificateConfiguration:
    texts: dict[str, bytes] = {}
    problems: list[Problem] = []
    for path in _paths_of(tls):
        texts[path] = (attempt(partial(read_text, path), problems) or "").encode()
    if not problems:
        problems += _unusable(tls, texts)
    if problems:
        raise DocumentError(problems)
    for begin_s, _ in validities(texts[tls.certificate].decode())[:1]:
        if begin_s > time.time():
            message = f"is not valid before {moment(begin_s)}: no client would accept it until then"
            raise NotYetValidError([Problem(file=tls.certificate, message=message)])
    authority = texts[tls.client_ca] if tls.client_ca is not None else None
    return grpc.ssl_server_certificate_configuration([(texts[tls.key], texts[tls.certificate])], authority)


def _unusable(tls: TlsFiles, texts: dict[str, bytes]) -> list[Problem]:
    """Return the problems that OpenSSL finds in the files; gRPC would only refuse handshakes later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    problems: list[Problem] = []
    if b"-----BEGIN CERTIFICATE-----" not in texts[tls.certificate]:
        problems.append(Problem(file=tls.certificate, message="contains no certificate in PEM format"))
    if b"PRIVATE KEY-----" not in texts[tls.key]:
        problems.append(Problem(file=tls.key, message="contains no private key in PEM format"))
    if not problems:
        try:
            context.load_cert_chain(tls.certificate, tls.key, password=lambda: _NO_PASSWORD)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            message = f"does not match the certificate {tls.certificate}, or is not an unencrypted key: {reason}"
            problems.append(Problem(file=tls.key, message=message))
    if _mode(tls.key) & stat.S_IWOTH:
        message = "is writable by all users, who could substitute their own key: chmod 600"
        problems.append(Problem(file=tls.key, message=message))
    for end_s in ends_of_certificates(texts[tls.certificate].decode())[:1]:  # the planner's own comes first
        if end_s <= time.time():
            message = f"expired at {moment(end_s)}: no client would accept it"
            problems.append(Problem(file=tls.certificate, message=message))
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(cadata=texts[tls.client_ca].decode())
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error)
            message = f"contains no certificate authority in PEM format: {reason.replace('_', ' ').lower()}"
            problems.append(Problem(file=tls.client_ca, message=message))
    return problems


def _mode(path: str) -> int:
    with suppress(OSError):  # a file that has just gone is reported by those who read it
        return os.stat(path).st_mode
    return 0
