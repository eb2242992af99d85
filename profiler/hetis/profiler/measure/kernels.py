"""The operators that are timed, as calls over rotating operands. Needs torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from hetis.profiler.measure.device import Call, Device, TimeCalls
from hetis.profiler.measure.grid import matrices
from hetis.profiler.measure.points import Point
from hetis.solver.model import ModelSpec

_BLOCK_ELEMENTS = 4096  # 16 tokens, 128 dimensions, K and V: one KV block of a head group


class Kernels:
    """Timers of the points of one model on one device."""

    def __init__(self, device: Device, model: ModelSpec) -> None:
        self._device = device
        self._model = model
        self._build: dict[str, Callable[[Point], list[Call]]] = {
            "gemm": self._gemm,
            "layer": self._layer,
            "prefill_attention": self._prefill,
            "decode_attention": self._decode,
            "kv_copy": self._kv_copy,
            "transfer": self._copy,
        }

    def timer(self, point: Point) -> TimeCalls:
        """What times ``point``; its operands live as long as it."""
        crosses = point.texts.get("path") in ("h2d", "d2h")
        return self._device.timer(self._build[point.op](point), graph=not crosses)

    def _tensor(self, *shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self._device.torch_device)
        return empty.uniform_(-1.0, 1.0)

    def _gemm(self, point: Point) -> list[Call]:
        m, n, k = (point.columns[name] for name in ("m", "n", "k"))
        x = self._tensor(m, k)
        weights = [view.view(n, k) for view in self._device.pool.views(n * k)]
        return [lambda w=w: functional.linear(x, w) for w in weights]  # type: ignore[misc]

    def _layer(self, point: Point) -> list[Call]:
        """Norms, projections and the feed-forward network of one layer; attention itself is left out."""
        model, tp = self._model, point.columns["tp"]
        shapes = matrices(model, tp)
        x = self._tensor(point.columns["tokens"], model.hidden)
        scale = torch.ones(model.hidden, dtype=torch.bfloat16, device=self._device.torch_device)
        width = model.q_heads // tp * model.head_dim
        sizes = {name: n * k for name, (n, k) in shapes.items() if name != "lm_head"}

        def layer(qkv: torch.Tensor, output: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            heads = functional.linear(functional.rms_norm(x, (model.hidden,), scale), qkv)[:, :width]
            middle = x + functional.linear(heads, output)
            inner = functional.linear(functional.rms_norm(middle, (model.hidden,), scale), up)
            if model.gated_mlp:
                gate, inner = inner.chunk(2, dim=1)
                inner = functional.silu(gate) * inner
            else:
                inner = functional.relu(inner)
            return middle + functional.linear(inner, down)

        calls: list[Call] = []
        for view in self._device.pool.views(sum(sizes.values())):
            parts = view.split(list(sizes.values()))
            qkv, output, up, down = (part.view(shapes[name]) for name, part in zip(sizes, parts, strict=True))
            calls.append(lambda q=qkv, o=output, u=up, d=down: layer(q, o, u, d))  # type: ignore[misc]
        return calls

    def _prefill(self, point: Point) -> list[Call]:
        """Prompts are computed layer by layer, so that what they attend to has just been written: warm operands."""
        batch, tokens, past, heads, groups, width = (point.columns[name] for name in _PREFILL)
        q = self._tensor(batch, heads, tokens, width)
        k, v = (self._tensor(batch, groups, past + tokens, width) for _ in range(2))
        if past == 0:
            return [lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > groups)]
        if self._device.on_cuda:
            mask = causal_lower_right(tokens, past + tokens)
            return [lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads > groups)]
        allowed = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
        return [lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=heads > groups)]

    def _decode(self, point: Point) -> list[Call]:
        """The query heads of a group go in as rows of one head, so that its KV is read once."""
        batch, context, heads, groups, width = (point.columns[name] for name in _DECODE)
        q = self._tensor(batch, groups, heads // groups, width)
        shape = (2, batch, groups, context, width)
        caches = [view.view(shape) for view in self._device.pool.views(2 * batch * groups * context * width)]
        return [lambda kv=kv: functional.scaled_dot_product_attention(q, kv[0], kv[1]) for kv in caches]  # type: ignore[misc]

    def _kv_copy(self, point: Point) -> list[Call]:
        elements = point.columns["num_bytes"] // 2
        row = min(elements, _BLOCK_ELEMENTS)
        out = torch.empty((elements // row, row), dtype=torch.bfloat16, device=self._device.torch_device)
        blocks = self._device.pool.blocks(row)
        generator = torch.Generator().manual_seed(0)
        calls: list[Call] = []
        for _ in range(8):
            chosen = torch.randint(len(blocks), (elements // row,), generator=generator)
            chosen = chosen.to(self._device.torch_device)
            calls.append(lambda chosen=chosen: torch.index_select(blocks, 0, chosen, out=out))  # type: ignore[misc]
        return calls

    def _copy(self, point: Point) -> list[Call]:
        elements, path = point.columns["num_bytes"] // 2, point.texts["path"]
        if path == "d2d":
            views = self._device.pool.views(2 * elements)
            return [lambda v=v: v[:elements].copy_(v[elements:]) for v in views]  # type: ignore[misc]
        on_host = torch.empty(elements, dtype=torch.bfloat16, pin_memory=True)
        on_device = self._tensor(elements)
        if path == "h2d":
            return [lambda: on_device.copy_(on_host, non_blocking=True)]
        return [lambda: on_host.copy_(on_device, non_blocking=True)]


_PREFILL = ("batch", "tokens", "past_tokens", "query_heads", "kv_heads", "head_dim")
_DECODE = ("batch", "context_tokens", "query_heads", "kv_heads", "head_dim")
