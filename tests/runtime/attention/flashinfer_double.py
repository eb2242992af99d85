"""FlashInfer's paged decode as its documentation says it works, in plain torch: what our plans are tested with.

It stands for the library where there is no GPU; tests with the mark ``gpu`` use the library itself.
"""

from __future__ import annotations

from typing import Any

import torch


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, workspace: torch.Tensor, kv_layout: str, *, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
        disable_split_kv: bool,
    ) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8, 16)
        self._ends, self._pages, self._last = indptr.tolist(), indices, last_page_len.tolist()
        self._size, self._window, self._scale = page_size, window_left, sm_scale
        self._shape = (num_qo_heads, num_kv_heads, head_dim)

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q_heads, kv_heads, d = self._shape
        assert q.shape == (len(self._last), q_heads, d)
        out: list[Any] = []
        for i, last in enumerate(self._last):
            assert 1 <= last <= self._size
            pages = self._pages[self._ends[i] : self._ends[i + 1]].long()
            length = (len(pages) - 1) * self._size + last
            first = max(0, length - 1 - self._window) if self._window >= 0 else 0
            k, v = (x[pages].flatten(0, 1)[first:length].repeat_interleave(q_heads // kv_heads, dim=1) for x in cache)
            scores = torch.einsum("hd,thd->ht", q[i].double(), k.double()) * self._scale
            out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v.double()).to(q.dtype))
        return torch.stack(out)
