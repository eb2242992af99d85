"""`DispatchState` against a model that keeps one record per head group and recounts everything each time."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.errors import InvalidProblemError
from tests.solver.dispatch_state.stages import stage

GROUPS = 4
BLOCK = 4


@dataclass
class Group:
    """One head group: its device, and the move of which it is part (number, target)."""

    device: int
    move: tuple[int, int] | None = None


@dataclass
class Request:
    context: int
    remaining: int
    groups: list[Group]

    @property
    def blocks(self) -> int:
        return (self.context + BLOCK - 1) // BLOCK


class StateMachine(RuleBasedStateMachine):
    """Every rule applies one change to the state and to the model, and compares the results."""

    @initialize(totals=st.lists(st.integers(0, 24), min_size=3, max_size=3), tp=st.sampled_from([None, 1, 2]))
    def start(self, totals: list[int], tp: int | None) -> None:
        self.tp = tp
        self.totals = totals
        self.state = DispatchState(stage(3, tp=tp), totals)
        self.requests: dict[str, Request] = {}
        self.status = [DeviceStatus.OK] * 3
        self.changed = [False] * 3
        self.named = 0

    # --- the model's counting

    def used(self) -> list[int]:
        used = [0] * len(self.totals)
        for request in self.requests.values():
            for group in request.groups:
                used[group.device] += request.blocks
                if group.move:
                    used[group.move[1]] += request.blocks
        return used

    def groups_of(self, request: Request) -> list[int]:
        return [sum(group.device == i for group in request.groups) for i in range(len(self.totals))]

    def unit(self, device: int) -> int:
        return self.tp if self.tp is not None and device == 0 else 1

    # --- rules

    @rule(data=st.data(), context=st.integers(1, 20), remaining=st.integers(0, 20))
    def admit(self, data: st.DataObject, context: int, remaining: int) -> None:
        devices = [data.draw(st.integers(0, len(self.totals) - 1)) for _ in range(GROUPS)]
        request = Request(context, remaining, [Group(device) for device in sorted(devices)])
        groups = self.groups_of(request)
        name = f"r{self.named}"
        fits = all(
            self.status[i] is DeviceStatus.OK
            and n % self.unit(i) == 0
            and self.used()[i] + n * request.blocks <= self.totals[i]
            for i, n in enumerate(groups)
            if n
        )
        try:
            self.state.admit_one(name, context_tokens=context, remaining_tokens=remaining, groups=np.array(groups))
        except InvalidProblemError:
            assert not fits
            return
        assert fits
        self.named += 1
        self.requests[name] = request

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(1, 6))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.requests)), unique=True))
        stuck = []
        for name in names:
            request = self.requests[name]
            request.context += tokens
            if any(used > total for used, total in zip(self.used(), self.totals, strict=True)):
                request.context -= tokens
                stuck.append(name)
            else:
                request.remaining = max(0, request.remaining - tokens)
        assert self.state.grow(names, tokens) == tuple(stuck)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(0, 9))
    def grow_one(self, data: st.DataObject, tokens: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        request = self.requests[name]
        request.context += tokens
        fits = not any(used > total for used, total in zip(self.used(), self.totals, strict=True))
        if fits:
            request.remaining = max(0, request.remaining - tokens)
        else:
            request.context -= tokens
        assert self.state.grow_one(name, context_tokens=self.state.context_tokens(name) + tokens) is fits

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.state.finish(name)
        del self.requests[name]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), remaining=st.integers(0, 30))
    def expect(self, data: st.DataObject, remaining: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.state.expect(name, remaining)
        self.requests[name].remaining = remaining

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def prepare(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        request = self.requests[name]
        source, target = data.draw(st.permutations(range(len(self.totals))))[:2]
        still = [group for group in request.groups if group.device == source and group.move is None]
        count = data.draw(st.integers(1, 2))
        if len(still) < count or self.status[target] is not DeviceStatus.OK:
            return
        move = self.state.prepare_move(name, groups=count, source=source, target=target)
        fits = self.used()[target] + count * request.blocks <= self.totals[target]
        assert (move is not None) == fits
        if move is not None:
            for group in still[:count]:
                group.move = (move.number, target)

    @precondition(lambda self: self.state.moves)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        move = data.draw(st.sampled_from(self.state.moves))
        self.state.abort_move(move.number)
        for group in self.requests[move.request].groups:
            if group.move and group.move[0] == move.number:
                group.move = None

    @precondition(lambda self: self.state.moves)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        numbers = {m.number for m in data.draw(st.lists(st.sampled_from(self.state.moves), min_size=1, max_size=3))}
        before = copy.deepcopy(self.requests)
        for request in self.requests.values():
            for group in request.groups:
                if group.move and group.move[0] in numbers:
                    group.device, group.move = group.move[1], None
        even = all(self.groups_of(request)[0] % self.unit(0) == 0 for request in self.requests.values())
        try:
            self.state.commit_moves(*numbers)
        except InvalidProblemError:
            assert not even
            self.requests = before
        else:
            assert even

    @rule(device=st.integers(0, 2))
    def lose(self, device: int) -> None:
        hit = [name for name, request in self.requests.items() if any(g.device == device for g in request.groups)]
        evicted = self.state.lose_device(device)
        assert [request.id for request in evicted] == hit
        for request in evicted:
            ours = self.requests.pop(request.id)
            assert (request.context_tokens, request.remaining_tokens) == (ours.context, ours.remaining)
        self.forget_moves_to(device)
        self.set_status(device, DeviceStatus.LOST)

    @rule(device=st.integers(0, 2))
    def drain(self, device: int) -> None:
        if self.status[device] is not DeviceStatus.LOST:
            self.state.drain_device(device)
            self.forget_moves_to(device)
            self.set_status(device, DeviceStatus.DRAINING)

    @rule(device=st.integers(0, 2))
    def restore(self, device: int) -> None:
        self.state.restore_device(device)
        self.set_status(device, DeviceStatus.OK)

    @rule()
    def mark_seen(self) -> None:
        self.state.mark_seen()
        self.changed = [False] * len(self.totals)

    @rule()
    def go_on_from_a_snapshot(self) -> None:
        self.state = DispatchState.of(self.state.snapshot())

    def forget_moves_to(self, device: int) -> None:
        for request in self.requests.values():
            for group in request.groups:
                if group.move and group.move[1] == device:
                    group.move = None

    def set_status(self, device: int, status: DeviceStatus) -> None:
        self.changed[device] |= self.status[device] is not status
        self.status[device] = status

    # --- invariants

    @invariant()
    def counts_agree(self) -> None:
        state, requests = self.state, self.requests
        state.check_invariants()
        assert state.ids == tuple(requests)
        for name, request in requests.items():
            assert state.groups(name).tolist() == self.groups_of(request)
            assert (state.context_tokens(name), state.remaining_tokens(name)) == (request.context, request.remaining)
        free = [total - used for total, used in zip(self.totals, self.used(), strict=True)]
        assert state.free_blocks().tolist() == free
        under_way = {g.move[0] for request in requests.values() for g in request.groups if g.move}
        assert {move.number for move in state.moves} == under_way

    @invariant()
    def load_is_that_of_the_snapshot(self) -> None:
        load, snapshot = self.state.load(), self.state.snapshot()
        again = snapshot.load()
        assert np.array_equal(load.heads, again.heads)
        assert np.array_equal(load.kv_bytes, again.kv_bytes)
        assert np.array_equal(load.free_blocks, again.free_blocks)
        held = [sum(self.groups_of(request)[i] for request in self.requests.values()) for i in range(len(self.totals))]
        assert load.heads.tolist() == [2 * n for n in held]
        assert [device.status for device in snapshot.devices] == self.status
        assert [device.changed for device in snapshot.devices] == self.changed


TestStateMachine = StateMachine.TestCase
TestStateMachine.settings = settings(stateful_step_count=40)
