"""Sums of the ledger equal those of a recount, however much contexts grow at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.dispatch.ledger import Ledger


def ledger_of(requests: list[tuple[int, int, int]], block_tokens: int = 16) -> Ledger:
    """Build a ledger of requests (context, remaining, groups on the first of two devices), with four groups each."""
    ledger = Ledger(2, block_tokens)
    for number, (context, remaining, first) in enumerate(requests):
        ledger.add(f"r{number}", context, remaining, np.array([first, 4 - first]))
    return ledger


lengths = st.tuples(st.integers(1, 200), st.integers(0, 100), st.integers(0, 4))
rooms = st.integers(0, 60)


@given(st.lists(lengths, min_size=1, max_size=6), st.integers(0, 90), st.sampled_from([1, 16]), st.booleans())
def test_contexts_may_grow_by_any_number_of_tokens(
    requests: list[tuple[int, int, int]], tokens: int, block_tokens: int, moves: bool
) -> None:
    ledger = ledger_of(requests, block_tokens)
    if moves and requests[0][2]:
        ledger.send(ledger.slots["r0"], 1, 0, 1)  # groups in transit grow at both ends
    some = np.array([slot for name, slot in ledger.slots.items() if name != "r1"], np.int64)
    ledger.lengthen(some, tokens)
    ledger.check(4)


def test_a_block_is_used_from_its_first_token_on() -> None:
    ledger = ledger_of([(16, 40, 3)])
    assert ledger.used.tolist() == [3, 1]
    ledger.lengthen(np.array([ledger.slots["r0"]]), 17)  # 33 tokens: three blocks
    assert ledger.used.tolist() == [9, 3]
    assert ledger.expected.tolist() == [12, 4]  # 56 tokens: four blocks
    assert ledger.tokens.tolist() == [99, 33]
    ledger.lengthen(np.array([ledger.slots["r0"]]), 40)  # 17 more than expected
    assert ledger.expected.tolist() == ledger.used.tolist() == [15, 5]


@given(st.lists(lengths, min_size=1, max_size=6), st.integers(1, 300), st.tuples(rooms, rooms), st.booleans())
def test_one_context_grows_as_several_do_or_not_at_all(
    requests: list[tuple[int, int, int]], context: int, room: tuple[int, int], moves: bool
) -> None:
    ledger, same = ledger_of(requests), ledger_of(requests)
    slot = ledger.slots["r0"]
    if moves and requests[0][2]:
        for one in (ledger, same):
            one.send(slot, 1, 0, 1)
    before, total = requests[0][0], ledger.used + np.array(room)
    same.lengthen(np.array([slot]), max(0, context - before))
    fits = bool(np.all(same.used <= total))
    assert ledger.lengthen_one(slot, context, total) == fits
    ledger.check(4)
    if fits:
        for name in ("context", "remaining", "used", "expected", "tokens"):
            assert np.array_equal(getattr(ledger, name), getattr(same, name))
    else:
        assert ledger.context[slot] == before


def test_one_context_takes_the_last_block_and_none_beyond() -> None:
    ledger = ledger_of([(16, 40, 3)])
    slot = ledger.slots["r0"]
    ledger.send(slot, 1, 0, 1)
    last = ledger.used + np.array([3, 2])  # the group in transit grows at both ends
    assert not ledger.lengthen_one(slot, 17, last - np.array([0, 1]))
    assert ledger.lengthen_one(slot, 17, last)
    assert ledger.used.tolist() == last.tolist()
    assert not ledger.lengthen_one(slot, 33, last)
