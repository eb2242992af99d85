"""A stage and its load as arrays for kernels: seconds per head group and per token of one, and the running load.

One more head group costs device i, on its affine piece k, ``alpha_ik + beta_ik context`` seconds:
``alpha = r (a + gamma e)`` and ``beta = (KV bytes per token) b``, in the letters of `hetis.solver.dispatch.problem`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hetis.solver.compiled import kernel_of
from hetis.solver.dispatch.problem import FloatArray, IntArray, Stage

# --- Compilation of dispatch's kernels through `kernel`; see `hetis.solver.compiled`.


kernel = kernel_of(Path(__file__).parent)


ALWAYS = -np.inf


class Costs(NamedTuple):
    """The constants of a stage; the primary's coefficients are divided over its cards."""

    alpha: FloatArray  # [D, K] seconds per head group
    beta: FloatArray  # [D, K] seconds per token of a head group
    head_s: FloatArray  # [D, K] seconds per running query head, including exchange
    byte_s: FloatArray  # [D, K] seconds per running KV byte
    call_s: FloatArray  # [D, K] seconds per call and exchange
    unit: IntArray  # [D] head groups taken at once
    primary: int  # -1: none
    nic_head_s: float  # of the primary's network card, per query head on a worker
    nic_s: float
    head_groups: int  # G
    queries: int  # r


class Running(NamedTuple):
    """The load of every device in seconds."""

    base: FloatArray  # [D, K] time of the running load, including constants
    open_at: FloatArray  # [D] makespan from which a device may be used: -inf if it is in use, otherwise its constants
    floor_s: float  # time of the running load on the slowest device or network card
    nic_base: float  # network card's time once any worker is in use, without new requests
    nic_group_s: float  # eta


class HasSlopes(Protocol):
    """The part of costs that a device's time needs."""

    @property
    def alpha(self) -> FloatArray: ...
    @property
    def beta(self) -> FloatArray: ...


class HasConstants(Protocol):
    """The part of the running load that a device's time needs."""

    @property
    def base(self) -> FloatArray: ...
    @property
    def open_at(self) -> FloatArray: ...


def costs_of(stage: Stage) -> Costs:
    """Tabulate a stage."""
    shape, primary = stage.heads, stage.primary
    head_s, byte_s = stage.head_s.copy(), stage.kv_byte_s.copy()
    gamma, beta = stage.transfer_byte_s.copy(), stage.transfer_s.copy()
    unit = np.ones(stage.num_devices, np.int64)
    if primary is not None:
        i = primary.device
        head_s[i] /= primary.tp
        byte_s[i] /= stage.primary_groups
        gamma[i] = beta[i] = 0.0
        unit[i] = stage.primary_groups
    head_s += (gamma * shape.exchange_bytes_per_head)[:, None]
    return Costs(
        alpha=shape.queries_per_group * head_s,
        beta=shape.kv_bytes_per_token * byte_s,
        head_s=head_s,
        byte_s=byte_s,
        call_s=stage.call_s + beta[:, None],
        unit=unit,
        primary=-1 if primary is None else primary.device,
        nic_head_s=0.0 if primary is None else float(primary.nic_byte_s) * shape.exchange_bytes_per_head,
        nic_s=0.0 if primary is None else float(primary.nic_s),
        head_groups=shape.head_groups,
        queries=shape.queries_per_group,
    )


@kernel
def running_load(costs: Costs, heads: IntArray, kv_bytes: FloatArray) -> Running:
    """Return the times of the running load; ``heads`` and ``kv_bytes`` are those of `Load`."""
    num, pieces = costs.alpha.shape
    base = np.empty((num, pieces))
    open_at = np.empty(num)
    floor_s = 0.0
    on_workers = 0
    for i in range(num):
        most = 0.0
        for k in range(pieces):
            base[i, k] = costs.call_s[i, k] + costs.head_s[i, k] * heads[i] + costs.byte_s[i, k] * kv_bytes[i]
            most = max(most, base[i, k])
        open_at[i] = most
        if heads[i] > 0:
            open_at[i] = ALWAYS
            floor_s = max(floor_s, most)
            if i != costs.primary:
                on_workers += heads[i]
    nic_base = 0.0
    if costs.primary >= 0:
        nic_base = costs.nic_s + costs.nic_head_s * on_workers
        if on_workers > 0:
            floor_s = max(floor_s, nic_base)
        else:
            for i in range(num):
                if i != costs.primary:
                    open_at[i] = max(open_at[i], nic_base)
    return Running(base, open_at, floor_s, nic_base, costs.nic_head_s * costs.queries)


