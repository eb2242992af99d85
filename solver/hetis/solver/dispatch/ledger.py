"""The arrays behind `hetis.solver.dispatch.state`."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from hetis.solver.dispatch.dispatch_problem import IntArray
from hetis.solver.dispatch.loaded_stage import kernel

Count = TypeVar("Count", int, IntArray)


class Ledger:
    """The arrays behind `DispatchState`: the place of every request's head groups, and the sums per device.

    Requests occupy slots, which are reused after they finish. Groups in a move count as owned at their source and hold
    blocks at both ends. The caller validates; this class only does arithmetic.

    Attributes:
        slots: slot of each request, in order of admission.
        context: context tokens, shape [slots].
        remaining: output tokens still expected, shape [slots].
        groups: head groups owned, shape [slots, D].
        incoming, outgoing: head groups in a move, shape [slots, D].
        held: sum of groups, shape [D].
        tokens: sum of groups times context, shape [D].
        used: blocks in use, shape [D].
        expected: blocks once all requests have produced their expected tokens, shape [D].
    """

    def __init__(self, num_devices: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.slots: dict[str, int] = {}
        self._spare: list[int] = []
        self.context, self.remaining = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.groups = np.zeros((0, num_devices), np.int64)
        self.incoming, self.outgoing = self.groups.copy(), self.groups.copy()
        self.held, self.tokens = np.zeros(num_devices, np.int64), np.zeros(num_devices, np.int64)
        self.used, self.expected = self.held.copy(), self.held.copy()

    def blocks(self, tokens: Count) -> Count:
        """Return the KV blocks per layer of one head group with ``tokens``."""
        return -(-tokens // self.block_tokens)

    def taken(self, slots: IntArray | int) -> IntArray:
        """Return the groups that hold blocks, owned or incoming, shape [slots, D], or [D] for one slot."""
        taken: IntArray = self.groups[slots] + self.incoming[slots]
        return taken

    def add(self, request: str, context: int, remaining: int, groups: IntArray) -> None:
        if not self._spare:
            self._make_slots(max(16, len(self.context)))
        slot = self._spare.pop()
        self.slots[request] = slot
        self.context[slot], self.remaining[slot] = context, remaining
        self.own(slot, groups)

    def remove(self, request: str) -> None:
        """Free the slot of a request without groups in a move."""
        slot = self.slots.pop(request)
        self.own(slot, -self.groups[slot])
        self._spare.append(slot)

    def own(self, slot: int, change: IntArray) -> None:
        """Add groups [D] to those that a request owns, or remove them if negative."""
        self.groups[slot] += change
        self.held += change
        self.tokens += change * self.context[slot]
        self._count_blocks(slot, change)

    def send(self, slot: int, groups: int, source: int, target: int) -> None:
        """Start a move of groups, or undo it if ``groups`` is negative."""
        change = np.zeros(len(self.held), np.int64)
        change[target] = groups
        self.incoming[slot] += change
        self.outgoing[slot, source] += groups
        self._count_blocks(slot, change)

    def lengthen(self, slots: IntArray, tokens: int) -> None:
        """Grow contexts by ``tokens`` and reduce the tokens still expected by as many, down to 0."""
        before, remaining, taken = self.context[slots], self.remaining[slots], self.taken(slots)
        left = np.maximum(0, remaining - tokens)
        self.used += (self.blocks(before + tokens) - self.blocks(before)) @ taken
        self.expected += (self.blocks(before + tokens + left) - self.blocks(before + remaining)) @ taken
        self.tokens += tokens * self.groups[slots].sum(axis=0)
        self.context[slots], self.remaining[slots] = before + tokens, left

    def lengthen_one(self, slot: int, context: int, total: IntArray) -> bool:
        """Lengthen one context to ``context`` as `lengthen` does, unless it is longer already.

        False: a device would use more than its ``total`` blocks, [D]; nothing has changed.
        """
        return _lengthened(
            self.context, self.remaining, self.groups, self.incoming, self.used, self.expected, self.tokens, total,
            slot, context, self.block_tokens,
        )  # fmt: skip

    def expect(self, slot: int, remaining: int) -> None:
        taken = self.taken(slot)
        self.expected -= taken * self.blocks(self.context[slot] + self.remaining[slot])
        self.remaining[slot] = remaining
        self.expected += taken * self.blocks(self.context[slot] + self.remaining[slot])

    def check(self, head_groups: int) -> None:
        """Recount everything; an AssertionError is a bug."""
        slots = np.fromiter(self.slots.values(), np.int64, len(self.slots))
        groups, outgoing, taken = self.groups[slots], self.outgoing[slots], self.taken(slots)
        context, remaining = self.context[slots], self.remaining[slots]
        assert len(set(slots.tolist()) | set(self._spare)) == len(self.context), "a slot is used twice, or forgotten"
        assert len(slots) + len(self._spare) == len(self.context), "a slot is used twice, or forgotten"
        assert np.all(groups.sum(axis=1) == head_groups), "a head group has no owner, or two"
        assert np.all((groups >= outgoing) & (outgoing >= 0) & (taken >= groups)), "more groups leave than are there"
        assert np.array_equal(self.held, groups.sum(axis=0)), "held groups do not add up"
        assert np.array_equal(self.tokens, context @ groups), "tokens do not add up"
        assert np.array_equal(self.used, self.blocks(context) @ taken), "blocks in use do not add up"
        expected = self.blocks(context + remaining) @ taken
        assert np.array_equal(self.expected, expected), "expected blocks do not add up"

    def _count_blocks(self, slot: int, change: IntArray) -> None:
        self.used += change * self.blocks(self.context[slot])
        self.expected += change * self.blocks(self.context[slot] + self.remaining[slot])

    def _make_slots(self, more: int) -> None:
        old = len(self.context)
        for name in ("context", "remaining"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        for name in ("groups", "incoming", "outgoing"):
            setattr(self, name, np.pad(getattr(self, name), ((0, more), (0, 0))))
        self._spare.extend(range(old + more - 1, old - 1, -1))


@kernel
def _lengthened(
    contexts: IntArray, remaining: IntArray, groups: IntArray, incoming: IntArray, used: IntArray, expected: IntArray,
    tokens: IntArray, total: IntArray, slot: int, context: int, block_tokens: int,
) -> bool:  # fmt: skip
    """Do what `Ledger.lengthen_one` does.

    Simulations call it for every block of every request, and numpy takes ten times as long for so few devices.
    """
    before, after = contexts[slot], max(contexts[slot], context)
    left = max(0, remaining[slot] - (after - before))
    more = -(-after // block_tokens) + (-before // block_tokens)
    further = -(-(after + left) // block_tokens) + (-(before + remaining[slot]) // block_tokens)
    for i in range(len(total)):
        if more and used[i] + more * (groups[slot, i] + incoming[slot, i]) > total[i]:
            return False
    for i in range(len(total)):
        taken = groups[slot, i] + incoming[slot, i]
        used[i] += more * taken
        expected[i] += further * taken
        tokens[i] += (after - before) * groups[slot, i]
    contexts[slot], remaining[slot] = after, left
    return True
