"""Random inputs mutated from the corpus, and the check that a target accepts them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from tests.fuzz.targets import MOST_BYTES, MOST_S, Target

_WORDS = (
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-0.0", b"9" * 40, b"\x00", b"\xff\xfe", b"\xed\xa0\x80"),
    *(
        b"[]",
        b"{}",
        b'""',
        b"- ",
        b": ",
        b"\n",
        b"&a ",
        b"*a",
        b"!!python/object",
        b"<<: ",
        b"80GiB",
        b"1e3ms",
        b"{" * 200,
    ),
)


def mutations(target: Target, name: str, chance: random.Random) -> Iterator[bytes]:
    """Yield the kept inputs, then endless mutations of them."""
    kept = [path.read_bytes()[:MOST_BYTES] for path in target.inputs(name)]
    yield from kept
    kept.append(b"")
    while True:
        data = bytearray(chance.choice(kept))
        for _ in range(chance.randint(1, 6)):
            _mutate(data, chance, kept)
        yield bytes(data[:MOST_BYTES])


def _mutate(data: bytearray, chance: random.Random, kept: list[bytes]) -> None:
    first = chance.randint(0, len(data))
    last = min(len(data), first + chance.choice((0, 1, 1, 4, 16, 64)))
    match chance.randrange(7):
        case 0:
            del data[first:last]
        case 1:
            data[first:last] = chance.choice(_WORDS)
        case 2:
            data[first:first] = chance.randbytes(chance.randint(1, 4))
        case 3 if data:
            data[min(first, len(data) - 1)] ^= 1 << chance.randrange(8)
        case 4:
            data[first:first] = data[first:last] * chance.choice((1, 2, 50))
        case 5:
            other = chance.choice(kept)
            at = chance.randint(0, len(other))
            data[first:last] = other[at : at + chance.choice((4, 32, 256))]
        case _:
            lines = bytes(data).split(b"\n")
            chance.shuffle(lines)
            data[:] = b"\n".join(lines)


def failure_of(target: Target, data: bytes) -> BaseException | None:
    """Return the target's undocumented exception, or one about its time if that was too long, or None."""
    began_s = time.process_time()
    try:
        target.read(data)
    except Exception as error:
        return error
    took_s = time.process_time() - began_s
    return TimeoutError(f"{len(data)} bytes took {took_s:.1f} s of CPU") if took_s > MOST_S else None
