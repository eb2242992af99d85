"""The attention heads described in a DispatchState file, and the number of KV blocks that fit in a memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetis.formats import catalogue, dtypes
from hetis.solver.dispatch.problem import HeadShape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineHeads:
    """Attention heads of a model that the catalogue lacks.

    Either ``head_dim`` is given, from which keys, values and exchanged activations follow, or both byte counts are.
    """

    groups: int
    queries_per_group: int
    head_dim: int | None = None
    kv_bytes_per_token: float = 0.0  # of one head group in one layer
    exchange_bytes_per_head: float = 0.0


def heads_of(model: str | None, inline: InlineHeads | None, kv_dtype: str | None, block_tokens: int) -> HeadShape:
    """Return the heads that a file describes.

    Raises:
        InvalidProblemError: neither or both descriptions are given, or a number is out of range.
    """
    if (model is None) == (inline is None):
        raise InvalidProblemError("a stage has the heads of a model, or heads of its own")
    if model is not None:
        spec = catalogue_model(model)
        if spec.linear is not None or spec.indexer is not None:
            what = "states" if spec.linear is not None else "a choice of tokens"
            raise InvalidProblemError(f"heads of {spec.name} cannot move: its layers have {what} that all heads share")
        if kv_dtype is not None:
            spec = replace(spec, kv_bytes=kv_element_bytes(kv_dtype))
        return HeadShape.of_model(spec, block_tokens=block_tokens)
    assert inline is not None
    kv_bytes, exchange_bytes = inline.kv_bytes_per_token, inline.exchange_bytes_per_head
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


def catalogue_model(name: str) -> ModelSpec:
    """Return the model that a file names. Raises `hetis.formats.catalogue.UnknownNameError` if there is none."""
    return catalogue.find_model(name).model


def blocks_in(num_bytes: int, *, heads: HeadShape, num_layers: int, tp: int = 1) -> int:
    """Return the number of KV blocks per layer that ``num_bytes`` of memory hold, on all ``tp`` GPUs together.

    If GPUs outnumber head groups, every group is stored on several of them.
    """
    copies = max(1, tp // heads.head_groups)
    block_bytes = heads.kv_bytes_per_token * heads.block_tokens * num_layers * copies
    return int(num_bytes // block_bytes) if block_bytes > 0 else 0
