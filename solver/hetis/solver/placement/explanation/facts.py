"""What an explanation of a plan says, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBar:
    """The use of the memory of one GPU of a stage (or pool), in bytes; ``free_bytes`` is what is left of usable."""

    replica: int
    stage: int
    role: str  # "primary" or "attention worker"
    gpu: str
    num_devices: int
    nominal_bytes: int
    unusable_bytes: int
    reserve_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Seconds of one request on a stage by purpose; the largest ``total_s / copies`` makes the bottleneck."""

    replica: int
    stage: int
    gpu: str
    tp: int
    copies: int
    dense_s: float
    all_reduce_s: float
    prefill_attention_s: float
    decode_attention_s: float  # with a pool, that of the slower side
    transfer_s: float  # hops between stages, and prefill KV that reaches its pool after the layer has finished
    head_s: float
    other_s: float
    kv_wait_s: float  # waiting for KV that leaves (prefill) or arrives (decode) slower than the layers compute
    total_s: float  # the sum of all above
    kv_wire_s: float  # this KV on the wire, mostly during computation and therefore not in the sum
    is_bottleneck: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleGpus:
    """Idle GPUs of one class, and the numbers that explain why."""

    gpu: str
    zone: str
    count: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything that ``hetis-plan explain`` prints besides the plan itself."""

    memory: tuple[MemoryBar, ...]
    stage_times: tuple[StageTime, ...]
    bottlenecks: tuple[str, ...]  # one sentence per replica on the stage or limit that binds
    idle: tuple[IdleGpus, ...]
    attention_workers: str  # why they are used or not, with numbers
    kv_routes: tuple[str, ...] = ()  # limits on the traffic between prefill and decode replicas; empty if there is none
