"""Provenance of measurements: measurer, software and host. Needs torch."""

from __future__ import annotations

import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from hetis.formats.measurements import MeasuredBy
from hetis.formats.units import format_bytes
from hetis.profiler.measure import host
from hetis.profiler.measure.adaptive import RunRequest
from hetis.profiler.measure.device import Device
from hetis.profiler.measure.host import TIMES


def cache_note(device: Device) -> str:
    """Return the assumption about the cache under which operands are cold."""
    cache = device.pool.cache
    return (
        f"the operands of tables marked cold rotate: between two uses {format_bytes(TIMES * cache.num_bytes)} or more "
        f"of others are read, {TIMES} times the last-level cache of {format_bytes(cache.num_bytes)} ({cache.origin})"
    )


def measured_by(request: RunRequest, device: Device, driver: str) -> MeasuredBy:
    """Return the provenance of the result."""
    software = f", CUDA {torch.version.cuda}, driver {driver or 'unknown'}" if device.on_cuda else ""
    return MeasuredBy(
        tool=f"hetis-profile {version('hetis')}",
        engine="torch",
        engine_version=str(torch.__version__),
        source=f"run --device {request.device} --model {request.model.name}" + (" --quick" if request.quick else ""),
        host=f"{host.cpu_name()}, {host.num_cores()} cores, {torch.get_num_threads()} threads, "
        f"{platform.system()} {platform.machine()}{software}",
        date=datetime.fromtimestamp(time.time(), UTC).date().isoformat(),
    )
