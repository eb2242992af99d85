"""A plan becomes devices with the KV that it counts on, or every reason why it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.demo_serve.checkpoint import make_checkpoint
from hetis.runtime.engine.stage import kv_shape
from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.layout import (
    DevicePages,
    layout_of,
    one_device,
    pages_of,
    refuse_if_too_large,
)
from hetis.runtime.launch.room import DeviceRoom
from hetis.runtime.model.config import ModelConfig, read_config
from hetis.solver.plan import Plan, Role
from tests.runtime.launch.plans import POOL, plan_of, stage_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(make_checkpoint(tmp_path_factory.mktemp("model")))


def lay_out(plan: Plan, config: ModelConfig, **more: Any) -> tuple[tuple[str, int], ...]:
    layout = layout_of(plan, 0, config, page_tokens=16, **more)
    return tuple((device.name, device.pages) for device in layout.devices)


def test_the_primary_comes_first_and_workers_share_what_it_does_not_keep(config: ModelConfig) -> None:
    plan = plan_of(stage_of(), pools=(POOL,))
    assert lay_out(plan, config) == (("a/0", 2 * 63), ("b/0", 3 * 63), ("b/1", 3 * 63))
    assert lay_out(plan, config, kv_tokens=100) == (("a/0", 2 * 7), ("b/0", 3 * 7), ("b/1", 3 * 7))
    layout = layout_of(plan, 0, config, page_tokens=16)
    assert (layout.seats, layout.chunk_tokens) == (4, 32)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(stage_of(kv_head_groups_kept=4)), "the plan places 4 KV heads, the model has 8"),
        (plan_of(stage_of(num_layers=80)), "the plan is of a model with 80 layers, this one has 4"),
        (plan_of(stage_of(kv_head_groups_kept=8), role=Role.PREFILL), "the replica's role is prefill; this engine"),
        (plan_of(stage_of(tp=2, devices=("a/0", "a/1"))), "stage 0 has tensor parallelism of 2"),
        (plan_of(stage_of(copies=2, devices=("a/0", "a/1"))), "stage 0 has 2 copies"),
        (plan_of(stage_of(), pools=(replace(POOL, shared=True),)), "attention workers are shared between stages"),
        (
            replace(plan_of(stage_of()), inputs={"documents": {"model": {"name": "other", "num_layers": 4}}}),
            "the plan is of another model (other): hidden None, not 128",
        ),
    ],
)
def test_what_a_plan_asks_too_much_of_is_named(config: ModelConfig, plan: Plan, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        lay_out(plan, config)
    assert message in str(caught.value)


def test_there_is_no_replica_beyond_the_last(config: ModelConfig) -> None:
    with pytest.raises(LayoutError, match="there is no replica 1, the plan has 1, counted from 0"):
        layout_of(plan_of(stage_of()), 1, config, page_tokens=16)


def test_memory_becomes_whole_pages_and_too_little_of_it_is_refused(config: ModelConfig) -> None:
    shape = kv_shape(config, range(4), page_tokens=16, dtype="float32")
    assert shape.page_bytes == 4096
    rooms = (DeviceRoom(name="a", kv_bytes=8191), DeviceRoom(name="b", kv_bytes=4096))
    assert [device.pages for device in pages_of(rooms, shape)] == [1, 1]
    with pytest.raises(LayoutError, match="--device c has 4095 bytes for KV, one page of this model takes 4096"):
        pages_of((DeviceRoom(name="c", kv_bytes=4095),), shape)
    many = (DevicePages(name="a", pages=2**20),)
    with pytest.raises(LayoutError, match="KV of 4096 MiB is asked for, 1024 MiB of this machine's memory are free"):
        refuse_if_too_large(many, shape, free_bytes=2**30)
    refuse_if_too_large(many, shape, free_bytes=2**32)


def test_by_default_there_is_room_for_every_seat_or_half_of_what_is_free(config: ModelConfig) -> None:
    shape = kv_shape(config, range(4), page_tokens=16, dtype="float32")
    assert one_device(config, shape, seats=2, max_tokens=100, free_bytes=2**40).pages == 2 * 8 * 7
    assert one_device(config, shape, seats=2, max_tokens=100, free_bytes=4096 * 20).pages == 10


def test_the_demos_model_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
