"""One step on one stage, said in full: tokens, positions, and where every head lives. It can be sent and done again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Part of a prompt: positions ``first`` to ``first + count - 1`` of ``total``.

    Attributes:
        heads: device of each KV head, to which the chunk's KV goes.
    """

    request: int
    incarnation: int
    first: int
    count: int
    total: int
    heads: tuple[int, ...]

    @property
    def is_last(self) -> bool:
        return self.first + self.count == self.total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """T rows: first one for each of B decoding requests, then the chunks one after the other.

    Attributes:
        epoch: of the engine.
        number: rising; a step that is done again may keep its number.
        tokens: ids, shape [T].
        positions: of the tokens in their requests, shape [T].
        requests, incarnations: of the decoding requests, shape [B].
        heads: device of each KV head of the decoding requests, shape [B, H]; the first are the primary's ranks.
        chunks: prompts that are being prefilled.
        outputs: rows whose logits are wanted, shape [O]; rising.
        is_greedy: the likeliest tokens are wanted in place of the logits, int64 [O], which are far fewer bytes.
    """

    epoch: int
    number: int
    tokens: IntArray
    positions: IntArray
    requests: IntArray
    incarnations: IntArray
    heads: IntArray
    chunks: tuple[Chunk, ...]
    outputs: IntArray
    is_greedy: bool = False
