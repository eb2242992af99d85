"""The traffic: the joint distribution of prompt and output lengths, and the averages that the cost model needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetis.solver.errors import InvalidProblemError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """A share of the requests with (nearly) these lengths, which need not be whole in a histogram."""

    prompt_tokens: float
    output_tokens: float
    weight: float

    def __post_init__(self) -> None:
        if not (self.prompt_tokens >= 1 and self.output_tokens >= 1):
            raise InvalidProblemError(
                f"lengths are {self.prompt_tokens}/{self.output_tokens} tokens, prompt and output must be >= 1"
            )
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InvalidProblemError(
                f"weight of {self.prompt_tokens}/{self.output_tokens} is {self.weight}, must be > 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Joint distribution of prompt and output lengths; ``clipped_ratio`` of the requests were shortened to fit."""

    name: str
    bins: tuple[LengthBin, ...]
    rate_rps: float | None = None  # arrival rate of the source, if it has one
    clipped_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not self.bins:
            raise InvalidProblemError(f"workload {self.name} has no requests")

    def clipped_to(self, max_position: int) -> Workload:
        """Return the workload as a model with a context of ``max_position`` tokens can serve it.

        Outputs are cut to leave room for one prompt token, then prompts to ``max_position - output``.
        """
        bins, cut, total = [], 0.0, 0.0
        for b in self.bins:
            output = min(b.output_tokens, max_position - 1.0)
            prompt = min(b.prompt_tokens, max_position - output)
            cut += b.weight if (prompt, output) != (b.prompt_tokens, b.output_tokens) else 0.0
            total += b.weight
            bins.append(LengthBin(prompt_tokens=prompt, output_tokens=output, weight=b.weight))
        ratio = 1.0 - (1.0 - self.clipped_ratio) * (1.0 - cut / total)
        return Workload(name=self.name, bins=tuple(bins), rate_rps=self.rate_rps, clipped_ratio=ratio)

    def moments(self, *, block_tokens: int = 16) -> WorkloadMoments:
        """Return the averages that the cost model uses; see `WorkloadMoments`."""
        return moments_of(self.bins, block_tokens=block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadMoments:
    """Averages of a workload. Averages over requests in flight are weighted by how long each request is there.

    A request decodes for a time in proportion to its output O, while its context grows from P to P + O. So among
    *decoding* requests the mean context is ``E[O (P + O/2)] / E[O]`` and its second moment
    ``E[O (P^2 + P O + O^2/3)] / E[O]``. A request prefills for a time in proportion to P, holding P/2 on average, so
    among *prefilling* requests the mean is ``E[P^2] / (2 E[P])``, and the second moment ``E[P^3] / (3 E[P])``.
    """

    mean_prompt: float  # P, tokens
    mean_output: float  # O, tokens
    prefill_pairs: float  # E[P (P + 1) / 2]: (query, key) pairs of a whole prefill
    p95_prompt: float  # tokens
    resident_context: float  # tokens in KV of a decoding request, rounded up to blocks on average
    resident_context_sd: float  # its standard deviation
    prefilling_context: float  # tokens in KV of a prefilling request
    prompt_cv2: float  # squared coefficient of variation of the prompt length
    prefill_context_sd: float  # standard deviation, over prompt tokens, of the tokens they attend to


def moments_of(bins: Sequence[LengthBin], *, block_tokens: int) -> WorkloadMoments:
    """Compute `WorkloadMoments`; the half-filled last block costs ``(block_tokens - 1) / 2`` tokens on average."""
    p: FloatArray = np.array([b.prompt_tokens for b in bins])
    o: FloatArray = np.array([b.output_tokens for b in bins])
    w: FloatArray = np.array([b.weight for b in bins])
    w = w / w.sum()
    mean_p, mean_o = float(w @ p), float(w @ o)
    context = float(w @ (o * (p + o / 2))) / mean_o
    second = float(w @ (o * (p * p + p * o + o * o / 3))) / mean_o
    squared_p = float(w @ (p * p))
    prefilling = squared_p / (2 * mean_p)
    order = np.argsort(p, kind="stable")
    rank = int(np.searchsorted(np.cumsum(w[order]), 0.95 - 1e-12))
    return WorkloadMoments(
        mean_prompt=mean_p,
        mean_output=mean_o,
        prefill_pairs=float(w @ (p * (p + 1))) / 2,
        p95_prompt=float(p[order][min(rank, len(bins) - 1)]),
        resident_context=context + (block_tokens - 1) / 2,
        resident_context_sd=math.sqrt(max(0.0, second - context * context)),
        prefilling_context=prefilling,
        prompt_cv2=max(0.0, squared_p / mean_p**2 - 1.0),
        prefill_context_sd=math.sqrt(max(0.0, float(w @ p**3) / (3 * mean_p) - prefilling**2)),
    )
