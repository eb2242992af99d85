"""The traffic: the joint distribution of prompt and output lengths, and the averages that the cost model needs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hetis.solver.errors import InvalidProblemError

FloatArray = npt.NDArray[np.float64]

MOST_BURSTINESS = 10.0


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
class RequestClass:
    """Requests whose prompts are longer than those of the class before, and have at most ``max_prompt_tokens``.

    Attributes:
        max_prompt_tokens: None: prompts of any length, in the last class only.
        ttft_limit_s, tpot_limit_s: limits of this class; None: those of the objective.
    """

    name: str
    max_prompt_tokens: int | None = None
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise InvalidProblemError(f"class {self.name}: max_prompt_tokens is {self.max_prompt_tokens}, must be >= 1")
        for name, limit in (("TTFT", self.ttft_limit_s), ("TPOT", self.tpot_limit_s)):
            if limit is not None and not (limit > 0 and math.isfinite(limit)):
                message = f"the {name} limit is {limit:g}, must be above 0 and finite"
                raise InvalidProblemError(f"class {self.name}: {message}")


def misfits_of_classes(classes: Sequence[RequestClass]) -> list[tuple[int, str]]:
    """Return what is wrong with classes of a workload, each problem with the number of its class."""
    found, seen = list[tuple[int, str]](), set[str]()
    for number, one in enumerate(classes):
        before, most = classes[number - 1].max_prompt_tokens if number else 0, one.max_prompt_tokens
        if one.name in seen:
            found.append((number, f"a second class is named {one.name}"))
        seen.add(one.name)
        if number + 1 < len(classes) and most is None:
            found.append((number, "max_prompt_tokens is missing: only the last class has prompts of any length"))
        elif number + 1 == len(classes) and most is not None:
            found.append((number, f"max_prompt_tokens is {most}, the last class must have none: any length is in it"))
        elif most is not None and before is not None and most <= before:
            found.append((number, f"max_prompt_tokens is {most}, must be above {before} of the class before"))
    if len(classes) == 1:
        found.append((0, "is the only class: there must be 2 or more, or none"))
    return found


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Joint distribution of prompt and output lengths.

    Attributes:
        classes: classes by prompt length, the shortest first, that replicas may be limited to; empty: none.
        rate_rps: arrival rate of the source, if it has one.
        clipped_ratio: share of the requests that were shortened to fit.
        prefix_hit_rate: share h of each prompt's tokens whose KV its replica already has, in a prefix cache. At least
            one token is computed all the same, because the first output token is made from it.
        burstiness: coefficient of variation of the gaps between arrivals: 0 evenly spaced, 1 Poisson, above 1 bursts.
    """

    name: str
    bins: tuple[LengthBin, ...]
    rate_rps: float | None = None
    clipped_ratio: float = 0.0
    prefix_hit_rate: float = 0.0
    burstiness: float = 1.0
    classes: tuple[RequestClass, ...] = ()

    def __post_init__(self) -> None:
        if not self.bins:
            raise InvalidProblemError(f"workload {self.name} has no requests")
        for number, wrong in misfits_of_classes(self.classes):
            raise InvalidProblemError(f"class {self.classes[number].name} of {self.name}: {wrong}")
        if not 0 <= self.prefix_hit_rate < 1:
            raise InvalidProblemError(f"prefix_hit_rate of {self.name} is {self.prefix_hit_rate}, must be >= 0 and < 1")
        if not 0 <= self.burstiness <= MOST_BURSTINESS:
            raise InvalidProblemError(
                f"burstiness of {self.name} is {self.burstiness}, must be from 0 to {MOST_BURSTINESS:g}"
            )

    def clipped_to(self, max_position: int) -> Workload:
        """Return the workload as a model with a context of ``max_position`` tokens can serve it.

        Outputs are cut to leave room for one prompt token, then prompts to ``max_position - output``.
        """
        if all(b.output_tokens < max_position and b.prompt_tokens + b.output_tokens <= max_position for b in self.bins):
            return self
        bins, cut, total = [], 0.0, 0.0
        for b in self.bins:
            output = min(b.output_tokens, max_position - 1.0)
            prompt = min(b.prompt_tokens, max_position - output)
            cut += b.weight if (prompt, output) != (b.prompt_tokens, b.output_tokens) else 0.0
            total += b.weight
            bins.append(LengthBin(prompt_tokens=prompt, output_tokens=output, weight=b.weight))
        ratio = 1.0 - (1.0 - self.clipped_ratio) * (1.0 - cut / total)
        return replace(self, bins=tuple(bins), clipped_ratio=ratio)

    def class_of(self, prompt_tokens: float) -> RequestClass:
        """Return the class of a request; the workload has classes."""
        return self.classes[bisect_left(self._bounds, prompt_tokens)]

    @cached_property
    def _bounds(self) -> tuple[float, ...]:
        return tuple(one.max_prompt_tokens or math.inf for one in self.classes)

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """The share of the requests in each class, by name."""
        found = dict.fromkeys((one.name for one in self.classes), 0.0)
        for b in self.bins if self.classes else ():
            found[self.class_of(b.prompt_tokens).name] += b.weight
        total = sum(found.values())
        return {name: weight / total for name, weight in found.items()}

    def of_classes(self, names: Collection[str]) -> Workload:
        """Return the requests of some classes (none named: of all), without classes.

        Raises:
            InvalidProblemError: there is no such class, or it has no requests.
        """
        if unknown := sorted(set(names) - {one.name for one in self.classes}):
            raise InvalidProblemError(f"workload {self.name} has no class {unknown[0]}")
        bins = tuple(b for b in self.bins if not names or self.class_of(b.prompt_tokens).name in names)
        if not bins:
            raise InvalidProblemError(f"class {', '.join(names)} of workload {self.name} has no requests")
        return replace(self, bins=bins, classes=())

    def moments(self, *, block_tokens: int = 16) -> WorkloadMoments:
        """Return the averages that the cost model uses; see `WorkloadMoments`."""
        return moments_of(self.bins, block_tokens=block_tokens, prefix_hit_rate=self.prefix_hit_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadMoments:
    """Averages of a workload. Averages over requests in flight are weighted by how long each request is there.

    A request decodes for a time in proportion to its output O, while its context grows from P to P + O. So among
    *decoding* requests the mean context is ``E[O (P + O/2)] / E[O]`` and its second moment
    ``E[O (P^2 + P O + O^2/3)] / E[O]``. With hits, ``S = min(h P, P - 1)`` tokens of a prompt are in the prefix cache
    and ``Q = P - S`` are computed. A request prefills for a time in proportion to Q, while its context grows from S to
    P. So among *prefilling* requests the mean is ``E[P^2 - S^2] / (2 E[Q])``, and the second moment
    ``E[P^3 - S^3] / (3 E[Q])``.
    """

    mean_prompt: float  # P, tokens
    mean_output: float  # O, tokens
    mean_computed: float  # Q, prompt tokens that no prefix cache has
    prefill_pairs: float  # E[P (P + 1) / 2 - S (S + 1) / 2]: (query, key) pairs of a prompt's computed tokens
    p95_prompt: float  # tokens
    p95_computed: float  # tokens
    resident_context: float  # tokens in KV of a decoding request, rounded up to blocks on average
    resident_context_sd: float  # its standard deviation
    prefilling_context: float  # tokens in KV of a prefilling request
    computed_cv2: float  # squared coefficient of variation of the computed tokens of a prompt
    prefill_context_sd: float  # standard deviation, over computed prompt tokens, of the tokens they attend to


def moments_of(bins: Sequence[LengthBin], *, block_tokens: int, prefix_hit_rate: float = 0.0) -> WorkloadMoments:
    """Compute `WorkloadMoments`; the half-filled last block costs ``(block_tokens - 1) / 2`` tokens on average."""
    p: FloatArray = np.array([b.prompt_tokens for b in bins])
    o: FloatArray = np.array([b.output_tokens for b in bins])
    w: FloatArray = np.array([b.weight for b in bins])
    w = w / w.sum()
    cached: FloatArray = np.minimum(prefix_hit_rate * p, p - 1.0)
    computed = p - cached
    mean_p, mean_o, mean_q = float(w @ p), float(w @ o), float(w @ computed)
    context = float(w @ (o * (p + o / 2))) / mean_o
    second = float(w @ (o * (p * p + p * o + o * o / 3))) / mean_o
    prefilling = float(w @ (p * p - cached * cached)) / (2 * mean_q)
    prefilling_second = float(w @ (p**3 - cached**3)) / (3 * mean_q)
    order = np.argsort(p, kind="stable")
    rank = int(np.searchsorted(np.cumsum(w[order]), 0.95 - 1e-12))
    at_p95 = order[min(rank, len(bins) - 1)]  # computed tokens grow with the prompt: one request is p95 in both
    return WorkloadMoments(
        mean_prompt=mean_p,
        mean_output=mean_o,
        mean_computed=mean_q,
        prefill_pairs=float(w @ (p * (p + 1) - cached * (cached + 1))) / 2,
        p95_prompt=float(p[at_p95]),
        p95_computed=float(computed[at_p95]),
        resident_context=context + (block_tokens - 1) / 2,
        resident_context_sd=math.sqrt(max(0.0, second - context * context)),
        prefilling_context=prefilling,
        computed_cv2=max(0.0, float(w @ (computed * computed)) / mean_q**2 - 1.0),
        prefill_context_sd=math.sqrt(max(0.0, prefilling_second - prefilling**2)),
    )
