"""A pipeline: stages that together have every layer, and the ways of cohorts through it."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.runtime.engine.heads import StageHeads
from hetis.solver.errors import HetisError


class PipelineError(HetisError):
    """Stages do not make up the model; the message names the layers."""


def paths_of(stages: Sequence[StageHeads], layers: int, *, least: int) -> list[tuple[StageHeads, ...]]:
    """The stages that the steps of each cohort go through: at least ``least`` cohorts, and one for each copy.

    The KV of a cohort stays where it is, so that its steps always take the same copies; cohorts share these evenly.

    Raises:
        PipelineError: layers of the model's ``layers`` are missing, or in two stages that are no copies.
    """
    copies: dict[tuple[int, int], list[StageHeads]] = {}
    for stage in sorted(stages, key=lambda part: part.stage.layers.start):
        copies.setdefault((stage.stage.layers.start, stage.stage.layers.stop), []).append(stage)
    reached = 0
    for first, last in copies:
        if first != reached:
            problem = "are in two stages" if first < reached else "are in no stage"
            raise PipelineError(f"layers {min(first, reached)} to {max(first, reached) - 1} {problem}")
        reached = last
    if reached != layers:
        raise PipelineError(f"the stages have layers 0 to {reached - 1}, the model 0 to {layers - 1}")
    num = max(least, *map(len, copies.values()))
    return [tuple(own[cohort % len(own)] for own in copies.values()) for cohort in range(num)]
