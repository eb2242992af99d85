"""Placement of a new request's head groups, by hetis' own dispatcher or, if that is not installed, by a simple rule."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from hetis.runtime.agent.simulated.stage import SimulatedRequest, StageRun
from hetis.v1.stage_pb2 import StageModel

if TYPE_CHECKING:
    from hetis.solver.dispatch.problem import Stage
    from hetis.solver.dispatch.solve import Dispatcher

MOST_KEPT = 64  # dispatchers kept: one per stage and set of speeds
GROWTH_BLOCKS = 4  # blocks reserved for the growth of a new request


class AdmissionRule(Protocol):
    """Decides where the head groups of a new request go."""

    def warm_up(self) -> None:
        """Do in advance what is slow the first time. May take a minute."""

    def owners(self, stage: StageRun, request: SimulatedRequest) -> list[int] | None:
        """Return the device of each head group, or None if the request does not fit now."""


class ProportionalAdmission:
    """Gives each head group to the device with the smallest share of used blocks."""

    def warm_up(self) -> None:
        pass

    def owners(self, stage: StageRun, request: SimulatedRequest) -> list[int] | None:
        free = stage.free_blocks()
        totals = [device.total_blocks for device in stage.model.devices]
        need = stage.blocks(request.context_tokens + _growth(stage, request))
        units = [stage.primary_groups if device.is_primary else 1 for device in stage.model.devices]
        left, counts = stage.model.heads.head_groups, [0] * len(free)
        while left:
            fits = [i for i in range(len(free)) if units[i] <= left and free[i] >= need * units[i] and totals[i]]
            if not fits:
                return None
            best = max(fits, key=lambda i: (free[i] - need * units[i]) / totals[i])
            counts[best] += units[best]
            free[best] -= need * units[best]
            left -= units[best]
        return owners_of(counts)


class SolverAdmission:
    """Uses `hetis.solver.dispatch`: the slowest device finishes as early as possible, at the measured speeds."""

    def __init__(self) -> None:
        self._dispatchers: dict[tuple[bytes, tuple[float, ...]], Dispatcher] = {}

    def warm_up(self) -> None:
        from hetis.solver.dispatch.warming import compile_dispatch

        compile_dispatch()

    def owners(self, stage: StageRun, request: SimulatedRequest) -> list[int] | None:
        import numpy as np

        from hetis.solver.dispatch.problem import DeviceLoad, Requests
        from hetis.solver.dispatch.solve import Dispatcher

        key = (stage.model.SerializeToString(deterministic=True), tuple(stage.slowness))
        if key not in self._dispatchers:
            if len(self._dispatchers) >= MOST_KEPT:
                self._dispatchers.clear()
            self._dispatchers[key] = Dispatcher(solver_stage(stage.model, stage.slowness))
        heads, kv_bytes = stage.heads_and_bytes()
        load = DeviceLoad(
            heads=np.array(heads, np.int64),
            kv_bytes=np.array(kv_bytes),
            free_blocks=np.array(stage.free_blocks(), np.int64),
        )
        new = Requests(
            ids=(request.id,),
            context_tokens=np.array([request.context_tokens], np.int64),
            growth_tokens=np.array([_growth(stage, request)], np.int64),
        )
        plan = self._dispatchers[key].dispatch(load, new)
        return None if plan.unplaced else owners_of([int(count) for count in plan.groups[0]])


def best_admission() -> AdmissionRule:
    """Return the dispatcher if numba, which compiles it, is installed, and the simple rule otherwise."""
    return SolverAdmission() if find_spec("numba") else ProportionalAdmission()


def owners_of(counts: list[int]) -> list[int]:
    return [device for device, count in enumerate(counts) for _ in range(count)]


def solver_stage(model: StageModel, slowness: Sequence[float]) -> Stage:
    """Return the solver's value for a stage whose devices take ``slowness`` times as long as the model says.

    A device with fewer pieces than others repeats its last.
    """
    import numpy as np

    from hetis.solver.dispatch.problem import HeadShape, Primary, Stage

    most = max(len(device.pieces) for device in model.devices)

    def pieces(name: str) -> list[list[float]]:
        return [
            [slow * getattr(device.pieces[min(k, len(device.pieces) - 1)], name) for k in range(most)]
            for device, slow in zip(model.devices, slowness, strict=True)
        ]

    heads = model.heads
    primary = [i for i, device in enumerate(model.devices) if device.is_primary]
    return Stage(
        heads=HeadShape(
            head_groups=heads.head_groups,
            queries_per_group=heads.queries_per_group,
            kv_bytes_per_token=heads.kv_bytes_per_token,
            exchange_bytes_per_head=heads.exchange_bytes_per_head,
            block_tokens=heads.block_tokens,
        ),
        devices=tuple(device.name for device in model.devices),
        head_s=np.array(pieces("head_s")),
        kv_byte_s=np.array(pieces("kv_byte_s")),
        call_s=np.array(pieces("call_s")),
        transfer_byte_s=np.array([device.transfer_byte_s for device in model.devices]) * np.array(slowness),
        transfer_s=np.array([device.transfer_s for device in model.devices]) * np.array(slowness),
        primary=Primary(
            device=primary[0],
            tp=max(len(model.devices[primary[0]].gpus), 1),
            nic_byte_s=model.nic_byte_s,
            nic_s=model.nic_s,
        )
        if primary
        else None,
    )


def _growth(stage: StageRun, request: SimulatedRequest) -> int:
    return min(request.remaining_tokens, GROWTH_BLOCKS * stage.model.heads.block_tokens)
