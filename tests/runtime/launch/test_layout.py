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
    card_of,
    layout_of,
    one_device,
    pages_of,
    refuse_if_too_large,
)
from hetis.runtime.launch.room import DeviceRoom
from hetis.runtime.model.config import ModelConfig, read_config
from hetis.solver.plan import AttentionWorkerPool, Plan, Role
from tests.runtime.launch.plans import POOL, plan_of, sharing, stage_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(make_checkpoint(tmp_path_factory.mktemp("model")))


def lay_out(plan: Plan, config: ModelConfig, **more: Any) -> tuple[tuple[str, int], ...]:
    layout = layout_of(plan, 0, config, page_tokens=16, **more)
    (stage,) = layout.stages
    return tuple((device.name, device.pages) for device in stage.devices)


def test_the_primary_comes_first_and_workers_share_what_it_does_not_keep(config: ModelConfig) -> None:
    plan = plan_of(stage_of(), pools=(POOL,))
    assert lay_out(plan, config) == (("a/0", 2 * 63), ("b/0", 3 * 63), ("b/1", 3 * 63))
    assert lay_out(plan, config, kv_tokens=100) == (("a/0", 2 * 7), ("b/0", 3 * 7), ("b/1", 3 * 7))
    layout = layout_of(plan, 0, config, page_tokens=16)
    assert (layout.seats, layout.chunk_tokens) == (4, 32)


def test_ranks_and_copies_of_every_stage_have_their_devices(config: ModelConfig) -> None:
    """600 tokens are 38 pages of a head, on two copies 19 each; a rank of two keeps three of its four heads."""
    pool = AttentionWorkerPool(stage=1, gpu="T4", devices=("w/0", "w/1", "w/2", "w/3"), kv_head_groups=1)
    plan = plan_of(
        stage_of(num_layers=1, kv_head_groups_kept=8),
        stage_of(
            first_layer=1, num_layers=3, tp=2, copies=2, devices=("b/0", "b/1", "c/0", "c/1"), kv_head_groups_kept=3
        ),
        pools=(pool,),
        kv_tokens=600,
        in_flight=2,
    )
    layout = layout_of(plan, 0, config, page_tokens=16)
    shown = [(stage.layers, stage.ranks, [(d.name, d.pages) for d in stage.devices]) for stage in layout.stages]
    assert shown == [
        (range(1), 1, [("a/0", 8 * 38)]),
        (range(1, 4), 2, [("b/0", 3 * 19), ("b/1", 3 * 19), ("w/0", 19), ("w/1", 19)]),
        (range(1, 4), 2, [("c/0", 3 * 19), ("c/1", 3 * 19), ("w/2", 19), ("w/3", 19)]),
    ]
    assert layout.attention_workers == ("w/0", "w/1", "w/2", "w/3")
    assert (layout.seats, layout.in_flight) == (8, 2)


def test_a_shared_card_is_a_device_of_every_stage_with_what_its_heads_need(config: ModelConfig) -> None:
    layout = layout_of(sharing(), 0, config, page_tokens=16)
    shown = [[(device.name, device.pages) for device in stage.devices] for stage in layout.stages]
    assert shown == [
        [("a/0", 2 * 63), ("b/0.stage0", 3 * 63), ("b/1.stage0", 3 * 63)],
        [("c/0", 2 * 63), ("b/0.stage1", 3 * 63), ("b/1.stage1", 3 * 63)],
    ]
    assert [card_of(name) for name in layout.attention_workers] == ["b/0", "b/1", "b/0", "b/1"]
    assert card_of("node.stage1/0") == "node.stage1/0"


def test_seats_of_a_prefill_replica_are_left_open(config: ModelConfig) -> None:
    plan = plan_of(stage_of(kv_head_groups_kept=8), role=Role.PREFILL, micro_batch=0, in_flight=16)
    layout = layout_of(plan, 0, config, page_tokens=16)
    assert (layout.seats, layout.in_flight, layout.chunk_tokens) == (0, 16, 32)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(stage_of(kv_head_groups_kept=4)), "the plan places 4 KV heads, the model has 8"),
        (plan_of(stage_of(num_layers=80)), "the plan is of a model with 80 layers, this one has 4"),
        (plan_of(stage_of(tp=3, devices=("a/0", "a/1", "a/2"))), "tensor parallelism of 3 does not divide 16 query"),
        (
            plan_of(stage_of(num_layers=2, kv_head_groups_kept=8), stage_of(num_layers=2, first_layer=2)),
            "stage 1: the plan places 2 KV heads, the model has 8",
        ),
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
    with pytest.raises(LayoutError, match="KV of 4096 MiB is asked for, 1024 MiB of this machine's memory are free"):
        refuse_if_too_large(2**32, free_bytes=2**30)
    refuse_if_too_large(2**32, free_bytes=2**32)


def test_by_default_there_is_room_for_every_seat_or_half_of_what_is_free(config: ModelConfig) -> None:
    shape = kv_shape(config, range(4), page_tokens=16, dtype="float32")

    def pages(**room: int) -> int:
        return one_device(config, shape, **({"seats": 9, "max_tokens": 96, "chunk_tokens": 32} | room)).pages

    assert pages(free_bytes=2**40) == 9 * 8 * 6
    # Of 200 pages prompts take a chunk of 2 for each of 8 heads, and the longest context of 6.
    assert pages(free_bytes=2 * 4096 * 200) == 200 - 8 * (2 + 6)
    # Of 48 the rest after a chunk is shared evenly: no prompt is longer than all KV there is.
    assert pages(free_bytes=2 * 4096 * 48) == (48 - 8 * 2) // 2


def test_prompts_under_way_are_room_that_is_asked_for() -> None:
    refuse_if_too_large(3 * 2**20, prompt_bytes=2**20, free_bytes=2**22)
    with pytest.raises(LayoutError) as caught:
        refuse_if_too_large(3 * 2**20, prompt_bytes=2 * 2**20, free_bytes=2**22)
    assert caught.value.messages == (
        "KV of 3 MiB is asked for, and 2 MiB for prompts under way, 4 MiB of this machine's memory are free",
    )


def test_the_demos_model_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
