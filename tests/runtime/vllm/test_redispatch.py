"""vLLM's own re-dispatch: heads move where that pays, and come to rest although measured costs waver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetis.runtime.vllm.allocator import HeadAllocator
from hetis.runtime.vllm.calibration import scaled
from hetis.runtime.vllm.redispatch import CALM_STEPS, MOST_RETURNS, Redispatch
from hetis.runtime.vllm.settings import EngineRedispatchSettings
from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage

COSTS = Stage(
    heads=HeadShape(head_groups=4, queries_per_group=2, kv_bytes_per_token=64.0, exchange_bytes_per_head=96.0),
    devices=("here", "w0"),
    head_s=np.full((2, 1), 1e-6),
    kv_byte_s=np.full((2, 1), 1e-9),
    call_s=np.full((2, 1), 1e-6),
    transfer_byte_s=np.array([0.0, 1e-12]),
    transfer_s=np.zeros(2),
    primary=Primary(device=0),
)


class Engine:
    """One request of four groups, whose moves are made at once."""

    def __init__(self, *, output_tokens: int = 100_000) -> None:
        self.allocator = HeadAllocator(COSTS, free_here=lambda: 10_000, output_tokens=output_tokens)
        self.allocator.set_blocks(1, 10_000)
        self.name = ""
        self.chat(output_tokens)
        self.moved_at = list[int]()
        self.step = 0
        self.redispatch = Redispatch(
            self.allocator,
            self.move,
            EngineRedispatchSettings(every_steps=1),
            num_layers=4,
            link_byte_s=lambda: np.full(2, 1e-9),
        )

    def chat(self, tokens: int) -> None:
        """Start a request in place of the last."""
        self.allocator.released(self.name)
        self.name += "a"
        self.allocator.place(self.name, tokens=1000, most_output=tokens, has_hits=True)
        self.allocator.admitted(self.name, 7)

    def move(self, request: str, groups: Sequence[int], target: int) -> int | None:
        move = self.allocator.prepare(request, groups, target)
        if move is None:
            return None
        self.allocator.commit(move.number)
        self.moved_at.append(self.step)
        return move.number

    def run(self, steps: int, *, wavers: bool) -> None:
        """Make steps. If costs waver, the device with most heads turns out to be the slower one every time."""
        for _ in range(steps):
            self.step += 1
            if wavers:
                slow = 0 if self.allocator.devices(self.name).count(0) >= 2 else 1
                self.allocator.change_costs(scaled(COSTS, np.array([8.0, 1.0] if slow == 0 else [1.0, 8.0])))
            self.redispatch.advance()


def test_heads_move_where_that_pays() -> None:
    engine = Engine()
    engine.run(5, wavers=False)
    assert set(engine.allocator.devices(engine.name)) == {0, 1}


def test_heads_come_to_rest_although_costs_waver() -> None:
    engine = Engine()
    engine.run(400, wavers=True)
    assert engine.moved_at, "nothing moved at all"
    first, last = (sum(begin < at <= begin + 100 for at in engine.moved_at) for begin in (0, 300))
    assert last < first / 4, engine.moved_at


def test_heads_that_came_back_in_chats_stay_in_later_ones_until_long_after() -> None:
    """Every chat begins with all heads here, and the device that has most is the slower one every time."""
    engine, moves = Engine(output_tokens=360), list[int]()
    for _ in range(12):
        before = len(engine.moved_at)
        engine.run(100, wavers=True)
        moves.append(len(engine.moved_at) - before)
        engine.chat(360)
    assert moves[0] > 1, "heads went and came back"
    assert sum(moves[6:]) < sum(moves[:6]) / 2, moves
    returns = engine.redispatch._returns
    for calm in range(1, MOST_RETURNS + 1):
        returns.forget(engine.step + calm * CALM_STEPS)
    assert not returns._counts
