"""The timed operators, as calls over rotating operands. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hetis.profiler.measure.device import Call, Device, Operator, TimeCalls
from hetis.profiler.measure.points import KV_BLOCK_BYTES, MeasuredPoint, matrices
from hetis.solver.model import ModelSpec

PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Kernels:
    """Timers for the points of one model on one device."""

    def __init__(self, device: Device, model: ModelSpec, while_queued: Call = lambda: None) -> None:
        """Initialise with ``while_queued``, which is called occasionally while the device has work queued."""
        self._device = device
        self._model = model
        self._while_queued = while_queued
        self._build: dict[str, Callable[[MeasuredPoint], Operator]] = {
            "gemm": self._gemm,
            "layer": self._layer,
            "prefill_attention": self._prefill,
            "decode_attention": self._decode,
            "kv_copy": self._kv_copy,
            "transfer": self._copy,
        }

    def timer(self, point: MeasuredPoint) -> tuple[TimeCalls, bool]:
        """Return (a timer for ``point``, whether its operands are cold). The operands live as long as the timer."""
        crosses = point.texts.get("path") in ("h2d", "d2h")
        operator = self._build[point.op](point)
        return self._device.timer(operator, graph=not crosses, while_queued=self._while_queued), operator.cold

    def _tensor(self, *shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self._device.torch_device)
        return empty.uniform_(-1.0, 1.0)

    def _gemm(self, point: MeasuredPoint) -> Operator:
        m, n, k = (point.columns[name] for name in ("m", "n", "k"))
        x = self._tensor(m, k)
        views, cold = self._device.pool.views(n * k)
        weights = [view.view(n, k) for view in views]
        return Operator([lambda w=w: functional.linear(x, w) for w in weights], cold)  # type: ignore[misc]

    def _layer(self, point: MeasuredPoint) -> Operator:
        """Build norms, projections and the feed-forward network of one layer, without attention itself."""
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
            if model.mlps[0][0].gated:
                gate, inner = inner.chunk(2, dim=1)
                inner = functional.silu(gate) * inner
            else:
                inner = functional.relu(inner)
            return middle + functional.linear(inner, down)

        calls: list[Call] = []
        views, cold = self._device.pool.views(sum(sizes.values()))
        for view in views:
            parts = view.split(list(sizes.values()))
            qkv, output, up, down = (part.view(shapes[name]) for name, part in zip(sizes, parts, strict=True))
            calls.append(lambda q=qkv, o=output, u=up, d=down: layer(q, o, u, d))  # type: ignore[misc]
        return Operator(calls, cold)

    def _prefill(self, point: MeasuredPoint) -> Operator:
        """Build prefill attention with warm operands: each layer's KV has just been written when it is computed.

        On a GPU cuDNN is left out. torch prefers it on Hopper, where it is twice as fast as what remains, but it cannot
        do tokens after others; a fit over both kernels would describe neither.
        """
        batch, tokens, past, heads, groups, width = (point.columns[name] for name in _PREFILL)
        q = self._tensor(batch, heads, tokens, width)
        k, v = (self._tensor(batch, groups, past + tokens, width) for _ in range(2))
        if past == 0:
            masked: dict[str, Any] = {"is_causal": True}
        elif self._device.on_cuda:
            from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler: a second or two

            masked = {"attn_mask": causal_lower_right(tokens, past + tokens)}
        else:
            masked = {"attn_mask": torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)}

        def attend() -> torch.Tensor:
            with sdpa_kernel(PREFILL_BACKENDS) if self._device.on_cuda else nullcontext():
                return functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads > groups, **masked)

        return Operator([attend])

    def _decode(self, point: MeasuredPoint) -> Operator:
        """Build decode attention, with a group's query heads as rows of one head, so that its KV is read once."""
        batch, context, heads, groups, width = (point.columns[name] for name in _DECODE)
        q = self._tensor(batch, groups, heads // groups, width)
        shape = (2, batch, groups, context, width)
        views, cold = self._device.pool.views(2 * batch * groups * context * width)
        caches = [view.view(shape) for view in views]
        attention = functional.scaled_dot_product_attention
        return Operator([lambda kv=kv: attention(q, kv[0], kv[1]) for kv in caches], cold)  # type: ignore[misc]

    def _kv_copy(self, point: MeasuredPoint) -> Operator:
        """Build copies of scattered blocks. No block is read again before the whole rotation has been."""
        cache, row = self._device.pool.cache, KV_BLOCK_BYTES // 2
        count = point.columns["num_bytes"] // KV_BLOCK_BYTES
        num_bytes = count * KV_BLOCK_BYTES
        sets = cache.sets(num_bytes)
        blocks = self._device.pool.rows(count * sets, row)
        out = torch.empty((count, row), dtype=torch.bfloat16, device=self._device.torch_device)
        order = torch.randperm(count * sets, generator=torch.Generator().manual_seed(0)).to(self._device.torch_device)
        select = torch.index_select
        calls: list[Call] = [lambda chosen=chosen: select(blocks, 0, chosen, out=out) for chosen in order.split(count)]  # type: ignore[misc]
        return Operator(calls, cache.is_evicted(sets, num_bytes))

    def _copy(self, point: MeasuredPoint) -> Operator:
        elements, path = point.columns["num_bytes"] // 2, point.texts["path"]
        if path == "d2d":
            views, cold = self._device.pool.views(2 * elements)
            return Operator([lambda v=v: v[:elements].copy_(v[elements:]) for v in views], cold)  # type: ignore[misc]
        on_host = torch.empty(elements, dtype=torch.bfloat16, pin_memory=True)
        on_device = self._tensor(elements)
        if path == "h2d":
            return Operator([lambda: on_device.copy_(on_host, non_blocking=True)])
        return Operator([lambda: on_host.copy_(on_device, non_blocking=True)])


_PREFILL = ("batch", "tokens", "past_tokens", "query_heads", "kv_heads", "head_dim")
_DECODE = ("batch", "context_tokens", "query_heads", "kv_heads", "head_dim")
