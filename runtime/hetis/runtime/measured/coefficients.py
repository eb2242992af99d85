"""The cost coefficients of attention on one device, and the solver's stage with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hetis.solver.dispatch.problem import Stage

FloatArray = npt.NDArray[np.float64]
Piece = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The coefficients of one device for one layer; see `hetis.solver.dispatch.problem`.

    Attributes:
        pieces: seconds per query head, per KV byte read and per call; the largest piece counts.
        transfer_byte_s: seconds per byte exchanged with the primary.
        transfer_s: seconds per exchange.
    """

    pieces: tuple[Piece, ...]
    transfer_byte_s: float = 0.0
    transfer_s: float = 0.0


def with_coefficients(stage: Stage, known: Mapping[str, Coefficients]) -> Stage:
    """Return ``stage`` with the costs of the ``known`` devices, by name. All others keep theirs."""
    pieces = [
        known[name].pieces if name in known else tuple(map(tuple, _rows(stage, i)))
        for i, name in enumerate(stage.devices)
    ]
    most = max(map(len, pieces))
    # A device with fewer pieces repeats one.
    costs = np.array([[*own, *[own[0]] * (most - len(own))] for own in pieces])
    transfer = [
        (known[name].transfer_byte_s, known[name].transfer_s)
        if name in known
        else (stage.transfer_byte_s[i], stage.transfer_s[i])
        for i, name in enumerate(stage.devices)
    ]
    return replace(
        stage,
        head_s=costs[:, :, 0],
        kv_byte_s=costs[:, :, 1],
        call_s=costs[:, :, 2],
        transfer_byte_s=np.array([each[0] for each in transfer]),
        transfer_s=np.array([each[1] for each in transfer]),
    )


def scaled(stage: Stage, scales: FloatArray) -> Stage:
    """Return the stage with every device slower by its factor in ``scales``, shape [D], in attention and exchange
    alike.
    """
    return replace(
        stage,
        head_s=stage.head_s * scales[:, None],
        kv_byte_s=stage.kv_byte_s * scales[:, None],
        call_s=stage.call_s * scales[:, None],
        transfer_byte_s=stage.transfer_byte_s * scales,
        transfer_s=stage.transfer_s * scales,
    )


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


def _rows(stage: Stage, device: int) -> list[tuple[float, float, float]]:
    columns = (stage.head_s[device], stage.kv_byte_s[device], stage.call_s[device])
    return [(float(a), float(b), float(c)) for a, b, c in zip(*columns, strict=True)]
