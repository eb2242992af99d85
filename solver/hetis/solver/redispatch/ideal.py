"""The ideal of a stage: all running requests dispatched again, as if moves were free."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.problem import DeviceLoad, Requests
from hetis.solver.dispatch.result import DispatchPlan
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.dispatch.solve import Dispatcher


def ideal_dispatch(snapshot: StateSnapshot, dispatcher: Dispatcher, *, on_draining: bool = False) -> DispatchPlan:
    """Dispatch all running requests as they are now to idle devices, which shows the stage without its history.

    With ``on_draining`` devices to be emptied may be used, so that the bound holds while they are still in use.
    """
    usable = {DeviceStatus.OK, DeviceStatus.DRAINING} if on_draining else {DeviceStatus.OK}
    free = [device.total_blocks if device.status in usable else 0 for device in snapshot.devices]
    everything = Requests(
        ids=snapshot.ids,
        context_tokens=snapshot.context_tokens,
        growth_tokens=np.zeros(len(snapshot.ids), np.int64),
    )
    return dispatcher.dispatch(DeviceLoad.idle(np.array(free, np.int64)), everything, tolerance=0.01)
