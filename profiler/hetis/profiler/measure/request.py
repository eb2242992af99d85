"""The request for a measuring run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hetis.solver.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A request to measure a device."""

    device: str  # ``cpu``, ``cuda`` or ``cuda:1``
    gpu: str  # name of the GPU type in the result. Empty: the device's own name.
    model: ModelSpec
    quick: bool
    limit_s: float  # stop choosing new points after this time
    journal: Path  # file that keeps the measurements; its points are not measured again if ``resume``
    resume: bool
