"""How deep pipelines may be where a fleet has many kinds of GPUs.

The search of an engine's family lists all pipelines: every choice of stages among the kinds of GPUs in a zone, by TP
size and number of stages. Their number grows quickly with both, so unless stages were asked for, the family has only
as many as can be listed within seconds and about 1.5 GB.

A kind of GPUs is a device class: one type, in nodes of one shape and zone, behind equal links.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetis.solver.constraints import DUTY_OF_ROLE, Duty
from hetis.solver.errors import InvalidProblemError

if TYPE_CHECKING:
    from hetis.solver.problem import PlacementProblem

# Arrays of a list have a number for each of its pipelines and over a hundred iteration mixes, and several are in use at
# once: 8 KB per pipeline. 13 kinds of GPUs in 8 stages are 125,970 pipelines.
MOST_LISTED = 130_000  # pipelines of a TP size and a number of stages in a zone
# Stages of each kind over all pipelines of all lists. 32 kinds in each of 3 zones make 22.6 million in 4 stages, and
# their search took 2.1 GB.
MOST_COUNTS = 14_000_000


@dataclass(frozen=True, slots=True)
class _Choice:
    """Kinds of GPUs among which the stages of pipelines of a TP size are chosen, and the most stages."""

    kinds: int
    deepest: int

    def pipelines(self, stages: int) -> int:
        return math.comb(self.kinds + stages - 1, stages) if stages <= self.deepest else 0


def stages_to_list(problem: PlacementProblem) -> int:
    """Return the most stages, up to those of the problem's engine, whose pipelines can be listed quickly."""
    engine = problem.family.engine
    assert engine is not None, "other families are not listed"
    choices, counts = list(_choices(problem)), 0
    for stages in range(1, engine.max_stages + 1):
        counts += sum(choice.kinds * choice.pipelines(stages) for choice in choices)
        if stages > 1 and (_longest_list(choices, stages) > MOST_LISTED or counts > MOST_COUNTS):
            return stages - 1
    return engine.max_stages


def refuse_unlisted(problem: PlacementProblem) -> None:
    """Refuse stages that were asked for if the search would refuse their pipelines.

    Raises:
        InvalidProblemError: there are too many pipelines to list; names the option, its value and the limit.
    """
    engine = problem.family.engine
    assert engine is not None, "other families are not listed"
    choices = list(_choices(problem))
    counts = {stages: _longest_list(choices, stages) for stages in range(2, engine.max_stages + 1)}
    if max(counts.values(), default=0) <= MOST_LISTED:
        return
    from hetis.solver.placement.replicas.pipelines import MOST_COMPOSITIONS  # not earlier: it loads the compiled search

    for stages, count in counts.items():
        if count > MOST_COMPOSITIONS:
            raise InvalidProblemError(
                f"--max-stages {engine.max_stages}: {kinds_in_a_zone(problem)} kinds of GPUs in a zone make "
                f"{count:,} pipelines of {stages} stages, {MOST_COMPOSITIONS:,} are listed at most: "
                f"--max-stages {stages - 1} or less"
            )


def kinds_in_a_zone(problem: PlacementProblem) -> int:
    """Return the largest number of kinds of GPUs of which one pipeline may consist."""
    return max((choice.kinds for choice in _choices(problem)), default=0)


def _longest_list(choices: list[_Choice], stages: int) -> int:
    return max((choice.pipelines(stages) for choice in choices), default=0)


def _choices(problem: PlacementProblem) -> Iterator[_Choice]:
    """Yield the choices of all lists, which are those of `hetis.solver.placement.replicas.pipelines.shapes_of`."""
    from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left
    from hetis.solver.placement.fleet import device_classes

    problem = apply_constraints(problem)
    if not problem.family.mixed_types or is_nothing_left(problem):
        return
    family, engine = problem.family, problem.family.engine
    assert engine is not None, "the engine's rules remain"
    classes = [
        c for c in device_classes(problem.cluster, problem.constraint_index, problem.node_links)
        if Duty.PRIMARY not in c.constraints.barred
    ]  # fmt: skip
    # Roles that different GPUs may have are searched one after another.
    allowed = dict.fromkeys(
        tuple(DUTY_OF_ROLE[role] not in c.constraints.barred for c in classes) for role in family.roles
    )
    for may in allowed:
        of_zone = dict[tuple[object, ...], list[int]]()
        for c, is_allowed in zip(classes, may, strict=True):
            if is_allowed:
                of_zone.setdefault((c.zone, problem.build_of(c.gpu)), []).append(c.gpus_per_node)
        for sizes in of_zone.values():
            for tp in family.tp_sizes:
                kinds = sum(size >= tp for size in sizes)
                of_gpus = engine.max_stages if engine.max_gpus is None else engine.max_gpus // tp
                deepest = min(engine.max_stages, of_gpus, problem.model.num_layers // engine.min_layers)
                if kinds:
                    yield _Choice(kinds, deepest)
