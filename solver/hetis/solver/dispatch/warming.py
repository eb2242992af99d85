"""Preparation of dispatch's kernels before anybody waits for an answer: loaded, or compiled if not on disk."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.problem import DeviceLoad, HeadShape, Requests, Stage
from hetis.solver.dispatch.solve import Dispatcher


def small_stage() -> Stage:
    """Return two devices and two head groups, which reach every kernel in microseconds once they are compiled."""
    ones = np.ones((2, 1))
    return Stage(
        heads=HeadShape(head_groups=2, queries_per_group=2, kv_bytes_per_token=4.0, exchange_bytes_per_head=4.0),
        devices=("a", "b"),
        head_s=1e-6 * ones,
        kv_byte_s=1e-9 * ones,
        call_s=1e-6 * ones,
        transfer_byte_s=np.zeros(2),
        transfer_s=np.zeros(2),
    )


def compile_dispatch() -> None:
    """Place a request, which takes up to a minute the first time on a machine."""
    requests = Requests(ids=("a",), context_tokens=np.array([64]), growth_tokens=np.array([0]))
    Dispatcher(small_stage()).dispatch(DeviceLoad.idle(np.array([64, 64])), requests)
