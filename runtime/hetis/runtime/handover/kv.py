"""KV of a request's positions as every engine of the model reads it, however heads and layers are split there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.engine.request import Request
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.model.config import ModelConfig


def whole_shape(engine: Engine) -> KvShape:
    """Of the KV that goes from engine to engine: all layers, and pages of one position."""
    config, own = engine.config, engine.stages[0].stage.shape
    return KvShape(
        layers=config.layers,
        head_dim=config.head_dim,
        queries_per_group=config.q_heads // config.kv_heads,
        page_tokens=1,
        dtype=own.dtype,
        scale=own.scale,
        windows=config.windows,
    )


def read_kv(engine: Engine, request: Request, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a running request at positions ``first`` to ``last - 1``, each [kv_heads, layers, positions, d].

    Raises:
        DeviceLostError: a device with some of it is gone.
    """
    config = engine.config
    size = (config.kv_heads, config.layers, last - first, config.head_dim)
    dtype = engine.stages[0].stage.shape.torch_dtype
    k, v = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    for part in engine.path(request):
        layers = slice(part.stage.layers.start, part.stage.layers.stop)
        copies = _copies(part, config)
        for device, heads in _by_device(part, request):
            own = [head for head in heads if head % copies == 0]
            if own:
                at = [head // copies for head in own]
                k[at, layers], v[at, layers] = (x.cpu() for x in part.export(device, request, own, first, last))
    return k, v


def write_kv(engine: Engine, request: Request, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Puts K and V, each [kv_heads, layers, positions, d], where the heads of a running request live.

    They are there before the next step; a device that is gone is noted, and lost before that.
    """
    for part in engine.path(request):
        layers = slice(part.stage.layers.start, part.stage.layers.stop)
        copies = _copies(part, engine.config)
        for device, heads in _by_device(part, request):
            at = [head // copies for head in heads]
            part.adopt(device, request, heads, first, k[at, layers], v[at, layers])


def _copies(part: StageHeads, config: ModelConfig) -> int:
    """How many heads of the stage hold the same KV: several where its ranks outnumber the KV heads."""
    return len(part.stage.homes) // config.kv_heads


def _by_device(part: StageHeads, request: Request) -> Iterator[tuple[int, list[int]]]:
    owners = request.heads[part.number]
    for device in sorted(set(owners)):
        yield device, [head for head, owner in enumerate(owners) if owner == device]
