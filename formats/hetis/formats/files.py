"""Read and write files that a user names, with a message for everything that can go wrong; canonical JSON."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hetis.formats.errors import DocumentError, single_problem

MAX_BYTES = 64 * 2**20  # limit per document


FileStamp = tuple[int, int, int, int]


def file_stamp(path: str | os.PathLike[str]) -> FileStamp | None:
    """Return what is different once a file has been changed, replaced or made readable; None if there is no file."""
    try:
        found = os.stat(path)  # follows links, since Kubernetes changes the link
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def file_label(path: str | os.PathLike[str]) -> str:
    """Return the file's name in messages."""
    return "stdin" if os.fspath(path) == "-" else os.fspath(path)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file, or of standard input for ``-``. Raises DocumentError if the file is missing,
    unreadable, a folder, larger than 64 MiB, or not UTF-8 text.
    """
    label = file_label(path)
    text = decoded(read_bytes(path, most=MAX_BYTES), label)
    if "\0" in text:
        raise single_problem(label, f"is not text: it holds a zero byte at offset {text.index(chr(0))}")
    return text


def read_bytes(path: str | os.PathLike[str], *, most: int) -> bytes:
    """Return the content of a file of at most ``most`` bytes (``-``: standard input). Raises DocumentError."""
    label = file_label(path)
    try:
        if os.fspath(path) == "-":
            raw = sys.stdin.buffer.read(most + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise unreadable(label, error) from None
    if len(raw) > most:
        raise single_problem(label, f"is larger than {most // 2**20} MiB")
    return raw


def unpacked(raw: bytes, label: str, *, most: int) -> bytes:
    """Return bytes as they are unless they are gzip-compressed. Raises DocumentError if they are damaged, more than
    ``most`` when unpacked, or not compressed though the name ends in ``.gz``.
    """
    if not is_packed(raw, label):
        return raw
    with unpacking(raw, label) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise single_problem(label, f"is larger than {most // 2**20} MiB when unpacked")
    return content


def is_packed(raw: bytes, label: str) -> bool:
    """Return whether bytes are gzip-compressed. Raises DocumentError if they are not and the name ends in ``.gz``."""
    if raw[:2] == b"\x1f\x8b":
        return True
    if label.endswith(".gz"):
        raise single_problem(label, "is not gzip-compressed, though its name ends in .gz")
    return False


@contextmanager
def unpacking(raw: bytes, label: str) -> Iterator[gzip.GzipFile]:
    """Yield a stream that unpacks gzip-compressed bytes. Reading it raises DocumentError if they are damaged."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
            yield stream
    except EOFError:
        what = f"is truncated: its gzip stream ends after {len(raw)} bytes without an end mark"
        raise single_problem(label, what) from None
    except (OSError, zlib.error) as error:
        raise single_problem(label, f"is damaged: {error}") from None


def decoded(raw: bytes, label: str) -> str:
    """Return UTF-8 text without a byte order mark. Raises DocumentError if it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise single_problem(label, f"is not UTF-8 text ({where})") from None


def unreadable(label: str, error: OSError | ValueError) -> DocumentError:
    """Return the error for a file that the system does not let us read."""
    match error:
        case FileNotFoundError():
            return single_problem(label, "no such file" if label else "the name of a file is empty")
        case IsADirectoryError():
            return single_problem(label, "is a folder, expected a file")
        case PermissionError():
            return single_problem(label, "cannot be read (permission denied)")
    return single_problem(label, f"cannot be read: {_reason(error)}")


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@contextmanager
def readable(label: str) -> Iterator[None]:
    """Turn what can go wrong while a file is read, packed or not, into a `DocumentError`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise single_problem(label, f"is not a complete gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise single_problem(label, f"is not UTF-8 text (offset {error.start})") from None
    except (OSError, ValueError) as error:
        raise unreadable(label, error) from None


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file or nothing: to a temporary file in the same folder, flushed to disk, then renamed over
    ``path``.

    Text is written as UTF-8. A reader sees the old content or the new, never a part; an existing file keeps its
    permissions. Anything that is not a regular file (a pipe, ``/dev/stdout``) is written to directly. Raises
    DocumentError if the folder does not exist or cannot be written.
    """
    target = Path(os.path.realpath(path))  # follow a symbolic link, so that the link is kept
    temporary: str | None = None
    try:
        raw = content.encode("utf-8") if isinstance(content, str) else content
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            with open(path, "wb") as pipe:
                pipe.write(raw)
            return
        mode = target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask()
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
        with open(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except FileNotFoundError:
        raise single_problem(os.fspath(path), f"cannot be written: no folder {target.parent}") from None
    except (OSError, ValueError) as error:
        raise single_problem(os.fspath(path), f"cannot be written: {_reason(error)}") from None
    finally:
        if temporary is not None:  # also on Ctrl-C
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, if the file system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def canonical_json(data: Any) -> bytes:
    """Return plain data as JSON with sorted keys, no white space and no NaN or infinity."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_digest(content: bytes) -> str:
    """Return the digest ``sha256:...`` of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
