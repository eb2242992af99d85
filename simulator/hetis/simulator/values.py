"""Inputs and outputs of a simulation, and the record of every request while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hetis.solver.errors import InvalidProblemError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RouterName = Literal["nginx", "sglang", "llm-d", "weighted", "weighted-random", "fewest-requests", "fewest-tokens"]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace. Arrival times never fall from one request to the next.

    ``prefix_tokens`` of the prompt are in the prefix cache of any replica that prefills it, and are not computed.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise InvalidProblemError(
                f"request {self.id} has {self.prompt_tokens}/{self.output_tokens} tokens, "
                "prompt and output must be >= 1"
            )
        if not 0 <= self.prefix_tokens < self.prompt_tokens:
            raise InvalidProblemError(
                f"request {self.id} has {self.prefix_tokens} of {self.prompt_tokens} prompt tokens in the prefix "
                "cache, at least one must be computed"
            )
        if not 0 <= self.arrival_s < math.inf:
            raise InvalidProblemError(f"request {self.id} arrives at {self.arrival_s} s, must be finite and >= 0")


@runtime_checkable
class SaturatingSource(Protocol):
    """Requests that are always waiting: a saturated fleet takes the next one when it has room for it."""

    def next_request(self, now_s: float) -> Request | None:
        """Return the next request, which counts as arriving at ``now_s``; None if there will be no more."""


Requests = Iterable[Request] | SaturatingSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A device that fails, or returns (``joins``), at ``at_s``. ``device`` is ``node/index``."""

    at_s: float
    device: str
    joins: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < math.inf:
            raise InvalidProblemError(f"fault of {self.device} is at {self.at_s} s, must be finite and >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the simulation of a plan."""

    seed: int = 0  # seed of all random choices (ties of the router)
    # ``nginx``: in turn, in proportion to planned rates, except replicas without a free seat, as exports configure it
    # (`routers.Nginx`); ``sglang``: so, too, but to the prefill replicas of pairs in turn; ``llm-d``: by its scorers
    # (`routers.EndpointPicker`); ``weighted`` and ``weighted-random``: in proportion to planned rates, in turn or
    # drawn, regardless of queues; ``fewest-requests`` and ``fewest-tokens``: to the shortest queue as HexGen and
    # Splitwise count it (`fleet.py`), the latter also for decode replicas.
    router: RouterName = "nginx"
    # Whether head groups of new requests are placed by `hetis.solver.dispatch`; False: split as in the plan.
    dispatch: bool = True
    # whether `hetis.solver.redispatch` moves head groups of running requests; needs ``dispatch``
    redispatch: bool = True
    theta: float = 0.5  # deviation of a stage's attention time above which re-dispatch examines it
    faults: tuple[Fault, ...] = ()  # devices that fail and return
    sample_every_s: float | None = None  # spacing of the series per device; None: no series
    horizon_s: float | None = None  # the run ends at this time at the latest; None: when all requests have finished

    def __post_init__(self) -> None:
        for name in ("sample_every_s", "horizon_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidProblemError(f"{name} is {value}, must be finite and > 0")
        if not self.theta >= 0:
            raise InvalidProblemError(f"theta is {self.theta}, must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Samples per device at ``times_s`` [samples], the last one at the end of the run.

    ``kv_used_fraction`` [samples, devices] is the share of each device's KV blocks in use, ``busy_fraction`` the share
    of the time since the previous sample during which it was busy.
    """

    devices: tuple[str, ...]
    times_s: FloatArray
    kv_used_fraction: FloatArray
    busy_fraction: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Results of a run: one entry per request that arrived, in order of arrival; NaN (or -1) if it never happened."""

    id: IntArray  # numbers of the requests, [requests] like all arrays here
    # arrival_s, admitted_s: ``admitted_s`` is when the request's first prefill chunk was first scheduled.
    arrival_s: FloatArray
    admitted_s: FloatArray
    # first_token_s, finished_s: when the request's first and last output token left the last stage. The first token of
    # a prompt that is handed over comes from its decode replica, once the KV has arrived there.
    first_token_s: FloatArray
    finished_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    replica: IntArray  # index in the plan of the replica that decodes the request (or prefills it, until that is known)
    preemptions: IntArray  # evictions for lack of KV blocks or a lost device, each followed by a new prefill
    moved_bytes: FloatArray  # KV bytes of the request's head groups that re-dispatch moved
    iterations: int  # iterations of micro-batches over all replicas, each through the whole pipeline
    num_preemptions: int
    migrations: int  # committed moves of head groups; ``migrated_bytes`` are their bytes
    migrated_bytes: float
    kv_transfers: int  # prompts whose KV was sent from a prefill to a decode replica
    rejected: int  # requests whose KV exceeds the room of every replica, some of them only after they have grown
    series: Series | None  # None without `Settings.sample_every_s`
    end_s: float  # virtual time at which the run ended
    prefilled_tokens: int = 0  # tokens of all chunks, including prefills after an eviction
    # Output tokens; for requests cut off by the end of the run, those up to their last eviction.
    generated_tokens: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.id)


NEVER = math.nan


class RequestLog:
    """Requests by number, in order of arrival; the attributes up to ``moved_bytes`` are those of `Run`.

    Attributes:
        prefix: tokens of the prompt in the prefix cache, from which every prefill starts, also after an eviction.
    """

    __slots__ = (
        "admitted_s", "arrival_s", "filled", "finished_s", "first_token_s", "id", "iterations", "kv_transfers",
        "migrated_bytes", "migrations", "moved_bytes", "num_preemptions", "output", "preemptions", "prefilled",
        "prefix", "produced", "prompt", "rejected", "replica", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.id: list[int] = []
        self.arrival_s: list[float] = []
        self.admitted_s: list[float] = []
        self.first_token_s: list[float] = []
        self.finished_s: list[float] = []
        self.prompt: list[int] = []
        self.output: list[int] = []
        self.replica: list[int] = []
        self.preemptions: list[int] = []
        self.moved_bytes: list[float] = []
        self.produced: list[int] = []  # output tokens so far, as of the last time the request started to decode
        self.target: list[int] = []  # tokens to prefill: the prompt, plus the tokens produced before the last eviction
        self.filled: list[int] = []  # tokens of ``target`` that are prefilled
        self.prefix: list[int] = []
        self.iterations = self.num_preemptions = self.migrations = self.kv_transfers = self.rejected = 0
        self.prefilled = 0
        self.migrated_bytes = 0.0

    def arrive(self, request: Request, now_s: float) -> int:
        """Add a request; return its number."""
        self.id.append(request.id)
        self.arrival_s.append(now_s)
        for times in (self.admitted_s, self.first_token_s, self.finished_s):
            times.append(NEVER)
        self.prompt.append(request.prompt_tokens)
        self.output.append(request.output_tokens)
        self.replica.append(-1)
        self.preemptions.append(0)
        self.moved_bytes.append(0.0)
        self.produced.append(0)
        self.target.append(request.prompt_tokens)
        self.filled.append(0)
        self.prefix.append(request.prefix_tokens)
        return len(self.id) - 1

    def reject(self, request: int) -> None:
        """Reject a request that no replica has room for, even on its own."""
        self.rejected += 1
        self.replica[request] = -1

    def show_first_token(self, request: int, now_s: float) -> None:
        """Record that the user gets the first output token, unless that was before an eviction."""
        if math.isnan(self.first_token_s[request]):
            self.first_token_s[request] = now_s

    def evict(self, request: int) -> None:
        """Record the loss of a request's KV: all its tokens have to be prefilled again."""
        self.target[request] = self.prompt[request] + self.produced[request]
        self.filled[request] = 0
        self.preemptions[request] += 1
        self.num_preemptions += 1

    def begun(self, request: int) -> int:
        """Return how many tokens of a request's target need no more computing: those prefilled or cached."""
        return self.filled[request] or self.prefix[request]

    def run(self, end_s: float, series: Series | None) -> Run:
        """Return everything as a `Run`."""
        return Run(
            id=np.array(self.id, np.int64),
            arrival_s=np.array(self.arrival_s, np.float64),
            admitted_s=np.array(self.admitted_s, np.float64),
            first_token_s=np.array(self.first_token_s, np.float64),
            finished_s=np.array(self.finished_s, np.float64),
            prompt_tokens=np.array(self.prompt, np.int64),
            output_tokens=np.array(self.output, np.int64),
            replica=np.array(self.replica, np.int64),
            preemptions=np.array(self.preemptions, np.int64),
            moved_bytes=np.array(self.moved_bytes, np.float64),
            iterations=self.iterations,
            num_preemptions=self.num_preemptions,
            migrations=self.migrations,
            migrated_bytes=self.migrated_bytes,
            kv_transfers=self.kv_transfers,
            rejected=self.rejected,
            prefilled_tokens=self.prefilled,
            generated_tokens=sum(self.produced),
            series=series,
            end_s=end_s,
        )
