"""The sums that a micro-batch keeps equal those over all its requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.kv_memory import KvGrowth, group_blocks
from hetis.simulator.micro_batch import MicroBatch
from tests.models import InShort, replace, shape_of
from tests.solver.instances import make_compressed, make_model

BLOCK = 4


class Told:
    """The oracle, request by request: contexts before the current step."""

    def __init__(self, growth: KvGrowth) -> None:
        self.growth = growth
        self.context: dict[int, int] = {}

    def attended(self) -> float:
        """Return the tokens attended to during the step, each token's own included."""
        return sum(self.growth.attended(context + 1) for context in self.context.values())

    def crossing(self) -> int:
        return sum(self.growth.blocks(c + 1) - self.growth.blocks(c) for c in self.context.values())


def test_contexts_grow_beyond_the_chosen_tokens_by_the_keys_of_the_layers_with_an_indexer() -> None:
    """One of two layers has an indexer of 4 bytes per token, and both have a latent of 8 (4 elements of 16 bits)."""
    model = replace(
        make_model(num_layers=2, q_heads=4, kv_heads=4),
        mla=shape_of(kv_lora_rank=3, qk_rope_head_dim=1, qk_nope_head_dim=4, v_head_dim=4, q_lora_rank=8),
        indexer=shape_of(top_tokens=6, heads=1, head_dim=4, key_bytes=4.0, layers=1),
    )
    growth = KvGrowth(model, BLOCK)
    assert growth.attended(10) == pytest.approx((2 * 8 * 6 + 4 * 10) / (2 * 8 + 4))
    assert (growth.blocks(10), growth.cached(10)) == (3, 10)  # all tokens keep a latent, and a key in one layer
    assert group_blocks(2 * 8 * BLOCK + 4 * BLOCK, model, layers=2, groups=1, block_tokens=BLOCK) == 1


def test_contexts_of_compressed_attention_read_a_window_the_chosen_entries_and_keys_of_all() -> None:
    model = make_compressed()
    shape, growth = InShort(model).compressed, KvGrowth(model, BLOCK)
    kept = model.kv_bytes_per_token_group()
    for context in (24, 50, 80, 81, 300):  # from the window to beyond 20 entries of 4 tokens
        entries = 24 + (3 * min(20.0, context / 4) + 2 * context / 32) / 6
        read = entries * 2 * model.head_dim + 3 / 6 * context / 4 * shape.index_key_bytes
        assert growth.attended(context) == pytest.approx(read / kept)
    assert growth.attended(0) == pytest.approx(24 * 2 * model.head_dim / kept), "a window counts as full"
    assert (growth.blocks(300), growth.cached(300), growth.frees) == (-(-300 // BLOCK), 300, False)


@given(
    st.sampled_from([None, (6, 1, True), (6, 2, True), (6, 2, False), (10, 3, True)]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14), st.integers(1, 12)), min_size=5, max_size=40),
    st.randoms(use_true_random=False),
)
def test_sums_are_those_of_the_single_requests(
    window: tuple[int, int, bool] | None, joins: list[tuple[int, int, int]], random: object
) -> None:
    model = make_model()
    if window is not None:
        model = replace(
            model, sliding_window=window[0], sliding_layers=-(-model.num_layers // window[1]), windows_free_kv=window[2]
        )
    growth = KvGrowth(model, BLOCK)
    batch, told, number = MicroBatch(0, (), growth), Told(growth), 0
    left: dict[int, int] = {}
    back: tuple[int, int, int] | None = None  # was evicted in the step before, and has one token more
    for many, context, remaining in joins:
        batch.step += 1
        batch.cross_windows()
        if back is not None:
            batch.join(*back)
            told.context[back[0]], left[back[0]] = back[1:]
            back = None
        elif told.context and random.random() < 0.3:  # type: ignore[attr-defined]
            evicted = random.choice(sorted(told.context))  # type: ignore[attr-defined]
            held, still = told.context.pop(evicted), left.pop(evicted)
            batch.leave(evicted, held)
            back = (evicted, held + 1, still) if random.random() < 0.5 else None  # type: ignore[attr-defined]
        for _ in range(many):
            number += 1
            batch.join(number, context, remaining)
            told.context[number], left[number] = context, remaining
        assert batch.crossing() == told.crossing()
        batch.grow()
        assert batch.attended == pytest.approx(told.attended())
        for request in list(told.context):
            told.context[request] += 1
            left[request] -= 1
        done = [request for request in batch.finishing.pop(batch.step, []) if left.get(request) == 0]
        assert sorted(set(done)) == sorted(request for request, steps in left.items() if steps == 0)
        for request in dict.fromkeys(done):
            batch.leave(request, told.context.pop(request))
            del left[request]
    assert len(batch.decoding) == len(told.context)
