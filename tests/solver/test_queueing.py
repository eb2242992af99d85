"""The waits of `hetis.solver.queueing`, whose sums are shortened, as they are defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.queueing import LATE, EqualPrefills, EqualReplicas, SharedQueue, Wait, _behind_parts, _p95

TIMES = st.floats(0.0, 50.0)


@given(
    st.lists(st.tuples(TIMES, st.floats(0.0, 1.0)), min_size=1, max_size=9).map(sorted),
    st.floats(0.0, 1.0),
    TIMES | st.just(math.inf),
    st.lists(TIMES | st.floats(-5.0, 0.0) | st.just(math.inf), min_size=1, max_size=9),
)
def test_a_rest_and_the_wait_after_it_is_longer_in_one_pass_as_it_is_for_each_rest(
    parts: list[tuple[float, float]], probability: float, mean_s: float, than_s: list[float]
) -> None:
    rests, shares = (np.array(column) for column in zip(*parts, strict=True))
    wait = Wait(probability=probability, mean_s=mean_s)
    expected = [
        sum(
            share * (1.0 if than < rest else wait.is_longer(than - rest))
            for rest, share in zip(rests, shares, strict=True)
        )
        for than in than_s
    ]
    np.testing.assert_allclose(_behind_parts(wait, rests, shares)(np.array(than_s)), expected, atol=1e-12)


@given(st.lists(st.tuples(TIMES, st.floats(0.01, 1.0)), min_size=1, max_size=5), st.floats(0.01, 9.0))
def test_the_p95_is_the_shortest_time_than_which_few_take_longer(
    steps: list[tuple[float, float]], mean_s: float
) -> None:
    total = sum(share for _, share in steps)
    wait = Wait(probability=0.5, mean_s=mean_s)

    def longer(than_s: float) -> float:  # falls continuously in places, and by steps in others
        return sum(share / total * (1.0 if than_s < at_s else wait.is_longer(than_s - at_s)) for at_s, share in steps)

    found = _p95(longer)
    assert longer(found) <= LATE + 1e-12
    assert found == 0.0 or longer(found * (1.0 - 3e-7)) > LATE * (1.0 - 1e-9)


def test_a_time_of_one_lane_is_late_as_pollaczek_and_khinchine_say() -> None:
    prompts_s, weights = np.array([0.5, 1.5, 4.0]), np.array([0.5, 0.3, 0.2])
    mean_s = float(weights @ prompts_s)
    cv2 = float(weights @ prompts_s**2) / mean_s**2 - 1.0
    prefill = EqualPrefills(
        lanes=1, occupied_s=prompts_s, held=1.0, rate_rps=0.5, alone_s=prompts_s, crowded_s=prompts_s
    )  # fmt: skip
    seats = EqualReplicas(
        count=1, seats=50, beside=0, in_flight=np.array([50.0]), rates=np.array([9.0]), holding_cv2=1.0
    )  # fmt: skip
    late = SharedQueue([seats], [prefill], weights, cv2).late_in_lane(0.4)
    step_s = 0.01
    mean_wait_s = sum(late(step_s * (i + 0.5)) for i in range(20_000)) * step_s
    assert mean_wait_s == pytest.approx(0.4 * float(weights @ prompts_s**2) / 2.0 / (1.0 - 0.4 * mean_s), rel=0.01)
