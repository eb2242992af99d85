"""Admission: which new requests fit on all stages of a replica at once, on which copies, and where. Nothing is changed.

Requests are tried in order. A request that some stage refuses takes nothing anywhere, and later ones are still tried.
But a stage's answer for a request depends on the requests before it, including some that another stage refuses.
Refusals are therefore made final from the front, up to the point where each stage has judged without requests that are
refused elsewhere; the others are tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hetis.planner.fleet.dispatching.stage_copy import Newcomer, StageCopy
from hetis.solver.dispatch.problem import DeviceLoad, IntArray
from hetis.solver.dispatch.result import Path, Resource, Unplaced

# After this many rounds all refusals are final. That may refuse too many if stages run short of memory in turns: those
# requests wait for the next call.
MOST_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that has to wait, as judged by one stage."""

    stage: int
    resource: Resource
    missing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The quality of the placement on one copy of a stage, running requests included."""

    stage: int
    copy: int
    makespan_s: float
    bound_s: float
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Home:
    """The devices of a request's head groups on one stage: ``groups`` [D]."""

    copy: StageCopy
    groups: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAdmission:
    """The result for a batch; requests are given by their position in it.

    Attributes:
        homes: of each placed request, one per stage.
        refused: of each request that has to wait.
        qualities: one per copy of a stage that gets requests.
    """

    homes: dict[int, tuple[Home, ...]]
    refused: dict[int, Refusal]
    qualities: tuple[Quality, ...]


@dataclass(frozen=True, slots=True)
class _AdmissionAnswer:
    """One stage's answer for requests, given by their position in the batch."""

    homes: dict[int, Home]
    refused: dict[int, Unplaced]
    qualities: tuple[Quality, ...]


def admit(
    stages: Sequence[Sequence[StageCopy]], loads: Sequence[Sequence[DeviceLoad]], newcomers: Sequence[Newcomer]
) -> BatchAdmission:
    """Place a batch on copies of all stages, which have these ``loads``. Reads nothing else that changes."""
    standing, refused = list(range(len(newcomers))), dict[int, Refusal]()
    answers: list[_AdmissionAnswer | None] = [None] * len(stages)
    for round_number in range(len(newcomers) + 1):
        done = list[_AdmissionAnswer]()
        for s, copies in enumerate(stages):
            answer = answers[s]
            if answer is None or answer.homes.keys() != set(standing):
                answer = answers[s] = _on_stage(copies, loads[s], standing, newcomers)
            done.append(answer)
        final = _final_refusals(done, is_last=round_number + 1 >= MOST_ROUNDS)
        if not final:
            break
        refused |= final
        standing = [j for j in standing if j not in final]
    return BatchAdmission(
        homes={j: tuple(answer.homes[j] for answer in done) for j in standing},
        refused=refused,
        qualities=tuple(quality for answer in done for quality in answer.qualities) if standing else (),
    )


def _final_refusals(answers: Sequence[_AdmissionAnswer], *, is_last: bool) -> dict[int, Refusal]:
    """Return the requests refused by a stage that has judged without any request refused before."""
    final = dict[int, Refusal]()
    for j in sorted({j for answer in answers for j in answer.refused}):
        by = [s for s, answer in enumerate(answers) if j in answer.refused]
        knowing = [s for s in by if is_last or final.keys() <= answers[s].refused.keys()]
        if not knowing:
            break
        unplaced = answers[knowing[0]].refused[j]
        final[j] = Refusal(stage=knowing[0], resource=unplaced.resource, missing=unplaced.missing)
    return final


def _on_stage(
    copies: Sequence[StageCopy], loads: Sequence[DeviceLoad], standing: Sequence[int], newcomers: Sequence[Newcomer]
) -> _AdmissionAnswer:
    """Place each request on the copy with most free blocks; if it has no room there, on the next."""
    free = [int(np.maximum(0, load.free_blocks).sum()) for load in loads]
    heads = copies[0].terms.stage.heads
    untried = {j: set(range(len(copies))) for j in standing}
    on: list[list[int]] = [[] for _ in copies]

    def give(j: int) -> int:
        one = newcomers[j]
        best = max(untried[j], key=lambda c: (free[c], -c))
        untried[j].discard(best)
        free[best] -= heads.head_groups * -(-(one.context_tokens + one.growth_tokens) // heads.block_tokens)
        on[best].append(j)
        return best

    stale = {give(j) for j in standing}
    homes, refused, qualities = dict[int, Home](), dict[int, Unplaced](), dict[int, Quality]()
    while stale:
        c = min(stale)
        stale.discard(c)
        on[c].sort()
        plan = copies[c].plan(loads[c], [newcomers[j] for j in on[c]])
        out = {on[c][one.request]: one for one in plan.unplaced}
        homes |= {j: Home(copy=copies[c], groups=plan.groups[k]) for k, j in enumerate(on[c]) if j not in out}
        qualities[c] = Quality(
            stage=copies[c].stage, copy=copies[c].copy, makespan_s=plan.makespan_s, bound_s=plan.bound_s, path=plan.path
        )
        on[c] = [j for j in on[c] if j not in out]
        for j, unplaced in out.items():
            homes.pop(j, None)
            if untried[j]:
                stale.add(give(j))
            else:
                refused[j] = unplaced
    return _AdmissionAnswer(homes, refused, tuple(quality for c, quality in sorted(qualities.items()) if on[c]))
