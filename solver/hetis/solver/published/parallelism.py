"""Step B of HexGen-2, inside a serving group: TP degree, pipeline and layer split, by enumeration under our cost model.

Prefill groups take the shape with the lowest latency of a prompt, decode groups the one with the highest rate (as
published). (b, M, C) and the layers then follow from our family under the objective's limits, for the highest rate.
Reconstructed: each GPU type of a group has one TP degree, with the rest of a node in smaller powers of two; stages of
one type are consecutive; groups of up to three types try every order of the types, others go from the roomiest to the
tightest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product

import numpy as np

from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.template import Template, TemplateStage
from hetis.solver.plan import Role
from hetis.solver.published.graph import FleetGraph
from hetis.solver.published.layers import best_split
from hetis.solver.published.pipelines import Ranks, ReplicaDuty, pipeline_of

MAX_ORDERED_TYPES = 3  # types of a group up to which every order is tried

# The composition of a group: for every device class, the number of GPUs on each of its nodes, most first.
Composition = tuple[tuple[int, tuple[int, ...]], ...]


def composition(graph: FleetGraph, gpus: Sequence[int]) -> Composition:
    """Return what the best replica of a group depends on: classes, and how many GPUs share each node."""
    counted: dict[int, Counter[str]] = defaultdict(Counter)
    for gpu in gpus:
        device_class, node = graph.kind(gpu)
        counted[device_class][node] += 1
    return tuple((c, tuple(sorted(counted[c].values(), reverse=True))) for c in sorted(counted))


@dataclass(slots=True)
class ReplicaSearch:
    """A search for the best replica of groups, equal groups once; without ``keeps_limits`` latency is ignored."""

    atlas: Atlas
    keeps_limits: bool = True
    _found: dict[tuple[Composition, ReplicaDuty], Template | None] = field(default_factory=dict)
    _rank_of: dict[tuple[int, int], int] = field(init=False)

    def __post_init__(self) -> None:
        self._rank_of = {rank: s for s, rank in enumerate(self.atlas.ranks)}

    def best_replica(self, group: Composition, duty: ReplicaDuty) -> Template | None:
        """Return the replica on all GPUs of a group, or if none fits, on those of some of its types.

        Return None if no shape fits in memory and meets the limits.
        """
        key = group, duty
        if key not in self._found:
            self._found[key] = self._search(group, duty)
        return self._found[key]

    def _search(self, group: Composition, duty: ReplicaDuty) -> Template | None:
        for size in range(len(group), 0, -1):
            found = [self._of_all(part, duty) for part in _subsets(group, size)]
            templates = [template for template in found if template is not None]
            if templates:
                return max(templates, key=lambda template: template.rate)
        return None

    def _of_all(self, group: Composition, duty: ReplicaDuty) -> Template | None:
        """Return the replica of a group that uses all its types."""
        shapes = list(self.shapes(group))
        if duty.role is Role.PREFILL:
            # By latency: the first shape within the limits is taken, whatever the rates of the others.
            timed = sorted((self._latency_s(shape, duty), i) for i, shape in enumerate(shapes))
            for latency_s, i in timed:
                template = self.at_best_setting(shapes[i], duty) if latency_s < np.inf else None
                if template is not None:
                    return template
            return None
        found = [self.at_best_setting(shape, duty) for shape in shapes]
        return max((t for t in found if t is not None), key=lambda template: template.rate, default=None)

    def shapes(self, group: Composition) -> Iterator[Ranks]:
        """Yield TP groups in stage order, for every TP degree per type and, of few types, every order."""
        sizes = [sorted({tp for c, tp in self.atlas.ranks if c == g and tp <= nodes[0]}) for g, nodes in group]
        by_room = sorted(range(len(group)), key=lambda i: (-self._room_bytes(group[i][0]), i))
        orders = permutations(range(len(group))) if len(group) <= MAX_ORDERED_TYPES else iter([tuple(by_room)])
        for order in orders:
            for chosen in product(*(sizes[i] for i in order)):
                stages: list[int] = []
                for i, most in zip(order, chosen, strict=True):
                    device_class, nodes = group[i]
                    tps = [tp for count in nodes for tp in tp_groups(count, [n for n in sizes[i] if n <= most])]
                    stages += [self._rank_of[device_class, tp] for tp in sorted(tps, reverse=True)]
                yield tuple(stages)

    def _room_bytes(self, device_class: int) -> float:
        profile = self.atlas.problem.profiles[self.atlas.classes[device_class].gpu]
        return float(profile.room_bytes)

    def _latency_s(self, shape: Ranks, duty: ReplicaDuty) -> float:
        """Return seconds of a mean prompt that is alone in the pipeline (or among as few as the family allows)."""
        p = pipeline_of(self.atlas, duty, shape)
        fewest = int(np.argmin(p.in_flight))
        alone = p._replace(
            in_flight=p.in_flight[fewest : fewest + 1],
            room=p.room[:, fewest : fewest + 1].copy(),
            card_share=p.card_share[:, fewest : fewest + 1].copy(),
            t_cap=np.full((len(duty.mixes), 1), np.inf),
            trip_cap=np.full((len(duty.mixes), 1), np.inf),
            without_chunk=p.without_chunk[:, fewest : fewest + 1].copy(),
        )
        return float(best_split(alone).interval_s * alone.in_flight[0])

    def at_best_setting(self, shape: Ranks, duty: ReplicaDuty) -> Template | None:
        """Return the replica of this shape with the highest rate, or None if no setting fits and meets the limits."""
        pipeline = pipeline_of(self.atlas, duty, shape)
        if not self.keeps_limits:
            unlimited = np.full_like(pipeline.t_cap, np.inf)
            pipeline = pipeline._replace(t_cap=unlimited, trip_cap=unlimited)
        split = best_split(pipeline)
        if split.x < 0:
            return None
        return Template(
            scope=duty.scope,
            mix=duty.mixes[split.x],
            in_flight_index=split.f,
            stages=tuple(
                TemplateStage(rank, 1, layers) for rank, layers in zip(shape, split.layers.tolist(), strict=True)
            ),
            interval_s=split.interval_s,
        )


def _subsets(group: Composition, size: int) -> Iterator[Composition]:
    for kept in product((True, False), repeat=len(group)):
        if sum(kept) == size:
            yield tuple(part for part, is_kept in zip(group, kept, strict=True) if is_kept)


def tp_groups(count: int, sizes: Sequence[int]) -> Iterator[int]:
    """Yield the TP groups that ``count`` GPUs of a node form: as many of the largest size as fit, then of the next."""
    for size in sorted(sizes, reverse=True):
        while count >= size:
            yield size
            count -= size
