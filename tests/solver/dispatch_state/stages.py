"""Small stages for tests of dispatch state."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage


def stage(num_devices: int, *, head_groups: int = 4, tp: int | None = None, speed: float = 1.0) -> Stage:
    """Devices of equal cost; the first is a primary of ``tp`` cards unless ``tp`` is None."""
    shape = HeadShape(
        head_groups=head_groups,
        queries_per_group=2,
        kv_bytes_per_token=4.0,
        exchange_bytes_per_head=8.0,
        block_tokens=4,
    )
    return Stage(
        heads=shape,
        devices=tuple(f"d{i}" for i in range(num_devices)),
        head_s=np.full((num_devices, 1), 1e-6 * speed),
        kv_byte_s=np.full((num_devices, 1), 1e-9 * speed),
        call_s=np.full((num_devices, 1), 1e-6),
        transfer_byte_s=np.full(num_devices, 1e-9),
        transfer_s=np.full(num_devices, 1e-6),
        primary=None if tp is None else Primary(device=0, tp=tp),
    )