@kernel
def device_s(costs: HasSlopes, running: HasConstants, device: int, groups: float, tokens: float) -> float:
    """Return seconds of a device with ``groups`` new head groups of ``tokens`` context tokens; 0 if it holds no heads.

    This is the only formula of a device's time, also for re-dispatch: it is compiled for any tuples with these arrays.
    Tuples are passed whole, because passing their arrays to a kernel made dispatch five times as slow.
    """
    if groups <= 0 and running.open_at[device] != ALWAYS:
        return 0.0
    most = 0.0
    for k in range(costs.alpha.shape[1]):
        piece = running.base[device, k] + costs.alpha[device, k] * groups + costs.beta[device, k] * tokens
        most = max(most, piece)
    return most


# --- A placement in whole head groups under construction: what every device holds, and its time.


class Placement(NamedTuple):
    """Mutable arrays of a placement of the requests to be placed, sorted by context.

    ``on_workers`` [1] is the number of new groups on attention workers, for the primary's network card.
    """

    x: IntArray  # [J, D] groups
    groups: IntArray  # [D]
    tokens: IntArray  # [D] context tokens of the groups
    room: IntArray  # [D] free KV blocks left
    seconds: FloatArray  # [D] time, 0 for a device that holds no heads
    on_workers: IntArray


@kernel
def empty_placement(costs: Costs, running: Running, free_blocks: IntArray, num_requests: int) -> Placement:
    """Return a placement of the running load only."""
    num = len(free_blocks)
    seconds = np.empty(num)
    for i in range(num):
        seconds[i] = device_s(costs, running, i, 0.0, 0.0)
    return Placement(
        np.zeros((num_requests, num), np.int64),
        np.zeros(num, np.int64),
        np.zeros(num, np.int64),
        np.maximum(free_blocks, 0),
        seconds,
        np.zeros(1, np.int64),
    )


@kernel
def put(
    costs: Costs, running: Running, placement: Placement, request: int, device: int, count: int, context: int,
    blocks: int,
) -> None:  # fmt: skip
    """Add ``count`` groups of a request to a device, or remove them if negative."""
    placement.x[request, device] += count
    placement.groups[device] += count
    placement.tokens[device] += count * context
    placement.room[device] -= count * blocks
    placement.seconds[device] = device_s(
        costs, running, device, float(placement.groups[device]), float(placement.tokens[device])
    )
    if device != costs.primary:
        placement.on_workers[0] += count


@kernel
def seconds_with(costs: Costs, running: Running, placement: Placement, device: int, groups: int, tokens: int) -> float:
    """Return the time of a device with ``groups`` and ``tokens`` more than it holds."""
    n, t = placement.groups[device] + groups, placement.tokens[device] + tokens
    return device_s(costs, running, device, float(n), float(t))


@kernel
def card_s(costs: Costs, running: Running, on_workers: float) -> float:
    """Return the time of the primary's network card with ``on_workers`` new groups; 0 while no worker holds heads."""
    if costs.primary < 0:
        return 0.0
    if on_workers == 0:
        any_runs = False
        for i in range(len(running.open_at)):
            any_runs = any_runs or (i != costs.primary and running.open_at[i] == ALWAYS)
        if not any_runs:
            return 0.0
    return running.nic_base + running.nic_group_s * on_workers


@kernel
def makespan(costs: Costs, running: Running, placement: Placement) -> float:
    """Return the seconds of the slowest device or network card."""
    slowest = card_s(costs, running, placement.on_workers[0])
    for i in range(len(placement.seconds)):
        slowest = max(slowest, float(placement.seconds[i]))
    return slowest
