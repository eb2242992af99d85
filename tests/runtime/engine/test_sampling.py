"""Tokens are drawn from the distribution that the parameters say, by each request's own numbers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.engine.request import RequestError, SamplingParams
from hetis.runtime.engine.sampling import Sampler, likeliest, sample

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def shares(params: SamplingParams, draws: int = 4000) -> list[float]:
    sampler = Sampler(params)
    counts = Counter(sampler.choose(LOGITS) for _ in range(draws))
    return [counts[token] / draws for token in range(len(LOGITS))]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampler(SamplingParams()).choose(LOGITS) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_likeliest_of_each_row_are_what_torch_says_and_the_first_where_they_tie(dtype: torch.dtype) -> None:
    logits = torch.randint(-3, 4, (40, 30), generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0], logits[1, 7:9] = -torch.inf, torch.nan
    found = likeliest(logits)
    assert found.dtype is torch.int64
    assert found.tolist() == logits.argmax(dim=-1).tolist()
    assert all(token == row.tolist().index(max(row)) for row, token in zip(logits[2:], found[2:].tolist(), strict=True))


@pytest.mark.parametrize("temperature", [1e-9, 1e-308, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    assert Sampler(SamplingParams(temperature=temperature, seed=1)).choose(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    wanted = torch.softmax(LOGITS / temperature, dim=0).tolist()
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    assert shares(SamplingParams(temperature=temperature, seed=1)) == pytest.approx(wanted, abs=0.032)


def test_top_k_leaves_the_k_likeliest() -> None:
    found = shares(SamplingParams(temperature=1.0, top_k=2, seed=2))
    likeliest = torch.softmax(torch.tensor([3.0, 2.0]), dim=0).tolist()
    assert found == pytest.approx([0, likeliest[0], likeliest[1], 0, 0], abs=0.032)


def test_top_p_leaves_the_tokens_that_reach_it() -> None:
    # Shares are 0.64, 0.23, 0.09, ...: 0.65 needs the first two, 0.6 the first alone.
    found = shares(SamplingParams(temperature=1.0, top_p=0.65, seed=3))
    assert [share > 0 for share in found] == [False, True, True, False, False]
    assert shares(SamplingParams(temperature=1.0, top_p=0.6, seed=3), 50)[1] == 1.0


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=9), st.floats(0.1, 3), st.integers(0, 9), st.floats(0.01, 1))
def test_every_draw_is_among_what_is_left(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    token = Sampler(params).choose(torch.tensor(logits))
    above = sum(other > logits[token] for other in logits)
    assert not top_k or above < top_k
    ahead = torch.softmax(torch.tensor(logits).double() / temperature, dim=0)[torch.tensor(logits) > logits[token]]
    assert above == 0 or top_k or ahead.sum() < top_p


def test_the_same_seed_draws_the_same_whoever_else_is_in_the_batch() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    alone, among = Sampler(params), Sampler(params)
    other = SamplingParams(temperature=1.0, seed=8)
    noise = Sampler(other)
    rows = torch.stack([LOGITS, LOGITS])
    for _ in range(20):
        [first], _ = sample(LOGITS[None], [alone], [params])
        (_, second), _ = sample(rows, [noise, among], [other, params])
        assert first == second


def test_log_probabilities_are_of_the_whole_distribution() -> None:
    params = SamplingParams(temperature=1.0, top_k=1, logprobs=2)
    [token], [logprob] = sample(LOGITS[None], [Sampler(params)], [params])
    logs = torch.log_softmax(LOGITS, dim=0)
    assert token == 1
    assert logprob is not None
    assert logprob.chosen == pytest.approx(float(logs[1]))
    assert [id_ for id_, _ in logprob.likeliest] == [1, 2]
    assert logprob.likeliest[1][1] == pytest.approx(float(logs[2]))


def test_parameters_out_of_range_are_refused_all_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=0, temperature=-1, top_p=0, top_k=-1, stop=("",), logprobs=21, seed=-1)
    told = str(caught.value)
    for name in ("max_tokens is 0, must be >= 1", "temperature is -1", "top_p is 0", "top_k is -1", "stop is ('',)"):
        assert name in told
    with pytest.raises(RequestError, match="temperature is nan"):
        SamplingParams(temperature=float("nan"))
