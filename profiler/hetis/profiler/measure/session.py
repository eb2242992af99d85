"""One run: opens the device, measures what is known worst until all is known well or time is up, keeps a journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from hetis.formats.measurements import Measurements
from hetis.profiler.measure.adaptive import Campaign, StoppingRule
from hetis.profiler.measure.disturbance import disturbance_notes
from hetis.profiler.measure.grid import extent_of, series_of
from hetis.profiler.measure.journal import Journal, read_journal
from hetis.profiler.measure.points import Measured, Point, Sample
from hetis.profiler.measure.results import to_measurements
from hetis.profiler.measure.statistics import SamplingRule, sample
from hetis.solver.errors import HetisError
from hetis.solver.model import ModelSpec


class NotEnoughPointsError(HetisError):
    """Time was up before every operator had its first points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What to measure.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        gpu: name of the GPU type in the result; empty: what the device calls itself.
        limit_s: stop choosing new points after this long.
        journal: file that keeps what was measured; the points in it are not measured again if ``resume``.
    """

    device: str
    gpu: str
    model: ModelSpec
    quick: bool
    limit_s: float
    journal: Path
    resume: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """Where a run stands, before its next point; ``left_s`` is the most it will still take."""

    done: int
    total: int
    left_s: float
    what: str
    uncertainty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run found, and what it found out about the host for a cluster file."""

    measurements: Measurements
    num_known: int  # points of an earlier, interrupted run
    uncertainty: float  # the largest relative error still expected anywhere
    memory_bytes: int
    architecture: str


def measure(request: RunRequest, report: Callable[[RunProgress], None]) -> RunResult:
    """Measures until every surface is known well, or ``limit_s`` is over. The journal is left for the caller to remove.

    Raises:
        InvalidProblemError: no such device here, or a model that cannot be measured.
        DocumentError: the journal cannot be used or written.
        NotEnoughPointsError: the limit was too short.
        KeyboardInterrupt: the journal holds what was measured.
    """
    from hetis.profiler.measure.device import open_device
    from hetis.profiler.measure.kernels import Kernels
    from hetis.profiler.measure.peers import Peers
    from hetis.profiler.measure.provenance import gpu_name, measured_by, settings_of, watch_of

    begin_s = time.monotonic()
    device = open_device(request.device)
    gpu = gpu_name(request.gpu, device)
    backend, path = _peer_backend(device.on_cuda)
    extent = extent_of(on_cuda=device.on_cuda, quick=request.quick)
    extent = replace(extent, kv_limit_bytes=min(extent.kv_limit_bytes, device.memory_bytes // 4))
    series = series_of(request.model, extent, paths=device.copies, peer_kernel=backend, peer_path=path)
    settings = settings_of(request, gpu)
    known = read_journal(request.journal, settings) if request.resume and request.journal.exists() else []
    campaign = Campaign(series, stopping_rule(request.quick), known)
    rule = sampling_rule(request.quick)
    kernels = Kernels(device, request.model)
    watch = watch_of(device)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(request.journal, settings, known))
        peers = stack.enter_context(Peers(backend))
        peers.wait_until_ready()

        def time_point(point: Point) -> Sample:
            if point.texts.get("path") == path or point.op == "all_reduce":
                timer = peers.timer(point.op, point.columns["num_bytes"])
            else:
                timer = kernels.timer(point)
            return sample(timer, time.perf_counter, rule)

        reference = series[0].candidates[len(series[0].candidates) // 2]
        before = time_point(reference)
        others = watch.start()
        fresh = _run(campaign, time_point, report, journal, watch.look, limit_s=request.limit_s, begin_s=begin_s)
        after = time_point(reference)
    if not campaign.is_started():
        raise NotEnoughPointsError(
            f"{request.limit_s:.0f} s are too short: {len(campaign.measured)} points were measured before every "
            "operator had its first ones; allow more with --time-limit and go on with --resume"
        )
    notes = disturbance_notes(
        fresh,
        reference_s=(before.seconds, after.seconds),
        others_share=others.share(),
        throttle_reasons=watch.reasons,
        other_processes=watch.other_processes(),
    )
    notes.append(
        "engine steps are not measured: there is no engine here"
        + ("" if device.on_cuda else "; host and device memory are one, so copies between them are copies in it")
    )
    return RunResult(
        measurements=to_measurements(gpu, measured_by(request, device), campaign.measured, notes),
        num_known=len(known),
        uncertainty=campaign.worst(),
        memory_bytes=device.memory_bytes,
        architecture=device.architecture,
    )


def stopping_rule(quick: bool) -> StoppingRule:
    """When a surface is known well enough."""
    return StoppingRule(uncertainty=0.12, min_points=14, max_points=30, max_point_s=0.25) if quick else StoppingRule()


def sampling_rule(quick: bool) -> SamplingRule:
    """How long to stay at one point."""
    return (
        SamplingRule(spread=0.05, limit_s=0.15, batch_s=1e-3, warm_up_s=0.01, max_batches=30)
        if quick
        else SamplingRule()
    )


def _run(
    campaign: Campaign,
    time_point: Callable[[Point], Sample],
    report: Callable[[RunProgress], None],
    journal: Journal,
    look: Callable[[], None],
    *,
    limit_s: float,
    begin_s: float,
) -> Sequence[Measured]:
    """Measures what the campaign asks for; the points of this run."""
    fresh: list[Measured] = []
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
        journal.add(found)
        fresh.append(found)
        look()
        took_s.append(time.monotonic() - now_s)
    return fresh


def _peer_backend(on_cuda: bool) -> tuple[str, str]:
    """(what carries messages between two processes, the path it takes)."""
    if on_cuda:
        import torch

        if torch.cuda.device_count() > 1:
            return "nccl", "peer"
    return "gloo", "loopback"
