"""A rank without vLLM: attention of random steps over its own blocks and two workers, against plain causal attention.

The test is the scheduler: it admits, grows, moves, ends and restarts requests as `SchedulerSide` does.
"""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hetis.runtime.attention.kv import DeviceLostError
from hetis.runtime.vllm.ranks import head_map
from hetis.runtime.vllm.ranks.head_map import LayerCall, attend_directly
from hetis.runtime.vllm.ranks.workers import ConnectedWorkers
from hetis.runtime.vllm.steps import LOCAL, Admitted, GroupMove, MoveStep, StepPlan
from tests.runtime.vllm.paced import FakeClock
from tests.runtime.vllm.ranks.rank_world import (
    DIM,
    GROUPS,
    LAYERS,
    QUERIES,
    SHAPE,
    Running,
    World,
    _run,
    described,
    reference,
)


@settings(max_examples=6)
@given(st.integers(0, 10**6))
def test_every_step_is_plain_attention_while_groups_move(seed: int) -> None:
    _run(seed, steps=25)


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_a_worker_that_dies_in_the_middle_of_a_step_costs_nobody_a_wrong_output(seed: int, dies_at: int) -> None:
    _run(seed, steps=30, dies_at=dies_at)


def test_with_all_groups_here_the_host_learns_of_a_step_afterwards() -> None:
    world = World(3, is_local=True)
    for step in range(25):
        if step % 4 == 0 and len(world.running) < 6:
            world.admit()
        if step % 7 == 6:
            world.end(world.rng.choice(world.running))
        world.step()
        rows = [world.rank.heads.row(one.anchor) for one in world.running]
        world.rank.apply(StepPlan(1000 + step))
        assert world.rank.heads.tokens[rows].tolist() == [one.computed for one in world.running]
    move = GroupMove(1, world.running[0].anchor, (0,), LOCAL, 1)
    world.events.append(MoveStep("begin", move))
    world.open[1] = move
    for _ in range(30):
        world.step()
    assert world.committed == 1


def test_what_another_rank_made_void_is_copied_again() -> None:
    world = World(0)
    world.admit()
    [one] = world.running
    one.devices = [LOCAL] * GROUPS
    world.events = [Admitted(one.anchor, one.number, tuple(one.devices))]
    for _ in range(3):
        world.step()
    move = GroupMove(1, one.anchor, (0,), LOCAL, 1)
    world.events.append(MoveStep("begin", move))
    world.spoils = 1.0
    world.step()
    stored, world.spoils = len(one.q[0]), 0.0
    world.step()  # its copies have reached the void tokens by now
    while one.computed < stored:
        world.step()
    world.open[move.number] = move
    world.commit(move.number)
    world.step()


def relieved(world: World) -> tuple[Running, GroupMove]:
    """Return a request with 30 positions or more, of which one group moves at once, as if the pool were short."""
    world.admit()
    [one] = world.running
    one.devices = [LOCAL] * GROUPS
    world.events = [Admitted(one.anchor, one.number, tuple(one.devices))]
    while one.computed < 30:
        world.step()
    move = GroupMove(1, one.anchor, (0,), LOCAL, 1)
    world.events.append(MoveStep("begin", move))
    world.open[move.number] = move
    world.commit(move.number)
    return one, move


