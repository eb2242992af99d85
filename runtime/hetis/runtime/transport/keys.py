"""The secret shared by an engine and its attention workers: from a file that only its owner may read, or a variable.

It never travels. Each end draws a nonce for every connection, and proves by an HMAC over both that it knows the secret:
what was overheard is of no use in another connection. `encryption` uses those nonces if an engine encrypts its KV.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from hetis.solver.errors import HetisError

NONCE_BYTES = PROOF_BYTES = 32
VARIABLE = "HETIS_WORKER_KEY"
LEAST_LETTERS, MOST_BYTES = 16, 4096


class InvalidKeyError(HetisError):
    """A required key is missing or not secret."""


def key_of(secret: str) -> bytes:
    """Return the key of HMACs for a secret, stripped of white space. Raises InvalidKeyError if it is too short."""
    letters = secret.strip()
    if len(letters) < LEAST_LETTERS:
        raise InvalidKeyError(f"the key has {len(letters)} letters, must have >= {LEAST_LETTERS}")
    return hashlib.sha256(letters.encode()).digest()


def proof_of(key: bytes, of: Literal["engine", "worker"], *said: bytes) -> bytes:
    """Return the proof that one end knows the key: an HMAC over the nonce of the other and what else was said."""
    code = hmac.new(key, of.encode(), "sha256")
    for part in said:
        code.update(len(part).to_bytes(8, "little") + part)
    return code.digest()


def read_key(path: Path | None, environment: Mapping[str, str]) -> bytes | None:
    """Return the key in a file or, without a file, in HETIS_WORKER_KEY; None if neither is given. Raises
    InvalidKeyError if the file is missing, is not a file, or others may read it; or the key is too short.
    """
    if path is not None:
        source, secret = str(path), _read(path)
    elif secret := environment.get(VARIABLE, ""):
        source = VARIABLE
    else:
        return None
    try:
        return key_of(secret)
    except InvalidKeyError as error:
        raise InvalidKeyError(f"{source}: {error}") from None


def _read(path: Path) -> str:
    try:
        # Non-blocking, because opening a pipe, say, would wait for someone to write to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidKeyError(f"{path}: it is not a file")
            if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
                raise InvalidKeyError(f"{path}: its mode is {mode:04o}: others may use it, must be 0600 or 0400")
            return file.read(MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidKeyError(f"{path}: {why}") from error
