"""Which devices compute on which GPU, told by how many torch finds; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hetis.runtime.kv.memory import free_memory_bytes
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.compute import (
    on_devices,
    refuse_missing,
    refuse_too_large,
    refusing_out_of_memory,
    torch_devices,
)
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import DevicePages, StageLayout, pages_of
from hetis.runtime.launch.room import Compute, DeviceRoom

SHAPE = KvShape(
    layers=2, head_dim=16, queries_per_group=2, page_tokens=16, dtype="float32", scale=0.25, windows=(0, 0)
)  # pages of 4,096 bytes
FOUND = Callable[[int], None]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> FOUND:
    """Says how many GPUs torch finds."""

    def say(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return say


def stage(first: int, ranks: int, *names: str) -> StageLayout:
    devices = tuple(DevicePages(name=name, pages=1) for name in names)
    return StageLayout(layers=range(first, first + 1), ranks=ranks, devices=devices)


STAGES = (stage(0, 2, "a/0", "a/1", "w/0", "w/1"), stage(1, 1, "b/0", "w/2"))


def places(stages: tuple[StageLayout, ...]) -> dict[str, str]:
    return {device.name: device.device for stage in stages for device in stage.devices}


def test_ranks_come_first_then_the_attention_devices_that_are_here(found: FOUND) -> None:
    found(5)
    cuda = places(on_devices(STAGES, Compute.CUDA, workers=("w/0",)))
    assert cuda == {"a/0": "cuda:0", "a/1": "cuda:1", "b/0": "cuda:2", "w/0": "cpu", "w/1": "cuda:3", "w/2": "cuda:4"}


def test_what_stages_have_of_one_card_computes_on_it(found: FOUND) -> None:
    found(3)
    shared = (stage(0, 1, "a/0", "w/0.stage0"), stage(1, 1, "b/0", "w/0.stage1"))
    assert places(on_devices(shared, Compute.CUDA, workers=())) == {
        "a/0": "cuda:0",
        "b/0": "cuda:1",
        "w/0.stage0": "cuda:2",
        "w/0.stage1": "cuda:2",
    }


def test_a_process_with_one_stage_counts_its_own_alone(found: FOUND) -> None:
    found(2)
    placed = on_devices(STAGES, Compute.AUTO, workers=("w/0", "w/1", "w/2"), elsewhere={1: "b/0"})
    assert [stage.primary for stage in placed] == [("cuda:0", "cuda:1"), ("cpu",)]


def test_auto_takes_gpus_only_where_every_device_gets_one(found: FOUND, caplog: pytest.LogCaptureFixture) -> None:
    for count in (0, 5, 6):
        found(count)
        kinds = {place.partition(":")[0] for place in places(on_devices(STAGES, Compute.AUTO, workers=())).values()}
        assert kinds == {"cuda" if count == 6 else "cpu"}
    assert caplog.messages == ["6 CUDA devices are needed, torch finds 5: the CPU computes"]


def test_what_is_not_there_is_refused_with_what_torch_finds(found: FOUND) -> None:
    found(1)
    with pytest.raises(LayoutError, match="2 CUDA devices are needed, one for each device here, torch finds 1"):
        torch_devices(Compute.CUDA, 2)
    assert torch_devices(Compute.CPU, 2) == ["cpu", "cpu"]
    with pytest.raises(LayoutError) as caught:
        refuse_missing(["cpu", "cuda:0", "cuda:1", "cuda:2"])
    assert caught.value.messages == tuple(f"cuda:{n} is not there: torch finds 1 CUDA devices" for n in (1, 2))


def test_what_torch_keeps_unused_counts_as_free_and_kv_beyond_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 2**20, "cuda:1": 2**22}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    assert free_memory_bytes("cuda:0") == 3 * 2**20
    one = DevicePages(name="a", pages=512, device="cuda:0")
    refuse_too_large([(one, SHAPE), (replace(one, device="cuda:1"), SHAPE)])
    with pytest.raises(LayoutError, match="KV of 4 MiB is asked for, 3 MiB of cuda:0's memory are free"):
        refuse_too_large([(one, SHAPE), (replace(one, name="b"), SHAPE)])


def test_devices_without_a_size_share_half_of_what_their_gpu_has_free() -> None:
    free = {"cuda:0": 40 * 4096, "cuda:1": 8 * 4096}
    rooms = [
        DeviceRoom(name="a", kv_bytes=None, device="cuda:0"),
        DeviceRoom(name="b", kv_bytes=None, device="cuda:0"),
        DeviceRoom(name="c", kv_bytes=None, device="cuda:1"),
        DeviceRoom(name="d", kv_bytes=3 * 4096),
    ]
    pages = pages_of(rooms, SHAPE, free_bytes=free.__getitem__)
    assert [(device.pages, device.device) for device in pages] == [
        *((10, "cuda:0"), (10, "cuda:0"), (4, "cuda:1"), (3, "cpu")),
    ]
    with pytest.raises(LayoutError, match="--device c has 4 bytes for KV, one page of this model takes 4096"):
        pages_of(rooms, SHAPE, free_bytes=lambda device: free[device] if device == "cuda:0" else 8)


def test_weights_that_do_not_fit_are_refused_in_torchs_words() -> None:
    wanted = r"weights and KV do not fit: CUDA out of memory\. Tried 2 GiB$"
    with pytest.raises(LayoutError, match=wanted), refusing_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore")
