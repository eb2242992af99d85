"""Strangers that speak raw HTTP/2, in a process of their own: they keep to no rule that a gRPC client keeps.

    python -m tests.faults.raw_strangers HOST:PORT --kind resets|headers --seconds S

``resets`` opens calls and resets each at once, as fast as the connections carry them; ``headers`` opens calls with as
much metadata as a planner takes, and leaves them open. Prints the number of calls, and of connections that the planner
closed, as JSON.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress

CONNECTIONS = 31
_HEADERS, _RST_STREAM, _SETTINGS = 1, 3, 4
_ACK, _END_HEADERS = 1, 4
_METADATA_BYTES = {"resets": 0, "headers": 3_900}
_BATCH = 100  # calls in one write


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


def _text(text: bytes) -> bytes:
    """Return a string of HPACK, without Huffman's code."""
    length = len(text)
    if length < 127:
        return bytes([length]) + text
    rest, encoded = length - 127, bytearray([127])
    while rest >= 128:
        encoded.append(rest % 128 + 128)
        rest //= 128
    return bytes(encoded) + bytes([rest]) + text


def headers(metadata_bytes: int) -> bytes:
    """Return the header block of a call, in literals that no table keeps."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": b"/hetis.v1.PlanService/GetPlan", b":authority": b"a"}
    fields |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    if metadata_bytes:
        fields[b"x-large"] = b"x" * metadata_bytes
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())


class Stranger:
    """One connection after another; each sends calls until the planner closes it."""

    def __init__(self, address: str, kind: str, end_s: float) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._kind, self._end_s = (host, int(port)), kind, end_s
        self.found: Counter[str] = Counter()

    def run(self) -> None:
        while time.monotonic() < self._end_s:
            with suppress(OSError):
                self._attack()
                continue
            self.found["closed"] += 1
            time.sleep(0.05)

    def _attack(self) -> None:
        block = headers(_METADATA_BYTES[self._kind])
        with socket.create_connection(self._address, timeout=5) as one:
            one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0) + frame(_SETTINGS, _ACK, 0))
            reader = threading.Thread(target=self._swallow, args=(one,), daemon=True)
            reader.start()
            stream = 1
            while time.monotonic() < self._end_s and reader.is_alive():
                sent = bytearray()
                for _ in range(_BATCH if self._kind == "resets" else 1):
                    sent += frame(_HEADERS, _END_HEADERS, stream, block)
                    if self._kind == "resets":
                        sent += frame(_RST_STREAM, 0, stream, struct.pack(">I", 8))
                    stream += 2
                    self.found["calls"] += 1
                one.sendall(sent)
            if time.monotonic() < self._end_s:
                raise ConnectionResetError

    @staticmethod
    def _swallow(one: socket.socket) -> None:
        with suppress(OSError):
            one.settimeout(None)
            while one.recv(1 << 16):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--kind", choices=_METADATA_BYTES, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    strangers = [Stranger(given.address, given.kind, time.monotonic() + given.seconds) for _ in range(CONNECTIONS)]
    threads = [threading.Thread(target=stranger.run) for stranger in strangers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(sum((stranger.found for stranger in strangers), Counter[str]())))


if __name__ == "__main__":
    main()
