"""Observations of iterations in the latencies that a client measured.

While no request waits for its first token, an engine only decodes, and every request that has begun gets a token per
iteration. So between two changes (a request is sent, gets its first or its last token), the time between tokens is that
of one iteration, and who decodes is known, with all lengths. What passes beside prompts is left out: when an engine
computes which of their chunks, and how much it found in its cache, no client sees.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from hetis.formats.errors import single_problem
from hetis.formats.traces.latencies import TimedRequest
from hetis.profiler.calibrate.observed import Observation, Observed, ObservedKind, ObservedWork

LEAST = 40
_LEAST_GAPS = 2  # of one request in a stretch, whose ends are then not those of the same iteration by chance
_SAME = 0.02  # relative difference of pieces and tokens of an answer, whose last piece may be empty


def observed_in_latencies(label: str, requests: Sequence[TimedRequest]) -> Observed:
    """Return an observation for every stretch in which the same requests decode, and no other waits.

    Raises DocumentError if answers do not arrive token by token.
    """
    begun = [one for one in requests if not one.has_failed]
    if not begun:
        raise single_problem(label, f"has no request that was answered, of {len(requests):,}")
    in_pieces = sum(len(one.token_s) < (1 - _SAME) * one.output_tokens - 1 for one in begun)
    if in_pieces > _SAME * len(begun):
        raise single_problem(
            label,
            f"has {in_pieces:,} of {len(begun):,} answers with several tokens at once: measure without speculative "
            "decoding and with --stream-interval 1",
        )
    left_out, found = Counter[str](), list[Observation]()
    for begin_s, end_s, decoding in _stretches(requests):
        gaps, seconds, attended = 0, 0.0, 0.0
        for one in decoding:
            first, last = bisect_left(one.token_s, begin_s), bisect_right(one.token_s, end_s) - 1
            attended += one.prompt_tokens + (first + max(first, last) + 1) / 2
            if last - first >= _LEAST_GAPS:
                gaps, seconds = gaps + last - first, seconds + one.token_s[last] - one.token_s[first]
        if not gaps:
            left_out[f"fewer than {_LEAST_GAPS} iterations between requests"] += 1
        elif seconds > 0:
            work = ObservedWork(decoding=len(decoding), attended_tokens=attended)
            found.append(Observation(kind=ObservedKind.DECODE, seconds=seconds / gaps, parts=((1.0, work),)))
    failed = len(requests) - len(begun)
    return Observed(
        what="stretches",
        origin="vLLM's clients",
        least=LEAST,
        observations=tuple(found),
        left_out=left_out,
        notes=(f"{failed:,} requests failed: how long the server worked on them is not known",) if failed else (),
    )


def _stretches(requests: Sequence[TimedRequest]) -> Iterator[tuple[float, float, list[TimedRequest]]]:
    """Yield the times between two changes, in order, in which requests decode and none waits or has failed."""
    changes = list[tuple[float, int, int]]()  # time, change in number of those that wait, index of a request
    for index, one in enumerate(requests):
        changes.append((one.start_s, 1, index))
        changes.append((one.token_s[-1] if one.has_failed else one.token_s[0], -1, index))
        if not one.has_failed:
            changes.append((one.token_s[-1], 0, index))
    changes.sort()
    waiting, decoding = 0, dict[int, TimedRequest]()
    for (at_s, change, index), (next_s, _, _) in pairwise(changes):
        waiting += change
        if not change:
            decoding.pop(index, None)
        elif change < 0 and not requests[index].has_failed:
            decoding[index] = requests[index]
        if not waiting and decoding and next_s > at_s:
            yield at_s, next_s, list(decoding.values())
