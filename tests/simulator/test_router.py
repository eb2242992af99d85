"""The choice of a replica for a request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.replica import ReplicaRun
from hetis.simulator.routers import LeastWork, Weighted


@dataclass(slots=True)
class Replica:
    """A replica as seen by routers. The test sets ``outstanding``, because no request ends here."""

    number: int
    rate: float
    decodes: bool
    outstanding: int = 0


def chosen(router: LeastWork | Weighted, replicas: list[Replica], *, times: int) -> Counter[int]:
    """Return how often each replica is chosen; prefill replicas finish at once, others keep all their requests."""
    counts = Counter[int]()
    for _ in range(times):
        number = router(cast(list[ReplicaRun], replicas)).number
        counts[number] += 1
        replica = next(one for one in replicas if one.number == number)
        replica.outstanding += replica.decodes
    return counts


@pytest.mark.parametrize("router", [LeastWork, Weighted])
@given(rates=st.lists(st.floats(0.5, 50.0), min_size=2, max_size=6), data=st.data())
def test_prefill_replicas_get_their_planned_share_however_soon_they_are_done(
    router: type[LeastWork | Weighted], rates: list[float], data: st.DataObject
) -> None:
    """Requests stay where they decode, so that a prefill replica always has the fewest waiting and running."""
    num_prefill = data.draw(st.integers(1, len(rates) - 1))
    replicas = [Replica(n, rate, decodes=n >= num_prefill) for n, rate in enumerate(rates)]
    counts = chosen(router(seed=0), replicas, times=1000)
    share = sum(rates[:num_prefill]) / sum(rates)
    assert sum(counts[n] for n in range(num_prefill)) == pytest.approx(1000 * share, abs=len(rates) + 1)


def test_among_replicas_of_a_kind_the_least_work_decides() -> None:
    busy, idle = Replica(0, 2.0, decodes=True, outstanding=9), Replica(1, 1.0, decodes=True, outstanding=1)
    assert chosen(LeastWork(seed=0), [busy, idle], times=4) == {1: 3, 0: 1}  # (9 + 1) / 2 is 5, as is (4 + 1) / 1
