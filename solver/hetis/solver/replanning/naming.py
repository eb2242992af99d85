"""Names for the GPUs that join: the GPUs of new and repaired replicas among those that continuing replicas leave free.

TP groups are placed in nodes largest first; sizes are powers of two, so that any node with room may be taken and the
rest still fits if the inventory's rows are met. Of the nodes with room, the first choice is one whose GPUs hold already
what they have to hold, then one that the replica uses, then the fullest, then the one with more idle GPUs: these can
start before anything stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis.solver.errors import UnboundPlanError
from hetis.solver.placement.binding import BoundStage
from hetis.solver.placement.tables import CostTables
from hetis.solver.replanning.columns import Candidate
from hetis.solver.replanning.holdings import Holding
from hetis.solver.replanning.inventory import Slot
from hetis.solver.replanning.running import Group, Place


@dataclass(frozen=True, slots=True)
class _Part:
    """A TP group or an attention worker that needs GPUs, and what each of them will hold."""

    replica: int
    stage: int
    position: int  # among the stage's groups, or its workers
    is_worker: bool
    device_class: int
    wanted: tuple[Holding, ...]


def name_gpus(
    costs: CostTables, places: Mapping[str, Place], chosen: Sequence[Candidate], held: Mapping[str, Holding]
) -> list[list[BoundStage]]:
    """Return the GPUs of every stage of every candidate, in their order; those that continue keep theirs.

    ``held``: what GPUs hold now, by name.

    Raises:
        UnboundPlanError: the candidates do not fit.
    """
    groups = [_groups_of(candidate) for candidate in chosen]
    workers = [_workers_of(candidate) for candidate in chosen]
    taken = {name for parts in (*groups, *workers) for stage in parts for group in stage for name in group or ()}
    free: dict[Slot, list[str]] = {}
    for name, place in places.items():
        if name not in taken:
            free.setdefault((place.node, place.device_class), []).append(name)
    home: dict[int, set[str]] = {}
    for part in sorted(_parts(costs, chosen, groups, workers), key=lambda p: (-len(p.wanted), p.replica, p.stage)):
        slot = _best_slot(costs, free, part, held, home.setdefault(part.replica, set()))
        names = _take(free[slot], part.wanted, held)
        home[part.replica].add(slot[0])
        (workers if part.is_worker else groups)[part.replica][part.stage][part.position] = names
    return [
        [BoundStage(_flat(stage), _flat(pool)) for stage, pool in zip(of_stages, of_pools, strict=True)]
        for of_stages, of_pools in zip(groups, workers, strict=True)
    ]


def _flat(groups: Sequence[Group]) -> list[str]:
    return [name for group in groups for name in group or ()]


def _groups_of(candidate: Candidate) -> list[list[Group]]:
    if candidate.option is not None:
        return [list(stage) for stage in candidate.option.groups]
    return [[None] * stage.copies for stage in candidate.template.stages]


def _workers_of(candidate: Candidate) -> list[list[Group]]:
    if candidate.option is not None:
        return [list(stage) for stage in candidate.option.workers]
    return [[None] * (stage.copies * stage.pool_cards) for stage in candidate.template.stages]


def _parts(
    costs: CostTables, chosen: Sequence[Candidate], groups: list[list[list[Group]]], workers: list[list[list[Group]]]
) -> list[_Part]:
    parts = []
    for replica, candidate in enumerate(chosen):
        first = 0
        prefix = costs.scopes[candidate.template.scope].tables.prefix_layers
        for index, stage in enumerate(candidate.template.stages):
            end = first + stage.layers + (prefix if index == 0 else 0)
            device_class, size = costs.ranks[stage.rank]
            dp = costs.rank_dp[stage.rank]
            tp = size // dp
            gpu = costs.classes[device_class].gpu
            shards = tuple(
                Holding(gpu=gpu, first_layer=first, end_layer=end, tp=tp, rank=rank, attention_dp=dp)
                for rank in range(size)
            )
            card_gpu = costs.classes[stage.pool_class].gpu if stage.pool_class >= 0 else gpu
            card = (Holding(gpu=card_gpu, first_layer=first, end_layer=end, tp=tp, rank=-1),)
            parts += [
                _Part(replica, index, i, False, device_class, shards)
                for i, group in enumerate(groups[replica][index])
                if group is None
            ]
            parts += [
                _Part(replica, index, i, True, stage.pool_class, card)
                for i, group in enumerate(workers[replica][index])
                if group is None
            ]
            first = end
    return parts


def _best_slot(
    costs: CostTables, free: Mapping[Slot, list[str]], part: _Part, held: Mapping[str, Holding], home: set[str]
) -> Slot:  # fmt: skip
    wanted, size = set(part.wanted), len(part.wanted)

    def fit(slot: Slot) -> tuple[int, bool, int, int]:
        names = free[slot]
        holding = len({held[name] for name in names if name in held} & wanted)
        return holding, slot[0] in home, -len(names), sum(name not in held for name in names)

    roomy = [slot for slot, names in free.items() if slot[1] == part.device_class and len(names) >= size]
    if not roomy:
        gpu = costs.classes[part.device_class].gpu
        raise UnboundPlanError(f"no node has {size} free {gpu} for replica {part.replica}")
    return max(roomy, key=fit)


def _take(names: list[str], wanted: Sequence[Holding], held: Mapping[str, Holding]) -> tuple[str, ...]:
    """Return one GPU per shard and remove it from ``names``: first one that holds it, then an idle one, then any."""
    found: dict[int, str] = {}
    for i, holding in enumerate(wanted):
        match = next((name for name in names if held.get(name) == holding), None)
        if match is not None:
            found[i] = match
            names.remove(match)
    for i in range(len(wanted)):
        if i not in found:
            idle = next((name for name in names if name not in held), names[0])
            found[i] = idle
            names.remove(idle)
    return tuple(found[i] for i in range(len(wanted)))
