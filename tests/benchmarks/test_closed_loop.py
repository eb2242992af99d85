"""A closed loop of requests in virtual time, by hand: an iteration takes 1 s, one with prompts 3 s."""

from __future__ import annotations

from collections.abc import Callable
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


def test_drafts_are_computed_with_the_request_s_own_token_and_half_of_all_are_kept() -> None:
    """A prompt takes 3 s; three tokens per iteration 1 s, and two drafts a quarter of 1 s each."""

    def drafting(decoding: int, attended: float, tokens: int, pairs: float, read: float, rows: int) -> float:
        assert tokens or (decoding in (1, 3) and rows == decoding)
        return usual_s(decoding, attended, tokens, pairs, read, rows)

    found = times(1, 7, in_flight=1, seconds=drafting, seats=1, draft_tokens=2, tokens_per_iteration=2.0, layers=4)
    assert found == (3.0, 1.5 * 3 / 6)
