"""Random stages under load, placed at random or by the dispatcher, as inputs of re-dispatch."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem


def random_problem(
    seed: int,
    *,
    num_devices: int,
    num_requests: int,
    head_groups: int = 4,
    pieces: int = 1,
    tp: int | None = None,
    slack: float = 0.3,
    draining: bool = False,
    budget_share: float = np.inf,
    least_gain: float = 0.0,
    high_water: float = 0.9,
) -> RedispatchProblem:
    """Return a stage with requests spread at random; ``slack``: least free share of each device's blocks."""
    rng = np.random.default_rng(seed)
    shape = HeadShape(
        head_groups=head_groups,
        queries_per_group=2,
        kv_bytes_per_token=512.0,
        exchange_bytes_per_head=576.0,
        block_tokens=16,
    )
    D = num_devices
    stage = Stage(
        heads=shape,
        devices=tuple(f"d{i}" for i in range(D)),
        head_s=rng.uniform(0.05e-6, 0.5e-6, (D, pieces)),
        kv_byte_s=1 / rng.uniform(2e11, 2e12, (D, pieces)),
        call_s=rng.uniform(0, 5e-6, (D, pieces)),
        transfer_byte_s=np.full(D, 1e-10) * rng.uniform(0.5, 2, D),
        transfer_s=rng.uniform(0, 3e-6, D),
        primary=None if tp is None else Primary(device=0, tp=tp, nic_byte_s=1e-10, nic_s=1e-6),
    )
    unit = stage.primary_groups
    weights = rng.dirichlet(np.full(D, 0.7))
    groups = np.zeros((num_requests, D), np.int64)
    for j in range(num_requests):
        left = head_groups
        while left:
            i = int(rng.choice(D, p=weights))
            n = unit if stage.has_primary_at(i) else 1
            if n <= left:
                groups[j, i] += n
                left -= n
    context = rng.integers(1, 3000, num_requests)
    remaining = rng.integers(0, 800, num_requests)
    used = -(-context // 16) @ groups
    mean = max(1, int(used.sum()) // D)
    totals = (used * (1 + slack)).astype(np.int64) + rng.integers(0, 1 + int(2 * slack * mean), D)
    status = [DeviceStatus.OK] * D
    if draining:
        status[int(rng.integers(D))] = DeviceStatus.DRAINING
    num_bytes = float((context * groups.sum(axis=1)).sum()) * 512 * 10
    return RedispatchProblem(
        snapshot=StateSnapshot(
            stage=stage,
            devices=tuple(
                DeviceSnapshot(name=f"d{i}", total_blocks=int(totals[i]), status=status[i], high_water=high_water)
                for i in range(D)
            ),
            ids=tuple(f"r{j}" for j in range(num_requests)),
            context_tokens=context,
            remaining_tokens=remaining,
            groups=groups,
        ),
        num_layers=10,
        link_byte_s=rng.uniform(0.5e-10, 2e-10, D),
        budget_bytes=budget_share * num_bytes if np.isfinite(budget_share) else np.inf,
        least_gain=least_gain,
    )


def with_moves_under_way(snapshot: StateSnapshot, rng: np.random.Generator) -> StateSnapshot:
    """Return the stage with groups of up to three requests moving away from the device with most of them."""
    state = DispatchState.of(snapshot)
    for j in rng.permutation(len(snapshot.ids))[:3].tolist():
        source = int(np.argmax(snapshot.groups[j]))
        target = int(rng.integers(len(snapshot.devices)))
        groups = max(snapshot.stage.primary_groups if snapshot.stage.has_primary_at(i) else 1 for i in (source, target))
        is_ok = snapshot.devices[target].status is DeviceStatus.OK
        if is_ok and source != target and groups <= snapshot.groups[j, source]:
            state.prepare_move(snapshot.ids[j], groups=groups, source=source, target=target)
    return state.snapshot()


@st.composite
def problems(
    draw: st.DrawFn, *, max_devices: int = 5, max_requests: int = 12, max_groups: int = 8, least_gain: float = 0.0
) -> RedispatchProblem:
    """Draw stages of every kind."""
    head_groups = draw(st.sampled_from([g for g in (1, 2, 4, 8) if g <= max_groups]))
    return random_problem(
        draw(st.integers(0, 2**32)),
        num_devices=draw(st.integers(1, max_devices)),
        num_requests=draw(st.integers(0, max_requests)),
        head_groups=head_groups,
        pieces=draw(st.integers(1, 2)),
        tp=draw(st.sampled_from([None, 1, *([2] if head_groups > 1 else [])])),
        slack=draw(st.sampled_from([0.0, 0.05, 0.3, 2.0])),
        draining=draw(st.booleans()),
        budget_share=draw(st.sampled_from([0.0, 0.1, np.inf])),
        least_gain=least_gain,
        high_water=draw(st.sampled_from([0.5, 0.9, 1.0])),
    )
