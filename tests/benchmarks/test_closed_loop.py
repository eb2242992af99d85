"""A closed loop of requests in virtual time, by hand: an iteration takes 1 s, one with prompts 3 s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.accuracy.closed_loop import Engine, Load, balanced_copies, closed_loop


def usual_s(decoding: int, attended: float, tokens: int, pairs: float, read: float, rows: int, *others: int) -> float:
    return 3.0 if tokens else 1.0


def times(
    requests: int,
    output_tokens: int,
    *,
    in_flight: int = 2,
    loop: Callable[..., Any] = closed_loop,
    seconds: Callable[..., float] = usual_s,
    **how: Any,
) -> tuple[float, float]:
    """Return the means of TTFT and TPOT of requests of 4 prompt tokens, by default in chunks of 4 and two seats."""
    load = Load(in_flight=in_flight, total=requests, prompt_tokens=4, output_tokens=output_tokens)
    engine = Engine(**{"chunk_tokens": 4, "seats": 2, "mixes": True} | how)
    return loop(load, engine, seconds, lambda context: context)


def test_virtual_time_by_hand() -> None:
    """Two requests of 3 output tokens."""
    # Mixed: prompts at 3 s and, with the first one's second token, 7 s (the budget left is 3 of 4, so two chunks:
    # 6 s and 9 s). The first has its tokens at 3, 6, 9 s, the second at 9, 10, 11 s.
    assert times(2, 3) == (6.0, 2.0)
    # Separate: prompts at 3 s and 6 s, then both decode: 7 s, 8 s.
    assert times(2, 3, mixes=False) == (4.5, 1.75)
    # One seat: the second waits until the first ends at 5 s.
    assert times(2, 3, seats=1) == (5.5, 1.0)


def test_a_server_reads_one_prompt_after_another() -> None:
    """A token is read in 2 s: prompts are read after 8 and 16 s."""
    # The first has its tokens at 11, 12, 13 s, the second at 19, 20, 21 s.
    assert times(2, 3, chunk_tokens=8, reading_s=2.0) == (15.0, 1.0)
    # A prompt is read after 2 s, the other after 4: tokens at 5, 8, 9 s and 8, 9, 10 s.
    assert times(2, 3, chunk_tokens=8, reading_s=0.5) == (6.5, 1.5)
    assert times(2, 3, chunk_tokens=8) == (3.0, 1.0)


def test_new_requests_wait_until_they_are_looked_for_or_many_enough() -> None:
    """Three requests of 4 output tokens, two at once."""
    # Tokens at 3, 6, 9, 10 s; 9, 10, 13, 16 s; the third arrives at 10 s: 16, 17, 18, 19 s.
    assert times(3, 4) == pytest.approx((18 / 3, 17 / 9))
    # It is seen at 11 s, with the second's third token: 17, 18, 19, 20 s, while the second ends at 14 s.
    assert times(3, 4, poll_iterations=2) == pytest.approx((19 / 3, 15 / 9))
    # The second waits for an iteration (first: 3, 4, 7, 10 s), and so does the third (second: 10, 11, 14, 17 s).
    assert times(3, 4, wait_iterations=1, wait_tokens=100) == pytest.approx((20 / 3, 17 / 9))
    # The prompt and the request that decodes are enough.
    assert times(3, 4, wait_iterations=1, wait_tokens=5) == times(3, 4)


def test_a_request_is_too_late_for_the_iteration_that_is_scheduled_ahead() -> None:
    """The same requests. The successor of an ended one arrives during the next iteration, and joins the one after."""
    # Tokens at 3, 6, 9, 10 s; 9, 10, 11, 14 s; the third arrives at 10 s, as the iteration at 11 s is scheduled: 17 s.
    assert times(3, 4, schedules_ahead=True) == pytest.approx((19 / 3, 15 / 9))
    # Prompts are read in 0.4 s. The second is read while the first is computed, too late for the next iteration: tokens
    # at 3.4, 4.4, 7.4, 10.4 s; 10.4, 11.4, 12.4, 15.4 s. The third is read at 10.8 s, after that of 11.4 s: 18.4 s.
    assert times(3, 4, schedules_ahead=True, reading_s=0.1) == pytest.approx((21.8 / 3, 15 / 9))


@pytest.mark.parametrize(
    ("how", "first_tokens_s"),
    [
        # Four tokens have room for one prompt, then for three tokens of the second, for its last and two of the third,
        # and, beside two that decode, for the rest.
        ({"chunk_tokens": 4}, (3, 9, 12)),
        # Ten have room for two, and for half of the third or none of it; either way it is complete after 6 s.
        ({"chunk_tokens": 10}, (3, 3, 6)),
        ({"chunk_tokens": 10, "keeps_whole": True}, (3, 3, 6)),
        # Six have room for one and a half.
        ({"chunk_tokens": 6}, (3, 6, 9)),
        ({"chunk_tokens": 6, "keeps_whole": True}, (3, 6, 9)),
        # Drafts take up room, too: of four tokens, one is left beside a request with two drafts, and one at the least.
        ({"chunk_tokens": 4, "draft_tokens": 2}, (3, 15, 27)),
    ],
)
def test_prompts_are_split_or_wait_for_an_iteration_with_room(
    how: dict[str, Any], first_tokens_s: tuple[float, ...]
) -> None:
    """Three requests of 13 output tokens arrive together."""
    found = times(3, 13, in_flight=3, seats=3, layers=10**9, **how)[0]
    assert found == pytest.approx(sum(first_tokens_s) / 3)


def test_whole_prompts_are_fewer_in_an_iteration() -> None:
    """Four prompts of 4 tokens in iterations of 6: split, four take three of 3 s; whole, each takes one."""
    four = {"in_flight": 4, "chunk_tokens": 6, "seats": 4, "mixes": False}
    assert times(4, 1, **four)[0] == pytest.approx((3 + 6 + 6 + 9) / 4)
    assert times(4, 1, **four, keeps_whole=True)[0] == pytest.approx((3 + 6 + 9 + 12) / 4)


def test_copies_wait_until_all_have_a_prompt() -> None:
    """Two copies and requests of 4 output tokens. An iteration has room for a prompt."""

    def of_copies(requests: int, **how: int) -> tuple[float, float]:
        copies = {"chunk_tokens": 5, "keeps_whole": True, "copies": 2}
        return times(requests, 4, in_flight=requests, loop=balanced_copies, **copies, **how)

    # Each copy computes a prompt: tokens at 3, 4, 7, 8 s. The third waits for an iteration, and is computed in the
    # second one without a prompt on the other copy: tokens at 7, 8, 9, 10 s.
    assert of_copies(3, balance_iterations=2) == pytest.approx((13 / 3, 13 / 9))
    # It does not wait: 6, 7, 8, 9 s.
    assert of_copies(3, balance_iterations=1) == pytest.approx((12 / 3, 13 / 9))
    # With a fourth, both have prompts and need not wait, or gather for an iteration.
    assert of_copies(4, balance_iterations=9)[0] == pytest.approx((2 * 3 + 2 * 6) / 4)
    assert of_copies(4, balance_iterations=9, gather_iterations=1)[0] == pytest.approx((2 * 3 + 2 * 7) / 4)


def test_a_copy_alone_is_as_one_engine() -> None:
    load = Load(in_flight=5, total=40, prompt_tokens=40, output_tokens=30, shortest=0.5)
    engine = Engine(
        chunk_tokens=60, seats=4, mixes=True, keeps_whole=True, balance_iterations=1, reading_s=0.1, draft_tokens=1,
        tokens_per_iteration=1.5, layers=4,
    )  # fmt: skip

    def seconds(decoding: int, attended: float, tokens: int, pairs: float, read: float, rows: int, *_: int) -> float:
        return 1.0 + 0.1 * decoding + 0.01 * attended + 0.2 * tokens + 0.001 * pairs + 0.01 * rows

    for each in (engine, replace(engine, schedules_ahead=True)):
        one = closed_loop(load, each, seconds, lambda context: context)
        assert balanced_copies(load, each, seconds, lambda context: context) == pytest.approx(one)


def test_drafts_are_computed_with_the_request_s_own_token_and_half_of_all_are_kept() -> None:
    """A prompt takes 3 s; three tokens per iteration 1 s, and two drafts a quarter of 1 s each."""

    def drafting(decoding: int, attended: float, tokens: int, pairs: float, read: float, rows: int) -> float:
        assert tokens or (decoding in (1, 3) and rows == decoding)
        return usual_s(decoding, attended, tokens, pairs, read, rows)

    found = times(1, 7, in_flight=1, seconds=drafting, seats=1, draft_tokens=2, tokens_per_iteration=2.0, layers=4)
    assert found == (3.0, 1.5 * 3 / 6)
