"""A stage, its running load and a placement on it as arrays for kernels, and the time of a device.

One more head group costs device i, on its affine piece k, ``alpha_ik + beta_ik context`` seconds:
``alpha = r (a + gamma e)`` and ``beta = (KV bytes per token) b``, in the letters of `dispatch_problem.py`.
Tuples are passed to kernels whole, because passing their arrays made dispatch five times as slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hetis.solver.backends.compiled import kernel_of
from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray, Stage

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
    primary: int  # index of the primary; -1: none
    nic_head_s: float  # seconds of the primary's network card per query head on a worker
    nic_s: float
    head_groups: int  # G
    queries: int  # r


class LoadedStage(NamedTuple):
    """The costs of new head groups on a stage, and the time of its running load."""

    alpha: FloatArray  # the first five are those of `Costs`
    beta: FloatArray
    unit: IntArray
    primary: int
    head_groups: int
    base: FloatArray  # [D, K] time of the running load, including constants
    open_at: FloatArray  # [D] makespan from which a device may be used: -inf if it is in use, otherwise its constants
    floor_s: float  # time of the running load on the slowest device or network card
    nic_base: float  # time of the network card once any worker is in use, without new requests
    nic_group_s: float  # eta


class HasTimes(Protocol):
    """The part of a loaded stage that a device's time needs."""

    @property
    def alpha(self) -> FloatArray: ...
    @property
    def beta(self) -> FloatArray: ...
    @property
    def base(self) -> FloatArray: ...
    @property
    def open_at(self) -> FloatArray: ...


class Placement(NamedTuple):
    """Whole head groups of requests sorted by context, in arrays that change.

    ``on_workers`` [1] is the number of new groups on attention workers, for the primary's network card.
    """

    contexts: IntArray  # [J] tokens of each request
    blocks: IntArray  # [J] KV blocks per head group
    x: IntArray  # [J, D] groups
    groups: IntArray  # [D]
    tokens: IntArray  # [D] context tokens of the groups
    room: IntArray  # [D] free KV blocks left
    seconds: FloatArray  # [D] time, 0 for a device that holds no heads
    on_workers: IntArray


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
def running_load(costs: Costs, heads: IntArray, kv_bytes: FloatArray) -> LoadedStage:
    """Return the stage with its running load; ``heads`` and ``kv_bytes`` are those of `DeviceLoad`."""
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
    return LoadedStage(
        costs.alpha, costs.beta, costs.unit, costs.primary, costs.head_groups, base, open_at, floor_s, nic_base,
        costs.nic_head_s * costs.queries,
    )  # fmt: skip


@kernel
def device_s(stage: HasTimes, device: int, groups: float, tokens: float) -> float:
    """Return seconds of a device with ``groups`` new head groups of ``tokens`` context tokens; 0 if it holds no heads.

    This is the only formula of a device's time, also for re-dispatch: it is compiled for any tuple with these arrays.
    """
    if groups <= 0 and stage.open_at[device] != ALWAYS:
        return 0.0
    most = 0.0
    for k in range(stage.alpha.shape[1]):
        piece = stage.base[device, k] + stage.alpha[device, k] * groups + stage.beta[device, k] * tokens
        most = max(most, piece)
    return most


@kernel
def card_s(stage: LoadedStage, on_workers: float) -> float:
    """Return the time of the primary's network card with ``on_workers`` new groups; 0 while no worker holds heads."""
    if stage.primary < 0:
        return 0.0
    if on_workers == 0:
        any_runs = False
        for i in range(len(stage.open_at)):
            any_runs = any_runs or (i != stage.primary and stage.open_at[i] == ALWAYS)
        if not any_runs:
            return 0.0
    return stage.nic_base + stage.nic_group_s * on_workers


@kernel
def empty_placement(stage: LoadedStage, free_blocks: IntArray, contexts: IntArray, blocks: IntArray) -> Placement:
    """Return a placement of the running load only, for requests of these contexts and blocks per head group [J]."""
    num = len(free_blocks)
    seconds = np.empty(num)
    for i in range(num):
        seconds[i] = device_s(stage, i, 0.0, 0.0)
    return Placement(
        contexts, blocks, np.zeros((len(contexts), num), np.int64), np.zeros(num, np.int64), np.zeros(num, np.int64),
        np.maximum(free_blocks, 0), seconds, np.zeros(1, np.int64),
    )  # fmt: skip


@kernel
def put(stage: LoadedStage, placement: Placement, request: int, device: int, count: int) -> None:
    """Add ``count`` groups of a request to a device, or remove them if negative."""
    placement.x[request, device] += count
    placement.groups[device] += count
    placement.tokens[device] += count * placement.contexts[request]
    placement.room[device] -= count * placement.blocks[request]
    placement.seconds[device] = seconds_with(stage, placement, device, 0, 0)
    if device != stage.primary:
        placement.on_workers[0] += count


@kernel
def put_all(stage: LoadedStage, placement: Placement, groups: IntArray) -> None:
    """Change the placement so that it holds ``groups`` [J, D]."""
    for j in range(groups.shape[0]):
        for i in range(groups.shape[1]):
            if groups[j, i] != placement.x[j, i]:
                put(stage, placement, j, i, groups[j, i] - placement.x[j, i])


@kernel
def seconds_with(stage: LoadedStage, placement: Placement, device: int, groups: int, tokens: int) -> float:
    """Return the time of a device with ``groups`` and ``tokens`` more than it holds."""
    n, t = placement.groups[device] + groups, placement.tokens[device] + tokens
    return device_s(stage, device, float(n), float(t))


@kernel
def makespan(stage: LoadedStage, placement: Placement) -> float:
    """Return the seconds of the slowest device or network card."""
    slowest = card_s(stage, placement.on_workers[0])
    for i in range(len(placement.seconds)):
        slowest = max(slowest, float(placement.seconds[i]))
    return slowest
