"""The planner's history of KV in use."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.service.observability.overview import NUM_SAMPLES, KvHistories, KvHistory

SAMPLES = st.lists(
    st.dictionaries(st.sampled_from([f"n-{i}/0" for i in range(12)]), st.floats(0, 1, width=16)), max_size=25
)


@given(samples=SAMPLES, most=st.integers(1, 14))
def test_records_are_what_was_said_and_the_fullest_of_it(samples: list[dict[str, float]], most: int) -> None:
    history = KvHistory()
    for number, sample in enumerate(samples):
        history.add(float(number), sample.items())
    said = sorted({device for sample in samples for device in sample})
    found = history.records(most)
    assert history.num_devices == len(said)
    assert len(found) == min(most, len(said))
    begin = next((number for number, sample in enumerate(samples) if sample), 0)
    for record in found:
        wanted = [sample.get(record.device, math.nan) for sample in samples[begin:]]
        np.testing.assert_array_equal(record.shares, np.array(wanted, dtype=np.float32))
        assert list(record.times_s) == [float(number) for number in range(begin, len(samples))]
        assert record.peak == max(share for share in wanted if not math.isnan(share))
    assert history.now() == (samples[-1] if samples else {})
    left = set(said) - {record.device for record in found}
    if samples and left:
        fullness = lambda device: samples[-1].get(device, -1.0)  # noqa: E731
        assert max(map(fullness, left)) <= min(fullness(record.device) for record in found)


def test_the_oldest_samples_go_and_names_are_counted_as_people_do() -> None:
    history = KvHistory()
    for step in range(NUM_SAMPLES + 7):
        history.add(float(step), [("p-10/0", 0.25), ("p-9/0", 0.5)])
    assert [record.device for record in history.records(5)] == ["p-9/0", "p-10/0"]
    assert history.records(1)[0].times_s[0] == 7.0
    assert len(history.records(1)[0].shares) == NUM_SAMPLES


def test_histories_follow_the_clusters_and_outlive_what_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    clusters, sleeps = ["clusters/a", "clusters/b"], list[float]()

    def in_use(cluster: str) -> Iterator[tuple[str, float]]:
        if len(sleeps) == 1:
            raise OSError("the fleet is gone")
        yield from ((f"{cluster[-1]}{i}/0", 0.5) for i in range(1_200))

    async def sleep(seconds: float) -> None:
        if not seconds:
            return
        sleeps.append(seconds)
        if len(sleeps) == 2:
            del clusters[0]
        if len(sleeps) == 3:
            raise asyncio.CancelledError

    histories = KvHistories(lambda: clusters, in_use, clock=lambda: 7.0, sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(histories.run())
    assert "the KV in use could not be read" in caplog.text
    assert histories.of("clusters/a").num_devices == 0
    assert histories.of("clusters/b").num_devices == 1_200
    assert len(histories.of("clusters/b").records(1)[0].times_s) == 2
