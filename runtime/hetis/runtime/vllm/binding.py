"""A stage of the planner in the numbering of this engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetis.v1.stage_pb2 import StageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The stage of an assignment in this engine.

    Attributes:
        model: as the planner knows it.
        index: number of each of its devices here, by name; the primary is `LOCAL`.
        cards: tensor parallel ranks, each with as many groups as the allocator has.
        planned_blocks: number of the plan's blocks that a block of one group here makes up, on all ranks together:
            vLLM's blocks may be several times as long.
    """

    model: StageModel
    index: Mapping[str, int]
    cards: int
    planned_blocks: int

    def name(self, device: int) -> str:
        """Return the planner's name for a device, or its own name if the plan does not have it."""
        return next((name for name, number in self.index.items() if number == device), f"device {device}")
