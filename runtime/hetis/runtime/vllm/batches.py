"""A step of one rank: which rows are computed where, and what vLLM provides for those computed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hetis.runtime.attention.device import Pending
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.vllm.head_map import StepRequests, VirtualBatch


class BaseBuilder(Protocol):
    """Describes virtual sequences to vLLM's own backend."""

    def build_base(self, part: VirtualBatch, tables: torch.Tensor, slots: torch.Tensor, common: Any) -> Any:
        """Return the metadata of ``part``, whose block tables are [N, width]; ``common`` is vLLM's of the step."""


class StepDescription(Protocol):
    """A step as vLLM describes it."""

    @property
    def common(self) -> Any:
        """vLLM's `CommonAttentionMetadata`."""

    @property
    def builder(self) -> BaseBuilder:
        """Describes the part of the step that is computed here."""


class LocalAttention(Protocol):
    """vLLM's own backend, for one layer."""

    def attend_here(
        self,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        metadata: Any,
        out: torch.Tensor,
    ) -> None:
        """Store k and v [V, 1, d] and attend with q [V, r, d], into out [V, r, d]."""


@dataclass(slots=True)
class LayerTimes:
    """The total time that layers of a step took on one device, between ``least_s`` and ``most_s`` seconds."""

    count: int = 0
    least_s: float = 0.0
    most_s: float = 0.0

    def add(self, least_s: float, most_s: float) -> None:
        self.count += 1
        self.least_s += least_s
        self.most_s += most_s


@dataclass(slots=True, kw_only=True, eq=False)
class Remote:
    """One worker's part of a step: rows ``begin`` to ``end - 1`` of those sorted by device."""

    device: int
    part: VirtualBatch
    begin: int
    end: int
    pending: Pending | None = None
    requested_s: float = 0.0
    sent_s: float = 0.0
    layers: LayerTimes = field(default_factory=LayerTimes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sorting:
    """The order of rows by device."""

    order: torch.Tensor  # rows of ``query.view(T G, r, d)``: those computed here first, then those of each worker
    # Position in ``order`` of each row of ``query.view(T G, r, d)``; its length if the row is void
    places: torch.Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """A step as this rank computes it."""

    common: Any  # vLLM's description, the same for all layers of the step
    requests: StepRequests
    num_tokens: int
    local: VirtualBatch
    tables: torch.Tensor
    slots: torch.Tensor
    remotes: list[Remote]
    sorting: Sorting | None  # None if all rows are computed here
    base: dict[int, Any] = field(default_factory=dict)  # metadata of vLLM's backend, by builder
    layers: LayerTimes = field(default_factory=LayerTimes)  # times of the layers computed here


# Queries at a time: all of a prompt's would need memory that grows with the square of its length.
_PIECE_TOKENS = 256


def attend_directly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: KvShape, layer: int) -> torch.Tensor:
    """Return causal attention of a whole sequence, computed in float32.

    Args:
        q: queries of one head group, shape [tokens, r, d].
        k, v: its keys and values, shape [tokens, d].
        shape: has the scale, the soft cap, and the window of ``layer``.

    Returns:
        Outputs, shape [tokens, r, d], float32.
    """
    outputs = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32, device=q.device)
    at = torch.arange(len(k), device=q.device)
    for begin in range(0, len(k), _PIECE_TOKENS):
        end = min(begin + _PIECE_TOKENS, len(k))
        scores = torch.einsum("trd,sd->rts", q[begin:end].float(), k[:end].float()) * shape.scale
        if shape.soft_cap:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        distance = at[begin:end, None] - at[None, :end]
        seen = distance >= 0
        if window := shape.windows[layer]:
            seen &= distance < window
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        outputs[begin:end] = torch.einsum("rts,sd->trd", weights, v[:end].float())
    return outputs
