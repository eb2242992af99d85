"""What a measuring run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hetis.solver.model import ModelSpec


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
