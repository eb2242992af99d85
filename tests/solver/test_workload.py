"""Averages of a workload, each compared with the average over every single token, and prefix cache hits in them."""

from __future__ import annotations

import math
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.errors import InvalidProblemError
from hetis.solver.workload import LengthBin, Workload, WorkloadMoments, moments_of

LENGTHS = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 60), st.sampled_from([1.0, 2.0, 5.0])), min_size=1, max_size=4
)
RATES = st.one_of(st.sampled_from([0.25, 0.5, 0.75]), st.floats(0, 0.999))


def bins_of(lengths: list[tuple[int, int, float]]) -> tuple[LengthBin, ...]:
    return tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=w) for p, o, w in lengths)


def cached_tokens(prompt: int, rate: float) -> int:
    return min(int(rate * prompt), prompt - 1)


@given(LENGTHS, st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_averages_are_those_of_all_tokens_that_are_computed(lengths: list[tuple[int, int, float]], rate: float) -> None:
    # Four, so that every rate leaves whole tokens; a prompt's last token is computed in any case.
    lengths = [(4 * prompt, output, weight) for prompt, output, weight in lengths]
    found = moments_of(bins_of(lengths), block_tokens=1, prefix_hit_rate=rate)
    total = sum(weight for _, _, weight in lengths)
    computed = [(range(cached_tokens(p, rate), p), w / total) for p, _, w in lengths]
    tokens = sum(share * len(each) for each, share in computed)
    assert found.mean_computed == pytest.approx(tokens)
    # The token at position i attends to i + 1 tokens, itself included.
    pairs = sum(share * sum(i + 1 for i in each) for each, share in computed)
    assert found.prefill_pairs == pytest.approx(pairs)
    assert found.computed_cv2 == pytest.approx(
        sum(share * len(each) ** 2 for each, share in computed) / tokens**2 - 1, abs=1e-9
    )
    # While token i is computed, the request holds i + 1/2 tokens on average; the integral adds 1/12 to the variance.
    held = sum(share * sum(i + 0.5 for i in each) for each, share in computed) / tokens
    second = sum(share * sum((i + 0.5) ** 2 + 1 / 12 for i in each) for each, share in computed) / tokens
    assert found.prefilling_context == pytest.approx(held)
    assert found.prefill_context_sd == pytest.approx(math.sqrt(max(0.0, second - held**2)), rel=1e-6, abs=1e-4)


@given(LENGTHS)
def test_without_hits_every_average_is_to_the_last_bit_what_it_was(lengths: list[tuple[int, int, float]]) -> None:
    bins = bins_of(lengths)
    p, w = (np.array([getattr(b, name) for b in bins], dtype=float) for name in ("prompt_tokens", "weight"))
    w = w / w.sum()
    mean, squared = float(w @ p), float(w @ (p * p))
    found = moments_of(bins, block_tokens=16)
    assert found.mean_computed == found.mean_prompt == mean
    assert found.p95_computed == found.p95_prompt
    assert found.prefill_pairs == float(w @ (p * (p + 1))) / 2
    assert found.prefilling_context == squared / (2 * mean)
    assert found.computed_cv2 == max(0.0, squared / mean**2 - 1.0)
    variance = float(w @ p**3) / (3 * mean) - found.prefilling_context**2
    assert found.prefill_context_sd == math.sqrt(max(0.0, variance))


@given(LENGTHS, RATES)
def test_hits_change_what_is_computed_and_nothing_that_is_held_by_decoding_requests(
    lengths: list[tuple[int, int, float]], rate: float
) -> None:
    bins = bins_of(lengths)
    without, found = (moments_of(bins, block_tokens=16, prefix_hit_rate=h) for h in (0.0, rate))
    kept = {"mean_prompt", "mean_output", "p95_prompt", "resident_context", "resident_context_sd"}
    assert kept <= {field.name for field in fields(WorkloadMoments)}
    for name in kept:
        assert getattr(found, name) == getattr(without, name)
    assert 1 <= found.mean_computed <= without.mean_computed
    assert 1 <= found.p95_computed <= without.p95_computed
    assert found.prefill_pairs <= without.prefill_pairs
    assert found.prefilling_context >= without.prefilling_context * (1 - 1e-12)
    assert all(math.isfinite(value) and value >= 0 for value in astuple(found))


def test_at_least_one_token_of_a_prompt_is_computed() -> None:
    found = moments_of(bins_of([(10, 5, 1.0)]), block_tokens=1, prefix_hit_rate=0.99)
    assert (found.mean_computed, found.p95_computed) == (1.0, 1.0)
    assert found.prefill_pairs == 10.0  # the last of ten tokens attends to all ten
    assert found.prefilling_context == 9.5


def test_a_workload_worked_by_hand() -> None:
    workload = Workload(name="w", bins=bins_of([(1000, 100, 1.0)]), prefix_hit_rate=0.4)
    found = workload.moments(block_tokens=1)
    assert found.mean_computed == 600
    assert found.prefill_pairs == 1000 * 1001 / 2 - 400 * 401 / 2
    assert found.prefilling_context == 700  # from 400 to 1000
    assert found.prefill_context_sd == pytest.approx(600 / math.sqrt(12))  # uniform between the two


def test_clipping_keeps_the_rate() -> None:
    workload = Workload(name="w", bins=bins_of([(1000, 100, 1.0)]), prefix_hit_rate=0.5)
    clipped = workload.clipped_to(300)
    assert clipped.prefix_hit_rate == 0.5
    assert clipped.moments().mean_computed == 100  # half of the 200 that the output leaves


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0, math.nan])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(InvalidProblemError) as caught:
        replace(Workload(name="w", bins=bins_of([(10, 5, 1.0)])), prefix_hit_rate=rate)
    assert str(caught.value) == f"prefix_hit_rate of w is {rate}, must be >= 0 and < 1"
