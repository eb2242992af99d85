"""Names for the GPUs of new and repaired replicas, among those that continuing replicas leave free.

TP groups are placed in nodes largest first; sizes are powers of two, so any node with room may be chosen and the rest
still fits if the inventory's rows are met. Of the nodes with room, the first choice is one whose GPUs already hold what
they need, then one that the replica uses, then the fullest, then the one with more idle GPUs: these can start before
anything stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hetis.solver.errors import UnboundPlanError
from hetis.solver.placement.binding import BoundStage
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.replanning.change import Holding
from hetis.solver.replanning.net_master import Slot
from hetis.solver.replanning.running import Candidate, Place


@dataclass(frozen=True, slots=True)
class _Part:
    """A TP group or an attention worker that needs GPUs, and what each of them will hold."""

    replica: int
    stage: int
    card: int | None  # index among the stage's attention workers; None: the TP group
    device_class: int
    wanted: tuple[Holding, ...]


def name_gpus(
    costs: CostTables, places: Mapping[str, Place], chosen: Sequence[Candidate], held: Mapping[str, Holding]
) -> list[list[BoundStage]]:
    """Return the GPUs of every stage of every candidate, in their order; those that continue keep theirs.

    ``held``: what each GPU holds now, by name.

    Raises:
        UnboundPlanError: the candidates do not fit.
    """
    groups = [list(candidate.groups) for candidate in chosen]
    workers = [list(map(list, candidate.workers)) for candidate in chosen]
    taken = {name for candidate in chosen for name in candidate.named()}
    free: dict[Slot, list[str]] = {}
    for name, place in places.items():
        if name not in taken:
            free.setdefault((place.node, place.device_class), []).append(name)
    home: dict[int, set[str]] = {}
    for part in sorted(_parts(costs, chosen), key=lambda p: (-len(p.wanted), p.replica, p.stage)):
        slot = _best_slot(costs, free, part, held, home.setdefault(part.replica, set()))
        names = _take(free[slot], part.wanted, held)
        home[part.replica].add(slot[0])
        if part.card is None:
            groups[part.replica][part.stage] = names
        else:
            workers[part.replica][part.stage][part.card] = names
    return [
        [
            BoundStage(list(group or ()), [name for card in cards for name in card or ()])
            for group, cards in zip(of_stages, of_pools, strict=True)
        ]
        for of_stages, of_pools in zip(groups, workers, strict=True)
    ]


def _parts(costs: CostTables, chosen: Sequence[Candidate]) -> Iterator[_Part]:
    """Yield the parts of all candidates that need GPUs."""
    for replica, candidate in enumerate(chosen):
        first, prefix = 0, costs.scopes[candidate.template.scope].tables.prefix_layers
        for index, stage in enumerate(candidate.template.stages):
            end = first + stage.layers + (prefix if index == 0 else 0)
            (device_class, size), dp = costs.ranks[stage.rank], costs.rank_dp[stage.rank]
            shard = Holding(
                gpu=costs.classes[device_class].gpu, first_layer=first, end_layer=end, tp=size // dp, rank=0,
                attention_dp=dp,
            )  # fmt: skip
            shards = tuple(replace(shard, rank=rank) for rank in range(size))
            pool_gpu = costs.classes[stage.pool_class].gpu if stage.pool_class >= 0 else shard.gpu
            card = replace(shard, gpu=pool_gpu, rank=-1, attention_dp=1)
            if candidate.groups[index] is None:
                yield _Part(replica, index, None, device_class, shards)
            for number, own in enumerate(candidate.workers[index]):
                if own is None:
                    yield _Part(replica, index, number, stage.pool_class, (card,))
            first = end


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
    """Return one GPU per shard and remove it from ``names``: one that holds the shard, else an idle one, else any."""
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