def test_a_move_that_relieves_the_pool_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    world, sizes = World(0), list[int]()
    adopt = world.devices[1].adopt

    def adopting(number: int, stage: int, groups: list[int], first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        sizes.append(k.nbytes + v.nbytes)
        adopt(number, stage, groups, first, k, v)

    monkeypatch.setattr(world.devices[1], "adopt", adopting)
    relieved(world)
    world.step()
    assert len(sizes) > 1
    assert max(sizes) <= 1500
    world.step()


def test_a_request_is_computed_again_where_no_memory_is_left_to_copy_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0)
    one, _ = relieved(world)
    monkeypatch.setattr(world.rank.migrator, "_copy", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    before = world.restarts
    world.step()
    monkeypatch.undo()
    assert world.restarts > before
    assert one.devices[0] == 1
    for _ in range(10):
        world.step()


def test_why_a_worker_does_not_come_back_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    now_s, reasons = 0.0, ["its key is another", "its key is another", "no memory"]
    caplog.set_level(logging.WARNING)

    def join(_: int) -> Any:
        raise DeviceLostError("w1", reasons[0])

    workers = ConnectedWorkers(["w1"], join, epoch=1, clock=lambda: now_s)
    while len(reasons) > 1:
        reasons.pop(0)
        now_s += 2.0
        workers.advance()
        while not workers._came.qsize():
            time.sleep(0.001)
        workers.advance()
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "its key is another" in told[0]
    assert "no memory" in told[1]


def test_a_step_that_nobody_finished_does_not_reach_into_the_next() -> None:
    """vLLM may warm up with steps of unknown requests, without calling the connector between them."""
    world = _run(2, steps=6)
    for count in (5, 2):
        common = SimpleNamespace(
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=1,
            block_table_tensor=torch.zeros(count, 1, dtype=torch.int64),
            query_start_loc=torch.arange(count + 1),
            query_start_loc_cpu=torch.arange(count + 1),
            seq_lens=torch.ones(count, dtype=torch.int64),
            seq_lens_cpu_upper_bound=None,
        )
        q, kv = (torch.randn(count, heads, DIM, dtype=torch.float64) for heads in (GROUPS * QUERIES, GROUPS))
        out = torch.full_like(q, torch.nan)
        metadata = described(world.rank, common)
        impl: Any = world.blocks
        for layer in range(LAYERS):
            named = SimpleNamespace(layer_name=str(layer))
            world.rank.attend(impl, LayerCall(named, q, kv, kv, q, out), metadata)
        assert not out.any(), "of nobody's rows nothing is computed"
    for _ in range(3):
        world.step()


def test_moves_are_committed_and_losses_restart_requests() -> None:
    """Otherwise the tests above would test nothing."""
    assert _run(1, steps=40).committed > 1
    assert _run(1, steps=40, dies_at=15).restarts > 0


def test_workers_hold_nothing_of_requests_that_ended_on_their_way() -> None:
    moving = 0
    for seed in range(4):
        world = _run(seed, steps=8)
        moving += len(world.open)
        for one in world.running[:]:
            world.end(one)
        world.rank.apply(StepPlan(world.plans + 1, tuple(world.events)))
        assert [len(device.pool) for device in world.devices.values()] == [0, 0]
    assert moving > 2, "some were on their way"


@pytest.mark.parametrize("piece_tokens", [4, 256])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_attention_made_up_for_a_lost_worker_is_that_of_a_whole_sequence(
    monkeypatch: pytest.MonkeyPatch, layer: int, piece_tokens: int
) -> None:
    monkeypatch.setattr(head_map, "_PIECE_TOKENS", piece_tokens)
    torch.manual_seed(0)
    q, k, v = torch.randn(11, QUERIES, DIM), torch.randn(11, DIM), torch.randn(11, DIM)
    expected = reference(q.double(), k.double(), v.double(), layer)
    torch.testing.assert_close(attend_directly(q, k, v, SHAPE, layer).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("meanwhile_s", "least_s"), [(0.0, 1.0), (0.7, 1.0), (3.0, 0.0)])
def test_what_a_worker_takes_is_known_only_as_far_as_its_answer_was_waited_for(
    meanwhile_s: float, least_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker takes a second, while the rank does other work for ``meanwhile_s``."""
    clock = FakeClock()
    world = World(0, clock)
    attend, attend_here = world.devices[1].attend, world.blocks.attend_here

    class Away:
        def __init__(self, output: torch.Tensor) -> None:
            self.output, self.there_s = output, clock.now_s + 1.0

        def wait(self) -> torch.Tensor:
            clock.now_s = max(clock.now_s, self.there_s)
            return self.output

    def attend_meanwhile(*arguments: Any) -> None:
        clock.pause(meanwhile_s)
        attend_here(*arguments)

    monkeypatch.setattr(world.devices[1], "attend", lambda layer, qkv: Away(attend(layer, qkv).output))
    monkeypatch.setattr(world.blocks, "attend_here", attend_meanwhile)
    monkeypatch.setattr(world, "hear", lambda: None)
    one = Running(world.free.pop(), 1, [LOCAL, 1, 1])
    world.running.append(one)
    world.events.append(Admitted(one.anchor, one.number, tuple(one.devices)))
    for _ in range(4):
        world.step()
    report = world.rank.take_report()
    assert report.taken[1], "some steps only decode"
    for taken in report.taken[1]:
        assert (taken.least_s, taken.most_s) == pytest.approx((least_s, max(1.0, meanwhile_s)))
        assert taken.heads == 2 * QUERIES


class Operations(TorchDispatchMode):  # type: ignore[misc]
    """Notes torch's operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_later_layers_of_a_local_decode_step_make_no_tensors() -> None:
    """Every operation is time of the host that a GPU may wait for."""
    world, count = World(3, is_local=True), 6
    for _ in range(count):
        world.admit()
    world.rank.apply(StepPlan(1, tuple(world.events)))
    ones, starts = torch.ones(count, dtype=torch.int32), torch.arange(count + 1, dtype=torch.int32)
    common = SimpleNamespace(
        num_reqs=count,
        num_actual_tokens=count,
        max_query_len=1,
        max_seq_len=1,
        block_table_tensor=torch.tensor([[one.anchor] for one in world.running], dtype=torch.int32),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ones,
        seq_lens_cpu_upper_bound=ones,
    )
    metadata = described(world.rank, common)
    q, kv = (torch.randn(count, heads, DIM, dtype=torch.float64) for heads in (GROUPS * QUERIES, GROUPS))
    impl: Any = SimpleNamespace(attend_here=lambda *_: None)
    for layer in range(LAYERS):
        call = LayerCall(SimpleNamespace(layer_name=str(layer)), q, kv, kv, q, torch.empty_like(q))
        with Operations() as seen:
            world.rank.attend(impl, call, metadata)
    assert seen.names == ["aten.view.default", "aten.cat.out", "aten.view.default"]
