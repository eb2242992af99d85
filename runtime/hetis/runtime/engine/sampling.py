"""From logits to tokens, each request by its own parameters and its own random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from hetis.runtime.engine.request import Logprob, SamplingParams


class Sampler:
    """Chooses tokens for one request; draws one random number per token, so that nothing else changes what it draws."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = random.Random(params.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """A token id for logits [vocab]."""
        params = self._params
        if params.temperature == 0:
            return int(logits.argmax())
        ordered, ids = torch.sort(logits.double(), descending=True, stable=True)
        # Their distance to the likeliest: a logit over a tiny temperature would be infinite, and its share no number.
        ordered = (ordered - ordered[0]) / params.temperature
        if params.top_k:
            ordered = ordered[: params.top_k]
        shares = torch.softmax(ordered, dim=-1)
        reached = shares.cumsum(dim=-1)
        if params.top_p < 1:
            # The token that crosses the line is the last that stays.
            kept = int((reached < params.top_p).sum()) + 1
            reached = reached[:kept]
        drawn = self._random.random() * float(reached[-1])
        position = min(int(torch.searchsorted(reached, drawn, right=True)), len(reached) - 1)
        return int(ids[position])


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of logits [rows, vocab], int64 [rows]; of several that tie, the first."""
    # numpy finds it ten times as fast on a CPU; it has no bfloat16, and is slower with float16.
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample(
    logits: torch.Tensor, samplers: Sequence[Sampler], params: Sequence[SamplingParams]
) -> tuple[list[int], list[Logprob | None]]:
    """Tokens and, where wanted, log probabilities for logits [rows, vocab]; row i is of the i-th sampler."""
    tokens = [sampler.choose(row) for sampler, row in zip(samplers, logits, strict=True)]
    logprobs = [
        None if p.logprobs is None else _logprob(row, token, p.logprobs)
        for row, token, p in zip(logits, tokens, params, strict=True)
    ]
    return tokens, logprobs


def _logprob(logits: torch.Tensor, token: int, count: int) -> Logprob:
    logs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logs.topk(count)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return Logprob(chosen=float(logs[token]), likeliest=tuple(pairs))
