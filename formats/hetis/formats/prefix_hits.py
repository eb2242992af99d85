"""Prefix cache hits of traces in Mooncake's form, whose requests name the blocks of 512 tokens that make their prompts.

The cache that is counted is unlimited and shared by all replicas: a request hits the leading blocks that any earlier
request had. So the rate is the most that a cache can reach on this trace.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.trace_rows import MAX_LINE, json_object, opened

IntArray = npt.NDArray[np.int64]

BLOCK_TOKENS = 512  # of Mooncake's traces, FAST25-release/traces
FIELD = "hash_ids"


def hit_tokens(label: str, prompt_tokens: IntArray, order: IntArray) -> IntArray:
    """Return how many tokens of each prompt an earlier request has left in an unlimited cache, at most all but one.

    Args:
        label: a JSONL trace that was read already.
        prompt_tokens: of its requests, in the order of the file, [requests].
        order: of arrival: numbers of requests, [requests].

    Raises:
        DocumentError: a request does not name the blocks of its prompt.
    """
    blocks = _blocks(label, prompt_tokens)
    hits = np.zeros(len(prompt_tokens), np.int64)
    seen = set[int]()
    for request in order.tolist():
        known = next((i for i, block in enumerate(blocks[request]) if block not in seen), len(blocks[request]))
        hits[request] = min(known * BLOCK_TOKENS, int(prompt_tokens[request]) - 1)
        seen.update(blocks[request])
    return hits


def _blocks(label: str, prompt_tokens: IntArray) -> list[array[int]]:
    """Return the numbers of the blocks of every request, in the order of the file."""
    found: list[array[int]] = []
    with opened(label) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), start=1):
            if line.strip():
                ids = json_object(label, number, line).get(FIELD)
                found.append(_checked(label, number, ids, int(prompt_tokens[len(found)])))
    return found


def _checked(label: str, line: int, ids: Any, prompt_tokens: int) -> array[int]:
    if ids is None:
        raise no_hash_ids(label, line)
    try:
        blocks = array("q", ids)
    except (TypeError, OverflowError):
        raise _wrong(label, line, "is not a list of whole numbers of 64 bits") from None
    expected = -(-prompt_tokens // BLOCK_TOKENS)
    if len(blocks) != expected:
        message = f"has {len(blocks)} blocks, {prompt_tokens} prompt tokens make {expected} of {BLOCK_TOKENS}"
        raise _wrong(label, line, message)
    return blocks


def _wrong(label: str, line: int, message: str) -> DocumentError:
    return DocumentError([Problem(file=label, line=line, path=FIELD, message=message)])


def no_hash_ids(label: str, line: int | None = None) -> DocumentError:
    """Return the error for a source whose hits cannot be counted."""
    message = "prefix hits are counted from the hash_ids of a trace in Mooncake's form: give a share such as 0.4"
    return single_problem(label, f"has no {FIELD}; {message}", line=line)
