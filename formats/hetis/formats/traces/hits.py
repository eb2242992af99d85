"""Prefix cache hits of traces whose requests name the blocks that make their prompts (Mooncake, Qwen-Bailian)."""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.traces.rows import MAX_LINE, json_object, opened

IntArray = npt.NDArray[np.int64]

BLOCK_TOKENS = 512  # block size of Mooncake's traces, FAST25-release/traces
_BLOCK_SIZES = (BLOCK_TOKENS, 16, 32, 64, 128, 256, 1024)  # 16: Qwen-Bailian's
FIELD = "hash_ids"


def hit_tokens(label: str, prompt_tokens: IntArray, order: IntArray) -> IntArray:
    """Return how many tokens of each prompt an earlier request has left in an unlimited cache, at most all but one.
    Raises DocumentError if a request does not name the blocks of its prompt.

    ``prompt_tokens`` are those of the requests in the order of the file, a JSONL trace that was read already, and
    ``order`` has their numbers in the order of arrival, both of shape [requests].
    """
    blocks, size = _blocks(label, prompt_tokens)
    hits = np.zeros(len(prompt_tokens), np.int64)
    seen = set[int]()
    for request in order.tolist():
        known = next((i for i, block in enumerate(blocks[request]) if block not in seen), len(blocks[request]))
        hits[request] = min(known * size, int(prompt_tokens[request]) - 1)
        seen.update(blocks[request])
    return hits


def _blocks(label: str, prompt_tokens: IntArray) -> tuple[list[array[int]], int]:
    """Return the numbers of the blocks of every request, in the order of the file, and the tokens of a block: of the
    usual sizes, the one that gives every prompt as many blocks as it names.
    """
    found: list[array[int]] = []
    places: list[int] = []
    with opened(label) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), start=1):
            if line.strip():
                found.append(_ids(label, number, json_object(label, number, line).get(FIELD)))
                places.append(number)
    named = np.array(list(map(len, found)), np.int64)

    def fits(tokens: int) -> bool:  # Qwen-Bailian's prompts of whole blocks name the next one, too
        more = (named == prompt_tokens // tokens + 1) & (tokens != BLOCK_TOKENS)
        return bool(np.all((named == -(-prompt_tokens // tokens)) | more))

    size = next((one for one in _BLOCK_SIZES if fits(one)), None)
    if size is not None:
        return found, size
    wrong = int(np.argmax(-(-prompt_tokens // BLOCK_TOKENS) != named))
    tokens = int(prompt_tokens[wrong])
    expected = f"{tokens} prompt tokens make {-(-tokens // BLOCK_TOKENS)} of {BLOCK_TOKENS}"
    raise _wrong(label, places[wrong], f"has {named[wrong]} blocks, {expected}")


def _ids(label: str, line: int, ids: Any) -> array[int]:
    if ids is None:
        raise no_hash_ids(label, line)
    try:
        return array("q", ids)
    except (TypeError, OverflowError):
        raise _wrong(label, line, "is not a list of whole numbers of 64 bits") from None


def _wrong(label: str, line: int, message: str) -> DocumentError:
    return DocumentError([Problem(file=label, line=line, path=FIELD, message=message)])


def no_hash_ids(label: str, line: int | None = None) -> DocumentError:
    """Return the error for a source whose hits cannot be counted."""
    message = (
        "prefix hits can only be counted from the hash_ids of a trace in Mooncake's form: give a share such as 0.4"
    )
    return single_problem(label, f"has no {FIELD}; {message}", line=line)
