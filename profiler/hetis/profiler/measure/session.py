"""One run: opens the device, measures the most uncertain point until all are known or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hetis.formats.catalogue import gpu_name
from hetis.formats.measurements import Column, MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.measure.adaptive import QUICK_RULES, Campaign, RunRequest, SamplingRule, StoppingRule, sample
from hetis.profiler.measure.host import HostWatch
from hetis.profiler.measure.points import Measured, MeasuredPoint, TimedSample, extent_of, series_of
from hetis.profiler.measure.watch import GpuWatch, disturbance_notes
from hetis.solver.errors import HetisError

if TYPE_CHECKING:
    from hetis.profiler.measure.device import Device

# For these, engines bring kernels of their own for the attention of prompts, faster than torch's.
NEWER_KERNELS = frozenset({"Hopper", "Blackwell"})


class NotEnoughPointsError(HetisError):
    """Time was up before every operator had its first points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """The progress of a run before its next point. ``left_s`` is an upper limit on its remaining time."""

    done: int
    total: int
    left_s: float
    what: str
    uncertainty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The results of a run, including what a cluster file needs to know about the host."""

    measurements: Measurements  # with the disturbances and then remarks as notes
    disturbances: Sequence[str]
    uncertainty: float  # the largest relative error still expected anywhere
    memory_bytes: int
    architecture: str


def measure(request: RunRequest, report: Callable[[RunProgress], None]) -> RunResult:
    """Measure until every surface is known well, or ``limit_s`` has passed.

    Raises:
        InvalidProblemError: there is no such device here, or the model cannot be measured.
        NotEnoughPointsError: the limit was too short.
    """
    from hetis.profiler.measure.device import CpuDevice, open_device
    from hetis.profiler.measure.kernels import Kernels
    from hetis.profiler.measure.peers import PeerProcesses
    from hetis.profiler.measure.provenance import cache_note, measured_by

    begin_s = time.monotonic()
    device = open_device(request.device)
    gpu = gpu_name(request.gpu or device.name)  # the catalogue's name for the driver's
    peer_devices, backend, path = _peers_of(request.device, device)
    extent = extent_of(on_cuda=device.on_cuda, quick=request.quick)
    extent = replace(extent, kv_limit_bytes=min(extent.kv_limit_bytes, device.memory_bytes // 4))
    series = series_of(request.model, extent, paths=device.copies, peer_kernel=backend, peer_path=path)
    watch = GpuWatch(None if isinstance(device, CpuDevice) else device.address, clock=time.monotonic)
    driver = watch.driver()
    stopping, rule = QUICK_RULES if request.quick else (StoppingRule(), SamplingRule())
    campaign = Campaign(series, stopping)
    kernels = Kernels(device, request.model, watch.look)
    with PeerProcesses(peer_devices) as peers:
        peers.wait_until_ready()

        def time_point(point: MeasuredPoint) -> TimedSample:
            if point.texts.get("path") == path or point.op == "all_reduce":
                timer, cold = peers.timer(point.op, point.columns["num_bytes"]), False
            else:
                timer, cold = kernels.timer(point)
            found = sample(timer, time.perf_counter, rule)
            watch.look_at_processes(peers.on(str(device.torch_device)))
            return replace(found, cold=cold)

        reference = series[0].candidates[len(series[0].candidates) // 2]
        time_point(reference)  # an idle device takes a moment to raise its clocks, and libraries to initialise
        before = time_point(reference)
        watch.begin()
        host = HostWatch()
        _run(campaign, time_point, report, limit_s=request.limit_s, begin_s=begin_s)
        after = time_point(reference)
    if not campaign.is_started():
        raise NotEnoughPointsError(
            f"{request.limit_s:.0f} s are too short: {len(campaign.measured)} points were measured before every "
            "operator had enough for a fit; allow more with --time-limit"
        )
    disturbances = disturbance_notes(
        campaign.measured,
        reference_s=(before.seconds, after.seconds),
        others_share=host.share(),
        gpu=watch.news() if device.on_cuda else None,
    )
    remarks = [cache_note(device), "engine steps are not measured: no engine is running"]
    if device.architecture in NEWER_KERNELS:
        remarks.append(
            f"prefill attention is torch's FlashAttention 2: engines on {device.architecture} have kernels up to twice "
            "as fast, whose times `import` or `calibrate` can add"
        )
    if not device.on_cuda:
        remarks.append("host and device share their memory, so copies between them are copies within it")
    provenance = measured_by(request, device, driver)
    return RunResult(
        measurements=to_measurements(gpu, provenance, campaign.measured, [*disturbances, *remarks]),
        disturbances=disturbances,
        uncertainty=campaign.worst(),
        memory_bytes=device.memory_bytes,
        architecture=device.architecture,
    )


def _run(
    campaign: Campaign, time_point: Callable[[MeasuredPoint], TimedSample], report: Callable[[RunProgress], None],
    *, limit_s: float, begin_s: float,
) -> None:  # fmt: skip
    """Measure the points that the campaign chooses."""
    total = sum(min(len(state.series.candidates), state.rule.max_points) for state in campaign.states)
    took_s: list[float] = []
    while (choice := campaign.next()) is not None:
        now_s = time.monotonic()
        left_s = limit_s - (now_s - begin_s)
        if left_s <= 0:
            break
        done = len(campaign.measured)
        typical_s = sum(took_s) / len(took_s) if took_s else limit_s
        report(
            RunProgress(
                done=done,
                total=total,
                left_s=min(left_s, typical_s * (total - done)),
                what=choice.series,
                uncertainty=choice.uncertainty,
            )
        )
        found = Measured(point=choice.point, sample=time_point(choice.point))
        campaign.add(found)
        took_s.append(time.monotonic() - now_s)


def _peers_of(name: str, device: Device) -> tuple[tuple[str, str], str, str]:
    """Return (devices of the two processes that exchange messages, their backend, the path of the messages)."""
    if device.on_cuda:
        import torch

        count = torch.cuda.device_count()
        if count > 1:
            index = int(name.partition(":")[2] or 0)
            return (f"cuda:{index}", f"cuda:{(index + 1) % count}"), "nccl", "peer"
    return ("cpu", "cpu"), "gloo", "loopback"


def to_measurements(
    gpu: str, provenance: MeasuredBy, measured: Sequence[Measured], notes: Sequence[str]
) -> Measurements:
    """Return one table per operator and kernel, with rows ordered by size, so that the order of measuring does not
    matter.

    Points with cold and with warm operands are in separate tables, because a fit treats them differently.
    """
    groups: dict[tuple[str, str, bool], list[Measured]] = {}  # cold ones sort first, because fits take the first table
    for found in measured:
        groups.setdefault((found.point.op, found.point.kernel, not found.sample.cold), []).append(found)
    return Measurements(
        gpu=gpu,
        provenance=provenance,
        tables=tuple(_table(op, kernel, not warm, rows) for (op, kernel, warm), rows in sorted(groups.items())),
        notes=tuple(notes),
    )


def _table(op: str, kernel: str, cold: bool, rows: list[Measured]) -> Table:
    rows = sorted(rows, key=lambda found: (tuple(found.point.texts.values()), tuple(found.point.columns.values())))
    first = rows[0].point
    columns: dict[str, Column] = {name: np.array([found.point.texts[name] for found in rows]) for name in first.texts}
    columns |= {name: np.array([float(found.point.columns[name]) for found in rows]) for name in first.columns}
    columns["seconds"] = np.array([_digits(found.sample.seconds) for found in rows])
    columns["spread"] = np.array([_digits(found.sample.spread) for found in rows])
    return Table(op=MeasuredOp(op), kernel=kernel, columns=columns, cold=cold)


def _digits(value: float) -> float:
    """Round to five significant digits: more would be noise."""
    return float(f"{value:.4e}")
