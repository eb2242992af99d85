"""One colour per GPU type, consistent within a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetis.solver.plan import Plan

_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Colours by GPU type; unknown types are drawn plainly."""

    colors: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan) -> Palette:
        """Return colours for the GPU types of a plan, in the order of its device classes."""
        gpus = [price.gpu for price in plan.prices]
        gpus += [stage.gpu for replica in plan.replicas for stage in replica.stages]
        distinct = dict.fromkeys(gpus)
        return cls(colors={gpu: _COLORS[i % len(_COLORS)] for i, gpu in enumerate(distinct)})

    def __getitem__(self, gpu: str) -> str:
        return self.colors.get(gpu, "default")
