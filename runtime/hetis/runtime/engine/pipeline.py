"""A pipeline: stages that together have every layer, the ways of cohorts through it, and the steps on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.engine.request import Request
from hetis.runtime.engine.step import Step
from hetis.solver.errors import HetisError

Path = tuple[StageHeads, ...]


class PipelineError(HetisError):
    """Stages do not make up the model; the message names the layers."""


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """One step of one cohort, on its way through the stages.

    Attributes:
        cohort: whose step it is.
        path: stages that it goes through.
        steps: what it is on each of them.
        wanted: requests whose tokens come out of it.
        output: of the last stage, once it has landed, unless it failed.
        failed: the stage where it did, and why.
    """

    cohort: int
    path: Path
    steps: Sequence[Step]
    wanted: Sequence[Request]
    output: torch.Tensor | None = None
    failed: tuple[StageHeads, BaseException] | None = None


class Pipeline:
    """Steps on their way. A stage works on one step at a time, in the order they came; other stages on others."""

    def __init__(self) -> None:
        self._landed: SimpleQueue[Flight] = SimpleQueue()
        self._in_air: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._in_air)

    def is_flying(self, request: Request) -> bool:
        """Whether the request has, or may have, a part in a step that has not landed."""
        return request.cohort in self._in_air

    @property
    def cohorts(self) -> tuple[int, ...]:
        """Those whose step has not landed."""
        return tuple(self._in_air)

    def launch(self, flight: Flight) -> None:
        """Sends a step on its way; where stages have no threads it has landed when this returns."""
        self._in_air[flight.cohort] = flight
        self._enter(flight, 0, None)

    def land(self) -> Flight:
        """The next step that is through, or has failed; waits for it."""
        flight = self._landed.get()
        del self._in_air[flight.cohort]
        return flight

    def has_landed(self) -> bool:
        """Whether `land` would not wait."""
        return not self._landed.empty()

    def _enter(self, flight: Flight, position: int, hidden: torch.Tensor | None) -> None:
        running = flight.path[position].run(flight.steps[position], hidden)
        running.add_done_callback(self._leave(flight, position))

    def _leave(self, flight: Flight, position: int) -> Callable[[Future[torch.Tensor]], None]:
        def leave(done: Future[torch.Tensor]) -> None:
            try:
                hidden = done.result()
                if position + 1 < len(flight.path):
                    self._enter(flight, position + 1, hidden)
                    return
                flight.output = hidden
            except BaseException as error:  # whatever it is, somebody waits for the flight
                flight.failed = flight.path[position], error
            self._landed.put(flight)

        return leave


def paths_of(stages: Sequence[StageHeads], layers: int, *, least: int) -> list[Path]:
    """The stages that the steps of each cohort go through: at least ``least`` cohorts, and one for each copy.

    The KV of a cohort stays where it is, so that its steps always take the same copies; cohorts share these evenly.

    Raises:
        PipelineError: layers of the model's ``layers`` are missing, or in two stages that are no copies.
    """
    copies: dict[tuple[int, int], list[StageHeads]] = {}
    for part in sorted(stages, key=lambda part: part.stage.layers.start):
        copies.setdefault((part.stage.layers.start, part.stage.layers.stop), []).append(part)
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
