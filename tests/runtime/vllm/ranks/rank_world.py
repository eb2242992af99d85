"""A rank without vLLM, its own blocks and two workers; a test is the scheduler."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hetis.runtime.attention.device import LocalDevice
from hetis.runtime.attention.kv import DeviceLostError, KvShape
from hetis.runtime.vllm.ranks.head_map import LayerCall
from hetis.runtime.vllm.ranks.rank import Rank
from hetis.runtime.vllm.ranks.step_tensors import LocalSequences, StepLimits
from hetis.runtime.vllm.ranks.workers import ConnectedWorkers
from hetis.runtime.vllm.steps import LOCAL, Admitted, Event, Gone, GroupMove, Grown, MoveStep, Rehomed, StepPlan

GROUPS, QUERIES, DIM, LAYERS, BLOCK = 3, 2, 8, 2, 4


SHAPE = KvShape(
    layers=LAYERS,
    head_dim=DIM,
    queries_per_group=QUERIES,
    page_tokens=2,
    dtype="float64",
    scale=0.3,
    windows=(0, 5),
)


class Blocks:
    """The rank's own KV: K and V [layers, blocks, block tokens, d], and the attention of a layer over them."""

    def __init__(self, num_blocks: int) -> None:
        self.kv = torch.zeros(2, LAYERS, num_blocks * BLOCK, DIM, dtype=torch.float64)
        self.layer = 0

    def attend_here(self, call: LayerCall, slots: torch.Tensor, local: LocalSequences) -> None:
        number = int(call.layer.layer_name)
        self.kv[0, number, slots], self.kv[1, number, slots] = call.k[:, 0], call.v[:, 0]
        assert local.starts.tolist() == local.starts_cpu.tolist()
        assert local.lasts.tolist() == local.lasts_cpu.tolist()
        for i in range(len(local)):
            begin, end, last = int(local.starts[i]), int(local.starts[i + 1]), int(local.lasts[i])
            at = _slots(local.tables[i].numpy(), 0, last)
            keys, values = self.kv[0, number, at], self.kv[1, number, at]
            # Rows before the chunk are only attended to, so their queries are zero.
            whole = torch.zeros(last, QUERIES, DIM, dtype=torch.float64)
            whole[last - (end - begin) :] = call.q[begin:end]
            call.out[begin:end] = reference(whole, keys, values, number)[last - (end - begin) :]

    def read(self, blocks: Any, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = _slots(blocks, first, last)
        return self.kv[0][:, at].clone(), self.kv[1][:, at].clone()

    def write(self, blocks: Any, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        at = _slots(blocks, first, first + k.shape[1])
        self.kv[0][:, at], self.kv[1][:, at] = k, v


def _slots(blocks: Any, first: int, last: int) -> torch.Tensor:
    positions = np.arange(first, last)
    return torch.from_numpy(blocks[positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK)


def described(rank: Rank, common: Any) -> Any:
    """Return a step as the layers get it, whose backend takes the sequences as they are."""
    step = rank.begin(common)
    return SimpleNamespace(step=step, base=step.local)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    """Causal attention [tokens, r, d] in float64, computed query by query."""
    out = torch.zeros_like(q)
    for t in range(len(k)):
        first = max(0, t + 1 - SHAPE.windows[layer]) if SHAPE.windows[layer] else 0
        weights = torch.softmax(SHAPE.scale * q[t] @ k[first : t + 1].T, dim=-1)
        out[t] = weights @ v[first : t + 1]
    return out


class Breakable(LocalDevice):
    """A worker that dies on demand."""

    is_dead = False

    def attend(self, layer: int, qkv: torch.Tensor) -> Any:
        if self.is_dead and layer == LAYERS - 1:  # in the middle of a step
            raise DeviceLostError(self.name, "killed")
        return super().attend(layer, qkv)


@dataclass(eq=False)
class Running:
    """A request as the test knows it: the inputs so far determine the expected outputs."""

    anchor: int
    number: int
    devices: list[int]
    tables: list[list[int]] = field(default_factory=lambda: [[] for _ in range(GROUPS)])
    q: list[torch.Tensor] = field(default_factory=list)  # per layer, [tokens, G, r, d]
    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)
    computed: int = 0


class World:
    """A rank with two workers, and the scheduler's part of it."""

    def __init__(self, seed: int, clock: Callable[[], float] = time.perf_counter, *, is_local: bool = False) -> None:
        self.rng, self.is_local = random.Random(seed), is_local
        torch.manual_seed(seed)
        self.blocks = Blocks(400)
        self.devices = {n: Breakable(f"w{n}", SHAPE, 400) for n in (1, 2)}
        self.workers = ConnectedWorkers(["w1", "w2"], lambda number: self.devices[number], epoch=1)
        self.rank = Rank(
            SHAPE,
            {str(layer): layer for layer in range(LAYERS)},
            GROUPS,
            400,
            BLOCK,
            self.workers,
            self.blocks,
            limits=StepLimits(requests=2, tokens=4, blocks=2),
            copy_bytes_per_step=1500,
            clock=clock,
        )
        self.running: list[Running] = []
        self.free = list(range(399, 0, -1))
        self.events: list[Event] = []
        self.plans = self.numbers = self.moves = self.committed = self.restarts = 0
        self.open: dict[int, GroupMove] = {}
        self.spoils = 0.0  # how often another rank voids a request's step without this rank's knowledge

    # --- the scheduler

    def admit(self) -> None:
        self.numbers += 1
        present = () if self.is_local else self.workers.present
        one = Running(self.free.pop(), self.numbers, [self.rng.choice((0, *present)) for _ in range(GROUPS)])
        self.running.append(one)
        self.events.append(Admitted(one.anchor, one.number, tuple(one.devices)))

    def end(self, one: Running) -> None:
        self.running.remove(one)
        self.events.append(Gone(one.anchor))
        self.open = {n: move for n, move in self.open.items() if move.anchor != one.anchor}
        self.free += [one.anchor, *(block for table in one.tables for block in table)]

    def grow(self, one: Running, group: int, tokens: int) -> None:
        needed = -(-tokens // BLOCK) - len(one.tables[group])
        if needed > 0:
            fresh = [self.free.pop() for _ in range(needed)]
            self.events.append(Grown(one.anchor, group, len(one.tables[group]), tuple(fresh)))
            one.tables[group] += fresh

    def begin_move(self) -> None:
        one = self.rng.choice(self.running)
        under_way = {g for move in self.open.values() if move.anchor == one.anchor for g in move.groups}
        source = self.rng.choice(one.devices)
        groups = tuple(g for g, device in enumerate(one.devices) if device == source and g not in under_way)
        target = self.rng.choice([n for n in (0, *self.workers.present) if n != source] or [source])
        if not groups or target == source:
            return
        self.moves += 1
        move = GroupMove(self.moves, one.anchor, groups[: self.rng.randrange(1, len(groups) + 1)], source, target)
        if target == LOCAL:
            for group in move.groups:
                self.grow(one, group, max(one.computed, 1))
        self.open[move.number] = move
        self.events.append(MoveStep("begin", move))

    def commit(self, number: int) -> None:
        move = self.open.pop(number)
        one = next(one for one in self.running if one.anchor == move.anchor)
        for group in move.groups:
            one.devices[group] = move.target
            if move.target == LOCAL:
                self.grow(one, group, one.computed)
        self.events.append(MoveStep("commit", move))
        if move.source == LOCAL:
            self._free(move)

    def _free(self, move: GroupMove) -> None:
        one = next(one for one in self.running if one.anchor == move.anchor)
        for group in move.groups:
            self.free += one.tables[group]
            one.tables[group] = []

    def hear(self) -> None:
        """Process the rank's report after a step."""
        report = self.rank.take_report()
        for number in report.copied & self.open.keys():
            self.commit(number)
            self.committed += 1
        for number in report.failed & self.open.keys():
            move = self.open.pop(number)
            self.events.append(MoveStep("abort", move))
            if move.target == LOCAL:
                self._free(move)
        lost = {device for device, one in report.devices.items() if one.blocks == 0}
        for one in self.running:
            if lost & set(one.devices):
                self.open = {n: move for n, move in self.open.items() if move.anchor != one.anchor}
                one.devices = [LOCAL if device in lost else device for device in one.devices]
                for group in (g for g, device in enumerate(one.devices) if device != LOCAL):
                    self.free += one.tables[group]
                    one.tables[group] = []
                self.events.append(Rehomed(one.anchor, tuple(one.devices)))

    # --- a step

    def step(self) -> None:
        """Compute some tokens of every running request, and compare all outputs that count."""
        batch = self.running[:]
        counts = [self._feed(one) for one in batch]
        for one, count in zip(batch, counts, strict=True):
            for group, device in enumerate(one.devices):
                if device == LOCAL or one.tables[group]:  # here, or on its way here
                    self.grow(one, group, one.computed + count)
        self.plans += 1
        events, self.events = self.events, []
        self.rank.apply(StepPlan(self.plans, tuple(events)))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lasts = [one.computed + count for one, count in zip(batch, counts, strict=True)]
        spoiled = [one for one in batch if one.computed and self.rng.random() < self.spoils]
        common = SimpleNamespace(
            num_reqs=len(batch),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(counts),
            max_seq_len=max(lasts) + 3,  # a bound
            block_table_tensor=torch.tensor([[one.anchor] for one in batch], dtype=torch.int32),
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=torch.tensor(lasts, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lasts, dtype=torch.int32),
        )
        metadata = described(self.rank, common)
        outputs = []
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat(
                    [
                        self._brought(one, name, layer, n, is_spoiled=one in spoiled)
                        for one, n in zip(batch, counts, strict=True)
                    ]
                )
                for name in "qkv"
            )
            out = torch.full((len(q), GROUPS * QUERIES, DIM), torch.nan, dtype=torch.float64)
            impl: Any = self.blocks
            named = SimpleNamespace(layer_name=str(layer))
            self.rank.attend(impl, LayerCall(named, q.flatten(1, 2), k, v, q, out), metadata)
            outputs.append(out)
        self.rank.finish_step()
        void = self.rank.take_void()
        for i, (one, count) in enumerate(zip(batch, counts, strict=True)):
            if one.anchor in void:
                assert one.computed > 0, "a request that has just begun is never void"
                one.computed, self.restarts = 0, self.restarts + 1
                continue
            if one in spoiled:
                one.computed = 0
                continue
            for layer, out in enumerate(outputs):
                here = out[starts[i] : starts[i + 1]].view(count, GROUPS, QUERIES, DIM)
                torch.testing.assert_close(here, self._expected(one, layer, count), rtol=1e-6, atol=1e-6)
            one.computed += count
        self.hear()

    def _feed(self, one: Running) -> int:
        """Return the tokens of this step: those whose computation is void, or new ones."""
        fed = len(one.q[0]) if one.q else 0
        count = fed - one.computed
        if count:
            return self.rng.randrange(1, count + 1)
        count = self.rng.choice((1, 1, 1, self.rng.randrange(1, 9)))
        for layer in range(LAYERS):
            for name, shape in (
                ("q", (count, GROUPS, QUERIES, DIM)),
                ("k", (count, GROUPS, DIM)),
                ("v", (count, GROUPS, DIM)),
            ):
                fresh = torch.randn(shape, dtype=torch.float64)
                kept = getattr(one, name)
                if len(kept) <= layer:
                    kept.append(fresh)
                else:
                    kept[layer] = torch.cat([kept[layer], fresh])
        return count

    def _brought(self, one: Running, name: str, layer: int, count: int, *, is_spoiled: bool) -> torch.Tensor:
        right = getattr(one, name)[layer][one.computed : one.computed + count]
        return torch.randn_like(right) if is_spoiled else right

    def _expected(self, one: Running, layer: int, count: int) -> torch.Tensor:
        last = one.computed + count
        groups = [
            reference(one.q[layer][:last, g], one.k[layer][:last, g], one.v[layer][:last, g], layer)
            for g in range(GROUPS)
        ]
        return torch.stack(groups, dim=1)[one.computed :]


def _run(seed: int, *, steps: int, dies_at: int | None = None) -> World:
    world = World(seed)
    for _ in range(3):
        world.admit()
    for step in range(steps):
        if world.rng.random() < 0.2 and len(world.running) < 6:
            world.admit()
        if world.rng.random() < 0.1 and len(world.running) > 2:
            world.end(world.rng.choice(world.running))
        if world.rng.random() < 0.5:
            world.begin_move()
        if step == dies_at:
            world.devices[1].is_dead = True
        world.step()
    return world
