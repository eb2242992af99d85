"""The coefficients of attention on the devices of one stage, and the times that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, HeadShape, Stage

Piece = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The coefficients of one device for one layer; see `hetis.solver.dispatch.dispatch_problem`."""

    pieces: tuple[Piece, ...]  # seconds per query head, per KV byte read and per call; the largest piece counts
    transfer_byte_s: float = 0.0  # seconds per byte exchanged with the primary
    transfer_s: float = 0.0  # seconds per exchange


def with_coefficients(stage: Stage, known: Mapping[str, Coefficients]) -> Stage:
    """Return ``stage`` with the costs of the ``known`` devices, by name. All others keep theirs."""
    every = [known.get(name) or _coefficients_of(stage, device) for device, name in enumerate(stage.devices)]
    most = max(len(one.pieces) for one in every)
    # A device with fewer pieces repeats one.
    costs = np.array([[*one.pieces, *[one.pieces[0]] * (most - len(one.pieces))] for one in every])
    return replace(
        stage,
        head_s=costs[:, :, 0],
        kv_byte_s=costs[:, :, 1],
        call_s=costs[:, :, 2],
        transfer_byte_s=np.array([one.transfer_byte_s for one in every]),
        transfer_s=np.array([one.transfer_s for one in every]),
    )


def scaled(stage: Stage, scales: FloatArray) -> Stage:
    """Return the stage with every device slower by its factor in ``scales``, shape [D], in attention and exchange."""
    pieces = {name: getattr(stage, name) * scales[:, None] for name in ("head_s", "kv_byte_s", "call_s")}
    exchange = {name: getattr(stage, name) * scales for name in ("transfer_byte_s", "transfer_s")}
    return replace(stage, **pieces, **exchange)


def device_seconds(stage: Stage, heads: FloatArray, kv_bytes: FloatArray) -> FloatArray:
    """Return the seconds per layer of every device for its query heads and the KV bytes they read, all of shape [D].

    A device without heads takes 0. The primary exchanges nothing with itself; if it has several GPUs, its heads and
    bytes are those of one GPU.
    """
    pieces = stage.head_s * heads[:, None] + stage.kv_byte_s * kv_bytes[:, None] + stage.call_s
    away = np.ones(len(heads))
    if stage.primary is not None:
        away[stage.primary.device] = 0.0
    exchange = stage.transfer_byte_s * stage.heads.exchange_bytes_per_head * heads + stage.transfer_s
    seconds: FloatArray = np.where(heads > 0, pieces.max(axis=1) + away * exchange, 0.0)
    return seconds


def _coefficients_of(stage: Stage, device: int) -> Coefficients:
    columns = (column[device].tolist() for column in (stage.head_s, stage.kv_byte_s, stage.call_s))
    return Coefficients(
        pieces=tuple(zip(*columns, strict=True)),
        transfer_byte_s=float(stage.transfer_byte_s[device]),
        transfer_s=float(stage.transfer_s[device]),
    )


def head_shape(*, groups: int, queries: int, head_dim: int, item_bytes: int, block_tokens: int) -> HeadShape:
    """Return the heads of a layer on one rank: ``groups`` of ``queries`` query heads."""
    return HeadShape(
        head_groups=groups,
        queries_per_group=queries,
        kv_bytes_per_token=2 * head_dim * item_bytes,
        # Each query head sends a query and receives an output; its group's key and value are sent once.
        exchange_bytes_per_head=(2 + 2 / queries) * head_dim * item_bytes,
        block_tokens=block_tokens,
    )
