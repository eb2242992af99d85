"""Encryption of a connection over TCP, if its engine requests it: X25519, then AES-256-GCM in both directions.

Each end's nonce in the handshake is the public key of a pair that it draws for this connection, and the proofs of the
worker's key cover both: nobody without that key can stand between the two, and whoever learns it later cannot decrypt
what was recorded. Everything behind WELCOME is encrypted; what precedes it tells shapes and sizes only.

A record is its length, 4 bytes, then ciphertext and tag. Records are numbered in each direction, and their number is
the nonce of AES-GCM: a record that is changed, repeated, left out or out of order is refused.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hetis.runtime.transport.frames import ChannelStalledError, FrameError

RECORD_BYTES = 1 << 20  # most plaintext of a record
TAG_BYTES = 16
LENGTH_BYTES = 4


class Pipe(Protocol):
    """Ordered bytes in both directions."""

    name: str

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        """Write all buffers. Raises ChannelError, after which it is unknown how much was sent."""

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        """Fill the front of ``buffer`` and return the number of bytes, 0 after the time-out. Raises ChannelError."""

    def close(self) -> None: ...


class ConnectionKey:
    """The key pair of one end for one connection. Its public half serves as this end's nonce."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.nonce = self._private.public_key().public_bytes_raw()

    def encrypted(
        self, pipe: Pipe, end: Literal["engine", "worker"], other: bytes, key: bytes, *, stall_s: float = 10.0
    ) -> Pipe:
        """Return the pipe that encrypts for the other end, whose nonce is ``other``; ``key`` is the worker's. A record
        of which nothing more arrives for ``stall_s`` is an error.

        Raises FrameError if the other end's nonce is no public key.
        """
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError as error:
            raise FrameError(f"{pipe.name}: the other end's nonce is no key of X25519") from error
        nonces = self.nonce + other if end == "engine" else other + self.nonce
        keys = HKDF(algorithm=SHA256(), length=64, salt=key, info=b"hetis kv " + nonces).derive(shared)
        to_worker, to_engine = AESGCM(keys[:32]), AESGCM(keys[32:])
        seals, opens = (to_worker, to_engine) if end == "engine" else (to_engine, to_worker)
        return _EncryptedPipe(pipe, seals, opens, stall_s)


class _EncryptedPipe:
    """Records over another pipe."""

    def __init__(self, pipe: Pipe, seals: AESGCM, opens: AESGCM, stall_s: float) -> None:
        self.name = f"encrypted {pipe.name}"
        self._pipe, self._seals, self._opens, self._stall_s = pipe, seals, opens, stall_s
        self._heard_s = 0.0  # when something last arrived
        self._sent = self._received = 0  # records in each direction
        self._length = bytearray(LENGTH_BYTES)
        self._record: bytearray | None = None  # the one that arrives, once its length is known
        self._missing = memoryview(self._length)  # bytes of the length, and then of the record, that did not arrive yet
        self._plain = memoryview(b"")  # decrypted and not read yet

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        plain = memoryview(b"".join(buffers))
        records = []
        for begin in range(0, len(plain), RECORD_BYTES):
            part = plain[begin : begin + RECORD_BYTES]
            length = (len(part) + TAG_BYTES).to_bytes(LENGTH_BYTES, "little")
            records += [memoryview(length), memoryview(self._seals.encrypt(_nonce(self._sent), part, length))]
            self._sent += 1
        self._pipe.write(records, timeout_s)

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        until_s = time.monotonic() + timeout_s
        while not self._plain:
            came = self._pipe.read_into(self._missing, timeout_s)
            now_s = time.monotonic()
            if not came:
                has_begun = self._record is not None or len(self._missing) < LENGTH_BYTES
                if has_begun and now_s - self._heard_s > self._stall_s:
                    raise ChannelStalledError(f"{self.name}: a record stopped before its end")
                return 0
            self._heard_s = now_s
            self._missing = self._missing[came:]
            if not self._missing:
                self._take_part()
            timeout_s = max(until_s - now_s, 0.0)
        num = min(len(buffer), len(self._plain))
        buffer[:num], self._plain = self._plain[:num], self._plain[num:]
        return num

    def close(self) -> None:
        self._pipe.close()

    def _take_part(self) -> None:
        """Go on to the record whose length has arrived, or decrypt the one that has."""
        if self._record is None:
            size = int.from_bytes(self._length, "little")
            if not TAG_BYTES < size <= TAG_BYTES + RECORD_BYTES:
                raise FrameError(f"{self.name}: a record of {size} bytes, {TAG_BYTES + RECORD_BYTES} are the most")
            self._record = bytearray(size)
            self._missing = memoryview(self._record)
            return
        try:
            self._plain = memoryview(self._opens.decrypt(_nonce(self._received), self._record, self._length))
        except InvalidTag:
            raise FrameError(f"{self.name}: a record is not from the other end, or not the next one") from None
        self._received += 1
        self._record, self._missing = None, memoryview(self._length)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
