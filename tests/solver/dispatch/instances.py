"""Random dispatch problems, with cards of several speeds, in which every constraint binds now and then."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import strategies as st

from hetis.solver.dispatch.dispatch_problem import DeviceLoad, DispatchProblem, HeadShape, Primary, Requests, Stage

LoadKind = Literal["level", "uneven", "idle"]

# seconds per head, per KV byte and per call, similar to an H100, an A100, an L4 and a P100
CARDS = np.array(
    [[1.5e-9, 3.3e-13, 1.3e-5], [1.7e-9, 6.5e-13, 1.8e-5], [1.6e-8, 4.0e-12, 1.1e-5], [6e-9, 2.4e-12, 2e-5]]
)


def random_problem(
    rng: np.random.Generator,
    *,
    num_devices: int,
    num_requests: int,
    pieces: int = 1,
    head_groups: int = 8,
    load: LoadKind = "level",
    tp: int | None = None,
    nic_share: float = 0.0,
    free_ratio: float | None = None,
    equal_growth: bool = False,
) -> DispatchProblem:
    """One stage of random cards.

    Args:
        load: all devices run about equally long; each between nothing and that; or a third of them idle.
        tp: number of cards of the primary, device 0; None: there is no primary.
        nic_share: approximate share of the level that the primary's network card needs.
        free_ratio: free KV blocks of all devices together over the number that the requests need; None: plenty.
    """
    heads = HeadShape(
        head_groups=head_groups, queries_per_group=4, kv_bytes_per_token=512.0, exchange_bytes_per_head=640.0
    )
    cards = CARDS[rng.integers(len(CARDS), size=num_devices)] * rng.uniform(0.9, 1.1, (num_devices, 3))
    # Later pieces cost more per byte and start lower, so that device times bend upwards.
    steeper = 1.0 + 0.4 * np.arange(pieces)
    level = rng.uniform(1e-4, 4e-4)
    running_bytes = level / cards[:, 1] * rng.uniform(0.6, 0.8, num_devices)
    kv_byte_s = cards[:, 1, None] * steeper
    bends = 1.0 + 0.02 * rng.uniform(0.0, 1.0, (num_devices, pieces)) * np.arange(pieces)
    call_s = cards[:, 2, None] - (kv_byte_s - cards[:, 1, None]) * running_bytes[:, None] * bends
    call_s = np.maximum(0.0, call_s + 5e-5)
    on_device = rng.uniform(0.98, 1.0, num_devices)
    if load == "uneven":
        on_device = rng.uniform(0.2, 1.0, num_devices)
    elif load == "idle":
        on_device *= rng.random(num_devices) > 1 / 3
    running_heads = np.where(on_device > 0, rng.integers(8, 40, num_devices) * 8, 0)
    context_tokens = np.minimum(30_000, rng.lognormal(6.5, 1.0, num_requests).astype(np.int64) + 1)
    growth_tokens = rng.integers(0, 600, num_requests)
    if equal_growth:
        growth_tokens[:] = 200
    requests = Requests(
        ids=tuple(f"r{j}" for j in range(num_requests)), context_tokens=context_tokens, growth_tokens=growth_tokens
    )
    free_blocks = np.full(num_devices, 10**6, np.int64)
    if free_ratio is not None:
        needed = head_groups * requests.blocks(heads.block_tokens).sum()
        free_blocks = np.floor(free_ratio * needed * rng.dirichlet(np.full(num_devices, 3.0))).astype(np.int64)
    primary = None
    if tp is not None:
        exchanged = 640.0 * (running_heads[1:].sum() + 4 * head_groups * num_requests) + 1.0
        primary = Primary(device=0, tp=tp, nic_byte_s=nic_share * level / exchanged, nic_s=nic_share * 1e-5)
    stage = Stage(
        heads=heads,
        devices=tuple(f"d{i}" for i in range(num_devices)),
        head_s=np.repeat(cards[:, :1], pieces, axis=1),
        kv_byte_s=kv_byte_s,
        call_s=call_s,
        transfer_byte_s=np.full(num_devices, 1e-10),
        transfer_s=np.full(num_devices, 2e-5),
        primary=primary,
    )
    kv_bytes = running_bytes * on_device * (1 if primary is None else np.where(np.arange(num_devices) == 0, tp, 1))
    running = DeviceLoad(heads=running_heads, kv_bytes=kv_bytes, free_blocks=free_blocks)
    return DispatchProblem(stage=stage, load=running, requests=requests)


@st.composite
def problems(draw: st.DrawFn, *, max_devices: int = 8, max_requests: int = 8, max_groups: int = 8) -> DispatchProblem:
    """Draw any problem that `random_problem` makes."""
    head_groups = draw(st.sampled_from([groups for groups in (1, 2, 4, 8) if groups <= max_groups]))
    tp = draw(st.sampled_from([None, 1, 2, 4]))
    return random_problem(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        num_devices=draw(st.integers(1, max_devices)),
        num_requests=draw(st.integers(0, max_requests)),
        pieces=draw(st.integers(1, 3)),
        head_groups=head_groups,
        load=draw(st.sampled_from(["level", "uneven", "idle"])),
        tp=tp,
        nic_share=draw(st.sampled_from([0.0, 0.5, 1.0, 1.2])),
        free_ratio=draw(st.sampled_from([None, 3.0, 1.3, 1.05, 0.7])),
        equal_growth=draw(st.booleans()),
    )
