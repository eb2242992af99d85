"""KV blocks: the number that a stage has room for, and the number in use."""

from __future__ import annotations

from hetis.solver.check.fleet import StageShape
from hetis.solver.check.memory import rank_fixed_bytes, rank_prompt_bytes, rank_state_bytes
from hetis.solver.check.setting import Setting
from hetis.solver.model import ModelSpec
from hetis.solver.problem import PlacementProblem


def rank_room_bytes(setting: Setting, shape: StageShape, *, is_first: bool, is_last: bool) -> float:
    """Return the bytes that a rank has for KV in blocks, after weights, activations and the engine's reserve.

    If a pool has some of the head groups, the rank still keeps those of the current prompts: reserved as planned, as
    are the states that linear attention keeps for requests.
    """
    usable = setting.problem.profiles[shape.gpu].usable_bytes
    taken = rank_fixed_bytes(setting, shape, is_first=is_first, is_last=is_last)
    taken += rank_prompt_bytes(setting, shape, is_first=is_first)
    taken += rank_state_bytes(setting, shape, is_first=is_first, is_last=is_last)
    return max(0.0, usable - taken)


def card_room_bytes(problem: PlacementProblem, gpu: str) -> float:
    """Return the bytes that an attention worker has for KV: all except its engine's reserve."""
    profile = problem.profiles[gpu]
    return float(profile.room_bytes)


def group_blocks(room_bytes: float, model: ModelSpec, *, layers: int, groups: int, block_tokens: int) -> int:
    """Return the KV blocks per layer, of ``groups`` head groups each, that fit in ``room_bytes`` in all ``layers``."""
    block_bytes = layers * groups * block_tokens * model.kv_bytes_per_token_group()
    return int(room_bytes / block_bytes * (1 + 1e-12)) if block_bytes > 0 else 1 << 40


class KvRoom:
    """KV blocks of one copy of a stage; a block holds ``block_tokens`` tokens of one request, in all its head groups.

    ``promised`` blocks are not taken yet: prompts that were admitted will fill them.
    """

    __slots__ = ("promised", "total", "used")

    def __init__(self, total: int) -> None:
        self.total, self.used, self.promised = total, 0, 0

    def admits(self, blocks: int, spare: int) -> bool:
        """Return whether a prompt of this size may start; ``spare`` blocks stay free unless the copy holds nothing."""
        taken = self.used + self.promised
        return taken + blocks + (spare if taken else 0) <= self.total
