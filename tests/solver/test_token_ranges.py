"""Workers that hold ranges of tokens: their times worked out by hand, and compared with workers of head groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measuring.token_ranges import TokenRangeCost
from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost, PoolCost, rank_shape
from hetis.solver.model import AttentionKind, MlaShape, ModelSpec
from hetis.solver.profile import Fit, Op, Piece
from hetis.solver.workload import WorkloadMoments
from tests.solver.instances import MADE_UP, make_model, make_profile, make_workload

GQA = make_model(q_heads=8, kv_heads=2)  # heads of 32
MLA = replace(
    GQA, attention=AttentionKind.MLA, kv_heads=8,
    mla=MlaShape(kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, q_lora_rank=None),
)  # fmt: skip
LINK = Link(bytes_per_s=1e9, latency_s=1e-5)


def moments(context: int) -> WorkloadMoments:
    return replace(make_workload((context, 10)).moments(block_tokens=16), resident_context=float(context))


def device(model: ModelSpec, gpu: str, tp: int = 1, *, context: int = 1000, head_s: float = 0.0) -> DeviceCost:
    """A GPU that reads 1 byte in a nanosecond and computes in no time, unless a query head takes ``head_s``."""
    pieces = (Piece(byte_s=1e-9, head_s=head_s),)
    profile = make_profile(gpu)
    fits = [fit for fit in profile.fits if fit.op not in (Op.DECODE_ATTENTION, Op.TRANSFER)]
    fits.append(Fit(op=Op.DECODE_ATTENTION, pieces=pieces, provenance=MADE_UP))
    fits.append(Fit(op=Op.TRANSFER, pieces=(Piece(wire=1.0),), provenance=MADE_UP))
    shape = rank_shape(model, tp)
    assert shape is not None
    return DeviceCost(model, replace(profile, fits=tuple(fits)), moments(context), shape, LINK)


def ranges(model: ModelSpec = GQA, tp: int = 1, **options: float) -> TokenRangeCost:
    return TokenRangeCost(device(model, "A", tp, **options), device(model, "B", **options), LINK)  # type: ignore[arg-type]


def test_one_layer_takes_the_time_worked_by_hand() -> None:
    """Two requests of 1,000 tokens, three quarters of them on three cards; a token of a head group has 128 bytes."""
    found = ranges()
    assert found.own_s(2, 0.75) == pytest.approx(2 * 250 * 2 * 128 * 1e-9)
    assert found.worker_s(2, 0.75, 3) == pytest.approx(2 * 250 * 2 * 128 * 1e-9)
    # A card gets 8 queries and returns 8 outputs of 64 bytes and 4 each; the new token's KV goes to one of them.
    sent = 2 * (3 * 8 * (64 + 64 + 4) + 2 * 128)
    assert found.exchange_s(2, 3) == pytest.approx(sent / 1e9 + 2e-5)
    merged = 4 * 2 * 8 * (64 + 4)
    assert found.merge_s(2, 3) == pytest.approx(merged * 1e-9)
    assert found.attention_s(2, 0.75, 3) == pytest.approx(128e-6 + sent / 1e9 + 2e-5 + merged * 1e-9)
    assert found.card_bytes_per_token(0.75, 3) == 0.25 * 2 * 128


def test_latent_attention_sends_all_heads_in_the_latent_space() -> None:
    """MLA keeps 80 elements of a token, all on every rank; a query has 80, an output 64."""
    found = ranges(MLA, tp=4)
    assert found.own_s(1, 0.5) == pytest.approx(500 * 160 * 1e-9)
    assert found.worker_s(1, 0.5, 2) == pytest.approx(250 * 160 * 1e-9)
    assert found.exchange_s(1, 2) == pytest.approx((2 * 8 * (160 + 128 + 4) + 160) / 1e9 + 2e-5)
    assert found.merge_s(1, 2) == pytest.approx(3 * 8 / 4 * (128 + 4) * 1e-9)
    assert not found.primary.shape.splits_groups, "head groups cannot be given away here"


@given(st.integers(1, 64), st.sampled_from((1, 2)), st.integers(1, 16), st.sampled_from((0.0, 1e-7)))
def test_a_share_of_tokens_is_read_in_the_time_of_that_share_of_head_groups_where_cards_divide_them(
    micro_batch: int, groups: int, cards: int, head_s: float
) -> None:
    """Cards read no more KV than the busiest card with head groups, and never fewer queries than it."""
    by_token = ranges(head_s=head_s)
    by_head = PoolCost(by_token.primary, by_token.worker, LINK)
    pairs = float(by_head.load(micro_batch, groups, cards))
    busiest_s = float(by_head.worker.decode_attention_s(pairs, 4))
    card_s = by_token.worker_s(micro_batch, groups / 2, cards)
    more_heads_s = head_s * max(0.0, 8 * micro_batch - 4 * pairs)
    assert card_s <= (busiest_s + more_heads_s) * (1 + 1e-9)
    if head_s == 0.0 and micro_batch * groups % cards == 0:
        assert card_s == pytest.approx(busiest_s)
    assert by_token.exchange_s(micro_batch, cards) >= float(by_head.exchange_s(micro_batch, groups, cards)) * (1 - 1e-9)


def test_a_long_request_is_read_by_all_cards_and_a_short_one_costs_more_to_send() -> None:
    """One request with two head groups occupies two of eight cards by heads, and all of them by tokens."""
    for context, is_faster in ((20_000, True), (100, False)):
        by_token = ranges(context=context)
        by_head = PoolCost(by_token.primary, by_token.worker, LINK)
        heads_s = float(by_head.attention_s(1, 2, 8))
        assert (by_token.attention_s(1, 1.0, 8) < heads_s) is is_faster
