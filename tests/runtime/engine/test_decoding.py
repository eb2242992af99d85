"""Which device is given what of a step, and where its outputs go: every rank's heads, in any order, on any devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, Ready
from hetis.runtime.engine.decoding import Decoding, places_of
from hetis.runtime.engine.step import Step


class Echo:
    """A device that answers a query with itself, and sees that keys and values are those of its virtual sequences."""

    def begin(self, step: DeviceStep) -> None:
        self.step = step

    def attend(self, layer: int, qkv: torch.Tensor) -> Ready:
        names = torch.from_numpy(100 * self.step.requests + self.step.heads)
        assert qkv.is_contiguous()
        assert torch.equal(qkv[:, -2, 0], 10 * names + 8)
        assert torch.equal(qkv[:, -1, 0], 10 * names + 9)
        return Ready(qkv[:, :-2])


def projected(requests: list[int], rank: int, heads: int, r: int, others: int) -> torch.Tensor:
    """What a rank projects: each number names its request and head, and which query it is, or key (8) or value (9)."""
    rows = [
        [
            10 * (100 * request + rank * heads + head) + kind
            for kinds in (range(r), [8], [9])
            for head in range(heads)
            for kind in kinds
        ]
        for request in requests
    ]
    return torch.tensor(rows + [[-1] * len(rows[0])] * others)[:, :, None].repeat(1, 1, 2)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
def test_every_head_is_computed_where_it_lives(
    data: st.DataObject, ranks: int, heads: int, r: int, count: int, others: int
) -> None:
    requests = data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count, unique=True))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=count * ranks * heads, max_size=count * ranks * heads))
    devices = [Echo() for _ in range(4)]
    decoding = decoding_of(
        np.array(requests), np.array(owners).reshape(count, -1), devices.__getitem__, heads, r, ranks
    )
    decoding.begin()
    given = [projected(requests, rank, heads, r, others) for rank in range(ranks)]
    outputs = decoding.attend(0, given)
    for own, out in zip(given, outputs, strict=True):
        assert torch.equal(out.reshape(count, heads * r, 2), own[:count, : heads * r])


def test_a_step_that_only_reads_prompts_asks_no_device() -> None:
    nobody = np.zeros(0, np.int64)
    decoding = decoding_of(nobody, np.zeros((0, 4), np.int64), lambda number: Echo(), 2, 1, 2)
    decoding.begin()
    decoding.finish()
    decoding.abort()


def decoding_of(requests: Any, owners: Any, find: Callable[[int], Echo], heads: int, r: int, ranks: int) -> Decoding:
    count = len(requests)
    step = Step(
        epoch=1,
        number=1,
        tokens=np.zeros(count, np.int64),
        positions=np.zeros(count, np.int64),
        requests=requests,
        incarnations=np.zeros(count, np.int64),
        heads=owners,
        chunks=(),
        outputs=np.arange(count),
    )
    find_device = cast("Callable[[int], AttentionDevice]", find)
    return Decoding(step, find=find_device, places=places_of(heads, r), ranks=["cpu"] * ranks)
