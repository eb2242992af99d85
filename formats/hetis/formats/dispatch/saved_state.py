"""The content of a DispatchState file as a value: a stage as users describe it, and the solver's view of it.

The solver only knows seconds per head and per byte. A file may name a GPU type instead, whose costs come from a
profile; `SavedState.snapshot` takes them as an argument, so that this package needs no profiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hetis.formats import catalogue
from hetis.formats.fields import DocumentPart, Title
from hetis.formats.models import dtypes
from hetis.solver.dispatch.dispatch_problem import FloatArray, HeadShape, Primary, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot
from hetis.solver.errors import InvalidProblemError

MAX_TOKENS = 10**9

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Groups = Annotated[int, Field(ge=0, le=100_000)]
Heads = Annotated[int, Field(ge=1, le=100_000)]
Bytes = Annotated[float, Field(ge=0, le=1e12)]


class HeadsPart(DocumentPart):
    """Attention heads of one layer. ``head_dim`` determines the bytes of MHA and GQA; the two byte counts cover any
    attention.
    """

    groups: Heads
    queries_per_group: Heads
    head_dim: Annotated[int, Field(ge=1, le=100_000)] | None = None
    kv_bytes_per_token: Bytes | None = None
    exchange_bytes_per_head: Bytes | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = (self.kv_bytes_per_token, self.exchange_bytes_per_head)
        if self.head_dim is not None and counts != (None, None):
            raise ValueError("kv_bytes_per_token and exchange_bytes_per_head follow from head_dim: give that alone")
        if self.head_dim is None and None in counts:
            raise ValueError("head_dim is missing, or kv_bytes_per_token with exchange_bytes_per_head")
        return self


class RunningPart(DocumentPart):
    """A running request: context tokens, output tokens still expected, and head groups by device."""

    id: Title
    context_tokens: Tokens
    remaining_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)]
    groups: dict[str, Groups]


def heads_of(model: str | None, inline: HeadsPart | None, kv_dtype: str | None, block_tokens: int) -> HeadShape:
    """Return the heads that a file describes. Raises InvalidProblemError if it does not, or does so twice."""
    if (model is None) == (inline is None):
        raise InvalidProblemError("a stage has the heads of a model, or heads of its own")
    if model is not None:
        spec = catalogue.find_model(model).model
        if what := spec.all_heads_share:
            raise InvalidProblemError(f"heads of {spec.name} cannot move: its layers have {what} that all heads share")
        if kv_dtype is not None:
            spec = replace(spec, kv_bytes=kv_element_bytes(kv_dtype))
        return HeadShape.of_model(spec, block_tokens=block_tokens)
    assert inline is not None
    if inline.head_dim is None and kv_dtype is not None:
        raise InvalidProblemError("kv_dtype cannot be combined with heads.kv_bytes_per_token: both define the bytes")
    kv_bytes, exchange_bytes = inline.kv_bytes_per_token or 0.0, inline.exchange_bytes_per_head or 0.0
    if inline.head_dim is not None:
        kv_bytes = 2 * inline.head_dim * (2.0 if kv_dtype is None else kv_element_bytes(kv_dtype))
        exchange_bytes = (2.0 + 2.0 / inline.queries_per_group) * inline.head_dim * 2.0
    return HeadShape(
        head_groups=inline.groups,
        queries_per_group=inline.queries_per_group,
        kv_bytes_per_token=kv_bytes,
        exchange_bytes_per_head=exchange_bytes,
        block_tokens=block_tokens,
    )


def kv_element_bytes(dtype: str) -> float:
    """Return the bytes per element of the KV cache. Raises ValueError for an unknown format."""
    return dtypes.BYTES_PER_PARAMETER[dtypes.split_dtype(dtype)[1]]


def blocks_in(num_bytes: int, *, heads: HeadShape, num_layers: int, tp: int = 1) -> int:
    """Return the number of KV blocks per layer that ``num_bytes`` of memory hold, on all ``tp`` GPUs together.

    If GPUs outnumber head groups, every group is stored on several of them.
    """
    copies = max(1, tp // heads.head_groups)
    block_bytes = heads.kv_bytes_per_token * heads.block_tokens * num_layers * copies
    return int(num_bytes // block_bytes) if block_bytes > 0 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPiece:
    """One affine piece of decode attention on one GPU: seconds per query head, per KV byte read, and per call."""

    head_s: float = 0.0
    kv_byte_s: float = 0.0
    call_s: float = 0.0


Pieces = tuple[AttentionPiece, ...]


def piece_costs(devices: Sequence[Sequence[Any]]) -> dict[str, FloatArray]:
    """Return the pieces of every device, at least one each, as `Stage` has them: shape [D, pieces], by their fields.

    A device with fewer than the others has its last one several times, which makes no difference.
    """
    most = max(map(len, devices), default=1)
    rows = [[*own, *[own[-1]] * (most - len(own))] for own in devices]
    return {
        name: np.array([[getattr(piece, name) for piece in row] for row in rows])
        for name in ("head_s", "kv_byte_s", "call_s")
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDevice:
    """A device of the stage."""

    name: str  # unique in the stage
    role: Literal["primary", "worker"]  # the primary (a tensor parallel group of ``tp`` GPUs) or an attention worker
    tp: int = 1  # GPUs of the primary; 1 for a worker
    gpu: str | None = None  # type of its GPUs, whose modelled or measured costs are used if ``attention`` is None
    attention: Pieces | None = None  # cost of decode attention on one GPU
    # link_byte_s, link_s: seconds per byte exchanged and per exchange; for the primary, of its network card
    link_byte_s: float = 0.0
    link_s: float = 0.0
    move_byte_s: float | None = None  # seconds per byte of KV moved in or out. None: ``link_byte_s``.
    total_blocks: int  # KV blocks per layer; for the primary, on all its GPUs together
    status: DeviceStatus = DeviceStatus.OK  # whether it takes head groups
    high_water: float = 0.9  # share of the blocks in use above which head groups should leave
    changed: bool = False  # whether it joined, came back, was lost or changed speed since re-dispatch last checked


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """One replica stage and its requests. Heads are those of a catalogue ``model`` or the ``inline`` ones."""

    name: str
    model: str | None = None
    inline: HeadsPart | None = None
    kv_dtype: str | None = None  # None: the model's, or 2 bytes per element
    block_tokens: int = 16
    num_layers: int
    devices: tuple[SavedDevice, ...]
    requests: tuple[RunningPart, ...] = ()
    moves: tuple[PreparedMove, ...] = ()  # moves between positions in ``devices``
    heads: HeadShape = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", heads_of(self.model, self.inline, self.kv_dtype, self.block_tokens))
        self.snapshot({device.name: (AttentionPiece(),) for device in self.devices})  # raises if it is invalid

    @property
    def group_flops_per_token(self) -> float | None:
        """FLOPs of one head group per token attended to, in one layer, or None if only byte counts are known."""
        if self.model is not None:
            model = catalogue.find_model(self.model).model
            return model.decode_attention_flops(1.0, self.heads.queries_per_group)
        if self.inline is not None and self.inline.head_dim is not None:
            return 4.0 * self.inline.head_dim * self.heads.queries_per_group
        return None

    def snapshot(self, costs: Mapping[str, Pieces] | None = None) -> StateSnapshot:
        """Return the snapshot that the solver works on. Raises InvalidProblemError if a device has no costs, or the
        state contradicts itself.

        ``costs`` are pieces by device name, for devices without ``attention`` of their own.
        """
        index = {device.name: i for i, device in enumerate(self.devices)}
        groups = np.zeros((len(self.requests), len(self.devices)), np.int64)
        for j, request in enumerate(self.requests):
            for name, count in request.groups.items():
                groups[j, index[name]] = count
        return StateSnapshot(
            stage=self._stage(costs or {}),
            devices=tuple(
                DeviceSnapshot(
                    name=d.name,
                    total_blocks=d.total_blocks,
                    status=d.status,
                    high_water=d.high_water,
                    changed=d.changed,
                )
                for d in self.devices
            ),
            ids=tuple(request.id for request in self.requests),
            context_tokens=np.array([request.context_tokens for request in self.requests], np.int64),
            remaining_tokens=np.array([request.remaining_tokens for request in self.requests], np.int64),
            groups=groups,
            moves=self.moves,
        )

    def move_byte_s(self) -> FloatArray:
        """Return the seconds per byte of KV moved into or out of each device, shape [D]."""
        return np.array([d.link_byte_s if d.move_byte_s is None else d.move_byte_s for d in self.devices])

    def _stage(self, costs: Mapping[str, Pieces]) -> Stage:
        pieces = [device.attention or costs.get(device.name) or () for device in self.devices]
        for device, own in zip(self.devices, pieces, strict=True):
            if not own:
                raise InvalidProblemError(
                    f"{device.name}: the attention costs of {device.gpu} have to be looked up first"
                )
        links = np.array([(d.link_byte_s, d.link_s) if d.role == "worker" else (0.0, 0.0) for d in self.devices])
        primaries = (
            Primary(device=i, tp=d.tp, nic_byte_s=d.link_byte_s, nic_s=d.link_s)
            for i, d in enumerate(self.devices)
            if d.role == "primary"
        )
        primary = next(primaries, None)
        return Stage(
            heads=self.heads,
            devices=tuple(device.name for device in self.devices),
            **piece_costs(pieces),
            transfer_byte_s=links[:, 0].copy() if len(links) else links,
            transfer_s=links[:, 1].copy() if len(links) else links,
            primary=primary,
        )
