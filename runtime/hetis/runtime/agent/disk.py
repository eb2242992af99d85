"""The agent's durable state in files: each part is replaced as a whole, never half, and checked when it is read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
from pathlib import Path
from urllib.parse import quote, unquote

FORM = 1  # version of the files
_SUFFIX = ".state"
_MODE = 0o700
_OURS = re.compile(r"lock|engines|engine\.sock|lost\+found|.+\.state(\.new|\.damaged-\d+)?")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)


class StateError(Exception):
    """The state directory cannot be used. The message says why and what to do."""


def machine_boot_id() -> str:
    """Return the boot id of this machine; empty if the system does not report it."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class StateDirectory:
    """Named parts in one directory that only this user may open.

    A part is a file: one line of JSON (form, name, SHA-256), then the body. The new file is written next to the old
    one, flushed to the device and renamed over it. A file that fails its check is renamed and logged as an error: the
    other parts are used, and its content is kept for inspection.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=_MODE)
            _keep_private(path)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise StateError(f"state directory {path} is in use by another agent") from None
            for left in path.glob(f"*{_SUFFIX}.new"):
                left.unlink()  # an unfinished write
        except OSError as error:
            raise StateError(f"state directory {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Release the directory for another agent."""
        os.close(self._lock)

    def read(self) -> dict[str, bytes]:
        """Return every part that passes its check, by name."""
        found = {}
        for file in sorted(self._path.glob(f"*{_SUFFIX}")):
            try:
                name, body = _checked(file.read_bytes())
                if name != unquote(file.name.removesuffix(_SUFFIX)):
                    raise ValueError(f"it contains the name {name}")
                found[name] = body
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.set_aside(unquote(file.name.removesuffix(_SUFFIX)), str(error))
        return found

    def write(self, name: str, body: bytes | None) -> None:
        """Make ``body`` the part's content, durably; None removes it. Raises StateError, leaving the part unchanged."""
        file = self._file(name)
        try:
            if body is None:
                file.unlink(missing_ok=True)
            else:
                beside = file.with_name(file.name + ".new")
                header = {"form": FORM, "name": name, "sha256": hashlib.sha256(body).hexdigest()}
                with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
                    stream.write(json.dumps(header).encode() + b"\n" + body)
                    stream.flush()
                    os.fsync(stream.fileno())
                beside.rename(file)
            self._sync()
        except OSError as error:
            raise StateError(f"state file {file}: {error.strerror or error}") from error

    def set_aside(self, name: str, why: str) -> None:
        """Move a part that cannot be used out of the way, without destroying it."""
        file = self._file(name)
        number = 0
        while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
            number += 1
        _log.error(
            "state file %s is damaged (%s): moved to %s, this part of the state starts empty", file, why, aside.name
        )
        try:
            file.rename(aside)
            self._sync()
        except OSError as error:
            raise StateError(f"state file {file}: {error.strerror or error}") from error

    def _file(self, name: str) -> Path:
        return self._path / (quote(name, safe="") + _SUFFIX)

    def _sync(self) -> None:
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _keep_private(path: Path) -> None:
    """Take away other users' access, unless the directory also holds what is not an agent's: it may be /tmp."""
    if stat.S_IMODE(path.stat().st_mode) == _MODE:
        return
    if others := sorted(file.name for file in path.iterdir() if not _OURS.fullmatch(file.name)):
        shown = ", ".join(others[:3])
        _log.warning("state directory %s keeps its mode, since it also holds other files: %s", path, shown)
    else:
        path.chmod(_MODE)


def _checked(content: bytes) -> tuple[str, bytes]:
    header, newline, body = content.partition(b"\n")
    said = json.loads(header)
    if said["form"] != FORM:
        raise ValueError(f"its format is {said['form']}, this agent reads {FORM}")
    if not newline or said["sha256"] != hashlib.sha256(body).hexdigest():
        raise ValueError("its checksum is wrong")
    return str(said["name"]), body
