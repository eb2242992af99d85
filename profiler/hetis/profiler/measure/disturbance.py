"""Signs that a device was not used exclusively, and the notes about them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.profiler.measure.nvidia import GpuNews
from hetis.profiler.measure.points import Measured

BUSY_SHARE = 0.1  # of the cores, used by others
_DRIFT = 0.1
_JITTER = 0.25
_JITTERY_SHARE = 0.2  # of the points
_UNSURE_SPREAD = 0.1
_THROTTLED_SHARE = 0.01  # of the samples, or of the time


def disturbance_notes(
    measured: Sequence[Measured],
    *,
    reference_s: tuple[float, float] | None,
    others_share: float,
    gpu: GpuNews | None,
) -> list[str]:
    """Return a sentence per sign.

    Args:
        measured: every point.
        reference_s: seconds of the same point before and after everything else. None: interrupted in between.
        others_share: share of the host's cores that other processes took meanwhile; 0 to 1.
        gpu: what was seen of the GPU. None: on a processor.
    """
    notes = _gpu_notes(gpu) if gpu is not None else []
    if others_share > BUSY_SHARE:
        notes.append(f"other processes took {others_share:.0%} of the host's cores while measuring")
    if reference_s is not None:
        before, after = reference_s
        if abs(after / before - 1.0) > _DRIFT:
            notes.append(
                f"the same point took {before * 1e3:.3g} ms at the start and {after * 1e3:.3g} ms at the end "
                f"({after / before - 1.0:+.0%}): clocks or neighbours changed"
            )
    jittery = sum(found.sample.jitter > _JITTER for found in measured)
    if measured and jittery > _JITTERY_SHARE * len(measured):
        notes.append(
            f"{jittery} of {len(measured)} points jitter by more than {_JITTER:.0%} from call to call, as on a shared "
            "device"
        )
    unsure = sum(found.sample.spread > _UNSURE_SPREAD for found in measured)
    if unsure:
        notes.append(f"{unsure} of {len(measured)} medians are known no better than {_UNSURE_SPREAD:.0%}")
    return notes


def _gpu_notes(gpu: GpuNews) -> list[str]:
    if not gpu.watched:
        return ["NVML is not to be had: only jitter and drift would show a throttled or shared GPU"]
    notes = []
    seen = [
        f"{name} in {count} of {gpu.looks} looks"
        for name, count in gpu.reasons.items()
        if count > _THROTTLED_SHARE * gpu.looks
    ]
    seen += [
        f"held down by {name} for {held_s:.3g} of {gpu.elapsed_s:.3g} s"
        for name, held_s in gpu.held_s.items()
        if held_s > _THROTTLED_SHARE * gpu.elapsed_s
    ]
    if seen:
        notes.append(f"the GPU was throttled while measuring ({', '.join(seen)}): its times are too long")
    if gpu.other_processes:
        count = "1 other process" if gpu.other_processes == 1 else f"{gpu.other_processes} other processes"
        notes.append(f"{count} had the GPU open while measuring: it may have been shared")
    return notes
