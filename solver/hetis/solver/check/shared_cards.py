"""Cards that serve several stages of a replica in turn; ``docs/cost-model.md``, "Prefill and decode replicas".

``positions`` are the stages that one card serves.
"""

from __future__ import annotations

from collections.abc import Iterator

from hetis.solver.check.fleet import ReplicaShape
from hetis.solver.check.memory import kv_tokens_of_a_copy, worker_kv_bytes_per_token
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import worker_seconds


def busy_seconds(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> float:
    """Return the seconds that one request of the replica occupies the card; one of c copies serves every c-th."""
    total = 0.0
    for i in positions:
        stage = shape.stages[i]
        layers = stage.layers + (setting.model.prefix_layers if i == 0 else 0)
        total += layers * worker_seconds(setting, stage, shape.pool_of(i)) / stage.copies
    return setting.iterations * total


def shared_card_bytes(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> float:
    """Return the bytes that the card must hold: its reserve once, and the KV of every stage."""
    kv_bytes = sum(
        per_token * kv_tokens_of_a_copy(setting, shape.stages[i].copies)
        for i, per_token in _bytes_per_token(setting, shape, positions)
    )
    return setting.problem.profiles[shape.pool_of(positions[0]).gpu].reserve_bytes + kv_bytes


def kv_room(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> float:
    """Return the replica's tokens whose KV the card has room for; of x tokens, one of c copies holds x / c."""
    profile = setting.problem.profiles[shape.pool_of(positions[0]).gpu]
    per_token = sum(per_token / shape.stages[i].copies for i, per_token in _bytes_per_token(setting, shape, positions))
    return max(0.0, profile.usable_bytes - profile.reserve_bytes) / per_token


def _bytes_per_token(setting: Setting, shape: ReplicaShape, positions: tuple[int, ...]) -> Iterator[tuple[int, float]]:
    for i in positions:
        yield i, worker_kv_bytes_per_token(setting, shape.stages[i], shape.pool_of(i), is_first=i == 0)
