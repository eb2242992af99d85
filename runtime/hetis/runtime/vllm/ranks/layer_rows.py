"""A layer's queries, keys and values as those who compute them take them: in one tensor, row by row."""

from __future__ import annotations

import torch

from hetis.runtime.vllm.ranks.head_map import LayerCall, Sorting


class LayerRows:
    """Memory for a layer of T tokens, and views of it. The next layer of a step may take it again.

    Attributes:
        q, k, v: rows computed here, shapes [V, r, d], [V, 1, d] and [V, 1, d].
        own: where their results go, shape [V, r, d]; None: straight to the layer's outputs.
        asked, answers: rows for workers, shape [W, r + 2, d], and where their results go, [W, r, d].
        shape: of the layer's outputs by row, [T G, r, d].
    """

    def __init__(self, call: LayerCall, groups: int, here: int, sorting: Sorting | None, *, is_in_order: bool) -> None:
        """``here`` rows are computed here. They are in order, or by group, or sorted with those of workers."""
        tokens, heads, d = call.out.shape
        width = heads // groups
        self.shape = tokens * groups, width, d
        self._queries = tokens, groups, width * d
        self._sorting, self._by_group = sorting, None
        self.own: torch.Tensor | None = None
        is_by_group = sorting is None and not is_in_order
        joined = call.q.new_empty(*((groups, tokens) if is_by_group else (tokens, groups)), (width + 2) * d)
        self._joined = joined.transpose(0, 1) if is_by_group else joined
        self._all = self._rows = joined.view(tokens * groups, width + 2, d)
        if is_by_group:
            self.own = call.out.new_empty(self.shape)
            self._by_group = self.own.view(groups, tokens, width * d).transpose(0, 1)
        elif sorting is not None:
            count = len(sorting.order)
            self._rows = self._all.new_empty(count, width + 2, d)
            self._results = call.out.new_empty(count + 1, width, d)
            self._results[-1] = 0  # the last row stands for all void rows
            self.own, self.answers, self.asked = self._results[:here], self._results[here:-1], self._rows[here:]
        self.q, self.k, self.v = self._rows[:here, :-2], self._rows[:here, -2:-1], self._rows[:here, -1:]

    def take(self, call: LayerCall) -> None:
        """Copy a layer's queries, keys and values here."""
        torch.cat((call.q.view(self._queries), call.k, call.v), 2, out=self._joined)
        if self._sorting is not None:
            torch.index_select(self._all, 0, self._sorting.order, out=self._rows)

    def give(self, out: torch.Tensor) -> None:
        """Put the results in their places, unless they went there: ``out`` is the layer's outputs as ``shape``."""
        if self._sorting is not None:
            torch.index_select(self._results, 0, self._sorting.places, out=out)
        elif self._by_group is not None:
            out.view(self._queries).copy_(self._by_group)
