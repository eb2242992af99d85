"""What an engine takes of a GPU's memory besides the weights as stored, and KV: numbers of the problem, by rank.

At start, an engine runs its largest batch once, of T tokens and R requests, and gives to KV what is left:

    room = usable - fixed - graph g(R) / K - token T                                        every stage
    room = usable - fixed - graph g(R) / K - max(token T, held T + logit max(b q, 1) + request R)  the last one

T = b q + C are the tokens of an iteration, R the requests that may run (M b; on a prefill replica one for every 64
tokens of its M chunks), K the stages. g(R) is the number of captured graphs: engines capture one for each size 1, 2, 4,
and then multiples of 8 and of 16, up to 512 tokens, piecewise up to twice the requests, whole up to the requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hetis.solver.errors import InvalidProblemError

Scalars = Any  # a number or an array of numbers
PROMPT_TOKENS = 64  # prompts of this length fill the chunks of a prefill replica, as plans assume; shorter ones do not


class RankKind(NamedTuple):
    """A GPU type as one of ``tp`` ranks of a stage, of which ``attention_dp`` copies share their experts."""

    gpu: str
    tp: int
    attention_dp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What one rank takes, in bytes.

    Attributes:
        usable_bytes: what the engine may use of the GPU.
        fixed_bytes: contexts, communicators and workspaces, whatever the batch.
        token_bytes: peak of a forward pass, per token of the largest batch.
        held_bytes: what remains of it, per token, while tokens are sampled on the last stage.
        logit_bytes: per token of an iteration that has logits, on the last stage.
        request_bytes: per request that may run, on the last stage: logits and sampling in the run at start.
        graph_bytes: per captured graph of the whole model.
        layer_bytes: weights of a repeated layer as loaded, beyond those stored: padding.
        free_bytes: what is free where the engine starts and nobody else holds memory; infinity: at least as much as it
            uses, whatever others hold.
        reported_bytes: what tools report of the GPU, of which the engine takes a share; 0: not known.
        reserved_share: share of the memory that others hold by which the engine uses less although it is free.
    """

    usable_bytes: float
    fixed_bytes: float
    token_bytes: float
    held_bytes: float
    logit_bytes: float = 0.0
    request_bytes: float = 0.0
    graph_bytes: float = 0.0
    layer_bytes: float = 0.0
    free_bytes: float = math.inf
    reported_bytes: float = 0.0
    reserved_share: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value >= 0 or (value == math.inf and name != "free_bytes"):
                raise InvalidProblemError(f"{name} of a rank is {value}, must be finite and >= 0")

    def at(self, share: float) -> RankMemory:
        """Return what the engine takes with a larger share of the reported memory."""
        return replace(self, usable_bytes=max(self.usable_bytes, min(share * self.reported_bytes, self.free_bytes)))

    def beside(self, reserved_bytes: float) -> RankMemory:
        """Return what the engine takes of a GPU of which others hold so much."""
        if not reserved_bytes:
            return self
        left = min(self.usable_bytes - self.reserved_share * reserved_bytes, self.free_bytes - reserved_bytes)
        return replace(self, usable_bytes=max(0.0, left))

    def pass_bytes(self, tokens: Scalars, requests: Scalars, stages: Scalars = 1) -> Scalars:
        """Return what graphs, and a forward pass of T tokens, take on each of K stages."""
        return self.graph_bytes * captured_graphs(requests) / stages + self.token_bytes * tokens

    def sampling_bytes(self, tokens: Scalars, with_logits: Scalars, requests: Scalars) -> Scalars:
        """Return by how much the last stage exceeds `pass_bytes` while it samples."""
        logits = self.logit_bytes * np.maximum(with_logits, 1) + self.request_bytes * requests
        return np.maximum(0.0, (self.held_bytes - self.token_bytes) * tokens + logits)


def captured_graphs(requests: Scalars) -> Scalars:
    """Return g(R): graphs of sizes up to twice R, piecewise, and up to R, whole."""
    return _sizes(2.0 * requests) + _sizes(requests)


def _sizes(most: Scalars) -> Scalars:
    return 3.0 + np.minimum(most, 256.0) / 8.0 + np.clip(most - 256.0, 0.0, 256.0) / 16.0


def requests_at_once(micro_batch: int, chunk_tokens: int, micro_batches: int) -> int:
    """Return R of an engine with so many micro-batches in flight; decoding requests, or prompts if none decodes."""
    return micro_batches * (micro_batch or max(1, chunk_tokens // PROMPT_TOKENS))


RankMemories = Mapping[RankKind, RankMemory]
