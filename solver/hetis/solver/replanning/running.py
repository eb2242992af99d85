"""Running replicas on the fleet as it is now: how each may continue.

A replica that lost no GPUs may be *kept*, or *reset*: the same GPUs and weights under other engine settings or in
another role (which new traffic or limits may require). One that lost GPUs may be *repaired*, other GPUs of the same
class replacing its broken TP groups and lost attention workers, or *shrunk* to the attention workers that are left.
Layers stay in place in all of these, so that only GPUs that join a replica read weights. Any other change is a new
replica. If the workload has classes, each of these may serve those of any range from now on: an engine does not know
which requests its router sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.cluster import Cluster
from hetis.solver.constraints import DUTY_OF_ROLE, Duty
from hetis.solver.mixes import Mix
from hetis.solver.placement.fleet import class_of_slots
from hetis.solver.placement.replicas.pipelines import is_run_by_engine
from hetis.solver.placement.replicas.stage_cost import stage_roles
from hetis.solver.placement.replicas.tables import BOTH, FIRST, LAST, CostTables, Scope
from hetis.solver.placement.replicas.template import (
    Template,
    TemplateStage,
    interval_of,
    least_ttft_limit_s,
    room_layers,
)
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.replanning.change import ChangeCosts, Fate

WITHIN = 1.0 + 1e-9  # factor within which a limit is met, apart from rounding


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a GPU: its node, and its class in the cost tables."""

    node: str
    gpu: str
    device_class: int


def places_of(cluster: Cluster, costs: CostTables) -> dict[str, Place]:
    """Return the place of every GPU of the fleet by name."""
    classes = class_of_slots(costs.classes)
    return {d.name: Place(d.node, d.gpu, classes[d.group.name, d.gpu]) for d in cluster.devices()}


Group = tuple[str, ...] | None  # names of the GPUs of a TP group or attention worker; None: not assigned yet


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that the new plan may have: a running one that continues in one way, or a new one.

    Attributes:
        old: index of the replica in the running plan; None: it is new.
        fate: kept, reset, changed (repaired or shrunk), or new.
        groups: the TP group of every stage.
        workers: the attention workers of every stage.
        start_s: time until it serves; 0: it does not stop.
    """

    old: int | None
    fate: Fate
    template: Template
    groups: tuple[Group, ...]
    workers: tuple[tuple[Group, ...], ...]
    start_s: float

    @property
    def running(self) -> int:
        """The index in the running plan of a replica that continues."""
        assert self.old is not None, "a new one does not run"
        return self.old

    def named(self) -> Iterator[str]:
        """Yield the names of the GPUs that it already has."""
        for parts in (self.groups, *self.workers):
            for group in parts:
                yield from group or ()

    def missing(self, costs: CostTables) -> Iterator[tuple[int, int]]:
        """Yield (class, GPUs) of every TP group and attention worker that has no GPUs yet."""
        for stage, group, workers in zip(self.template.stages, self.groups, self.workers, strict=True):
            if group is None:
                yield costs.ranks[stage.rank]
            yield from ((stage.pool_class, 1) for card in workers if card is None)

    def num_moved(self, costs: CostTables) -> int:
        """Return the number of GPUs that join it."""
        return sum(size for _, size in self.missing(costs))


def new_replica(template: Template, start_s: float = 0.0) -> Candidate:
    """Return a replica that has no GPUs yet."""
    workers = tuple((None,) * stage.pool_cards for stage in template.stages)
    return Candidate(None, Fate.NEW, template, (None,) * len(template.stages), workers, start_s)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The remainder of a running replica: groups and cards that lost a GPU are None."""

    replica: ReplicaPlan
    groups: tuple[Group, ...]
    workers: tuple[tuple[Group, ...], ...]

    @property
    def is_whole(self) -> bool:
        return all(group is not None for parts in (self.groups, *self.workers) for group in parts)

    def without_pools(self, which: Callable[[Iterable[bool]], bool]) -> _Layout:
        """Return it with the head groups back on stages of which ``which`` (any or all) attention workers are lost."""
        left = (() if cards and which(card is None for card in cards) else cards for cards in self.workers)
        return replace(self, workers=tuple(left))


class Continuations:
    """The options of running replicas; equal shapes are evaluated once."""

    def __init__(
        self, costs: CostTables, places: Mapping[str, Place], change_costs: ChangeCosts, running: Plan
    ) -> None:  # fmt: skip
        self.costs, self.places, self.change_costs = costs, places, change_costs
        self._exchanging = _exchanging(running, places) if costs.routes.beside else {}
        self._best: dict[object, Template | None] = {}

    def options(self, number: int, replica: ReplicaPlan) -> tuple[Candidate, ...]:
        """Return every way in which replica ``number`` of the running plan may continue; empty if it cannot.

        Those that serve the same classes as now come first.
        """
        layout, ranges = self._layout(replica), self.costs.problem.ranges()
        given, found = (layout, layout.without_pools(all), layout.without_pools(any)), list[Candidate]()
        for each in dict.fromkeys(given[:1] if layout.is_whole else given):
            for names in sorted(ranges, key=lambda names: names != replica.classes):
                template = self._template(each, number, ranges.index(names))
                if template is not None:
                    found += (self._of_whole if layout.is_whole else self._of_broken)(number, each, template)
        return tuple(found)

    def template_now(self, number: int, replica: ReplicaPlan) -> Template | None:
        """Return the replica as a template, if it still runs and the tables can express it."""
        layout, ranges = self._layout(replica), self.costs.problem.ranges()
        is_known = layout.is_whole and replica.classes in ranges
        return self._template(layout, number, ranges.index(replica.classes)) if is_known else None

    def _layout(self, replica: ReplicaPlan) -> _Layout:
        workers: list[list[Group]] = [[] for _ in replica.stages]
        for pool in replica.attention_workers:
            workers[pool.stage] += [self._left((device,), pool.gpu) for device in pool.devices]
        groups = tuple(self._left(stage.devices, stage.gpu) for stage in replica.stages)
        return _Layout(replica, groups, tuple(map(tuple, workers)))

    def _left(self, devices: tuple[str, ...], gpu: str) -> Group:
        """Return the group if all of its GPUs still exist, with the same type as before, in one node and class."""
        found = [self.places.get(device) for device in devices]
        whole = all(place is not None and place.gpu == gpu for place in found)
        return devices if whole and len({(p.node, p.device_class) for p in found if p is not None}) == 1 else None

    def _template(self, layout: _Layout, number: int, served: int) -> Template | None:
        """Return the replica in terms of the cost tables; None if family or fleet cannot have such a replica.

        ``served`` is the number of the range of classes that it serves.
        """
        stages, replica = list[TemplateStage](), layout.replica
        dp, tables, home = replica.attention_dp, self.costs.scopes[0].tables, self._home(layout)
        for index, (stage, group, workers) in enumerate(
            zip(replica.stages, layout.groups, layout.workers, strict=True)
        ):
            size = stage.tp * dp
            able = [g for g in self._alike(stage.gpu, replica.role) if self.costs.rank_of(g, size, dp) is not None]
            device_class = self._class_of((group,), [g for g in able if self._zone(g) in home] or able)
            rank = None if device_class is None else self.costs.rank_of(device_class, size, dp)
            if device_class is None or rank is None or stage.copies > dp:
                return None
            pool_class, cards, held = -1, 0, 0
            if workers:
                pool = next(pool for pool in replica.attention_workers if pool.stage == index)
                found = self._class_of(workers, self._able_workers(pool.gpu, replica.role, self._zone(device_class)))
                if found is None or pool.shared or len(workers) not in self.costs.pool_sizes:
                    return None
                pool_class, cards, held = found, len(workers), pool.kv_head_groups
            layers = stage.num_layers - (tables.prefix_layers if index == 0 else 0)
            stages.append(TemplateStage(rank, layers, pool_class, cards, held))
        settings = self._settings(replica, stages, number, served)
        if settings is None:
            return None
        scope, mix, f = settings
        rough = Template(scope, mix, f, tuple(stages), np.inf)
        return replace(rough, interval_s=interval_of(self.costs, rough))

    def _class_of(self, groups: Sequence[Group], able: Sequence[int]) -> int | None:
        """Return the common class of all remaining groups; if there are none, the largest class of ``able``."""
        found = {self.places[group[0]].device_class for group in groups if group is not None}
        if len(found) > 1:
            return None
        return found.pop() if found else max(able, key=lambda g: self.costs.classes[g].available, default=None)

    def _alike(self, gpu: str, role: Role) -> list[int]:
        """Return the classes of a type whose GPUs may be in replicas of this role."""
        duty = DUTY_OF_ROLE[role]
        return [g for g, c in enumerate(self.costs.classes) if c.gpu == gpu and duty not in c.constraints.barred]

    def _able_workers(self, gpu: str, role: Role, zone: str) -> list[int]:
        """Return the classes of a type whose GPUs may be attention workers in this zone, that of their stage."""
        classes = self.costs.classes
        return [
            g
            for g in self._alike(gpu, role)
            if classes[g].zone == zone and Duty.WORKER not in classes[g].constraints.barred
        ]

    def _zone(self, device_class: int) -> str:
        return self.costs.classes[device_class].zone

    def _home(self, layout: _Layout) -> set[str]:
        """Return the zones in which the replica still has GPUs, where those that replace others come from if possible.

        An engine's replica lies in one zone, as do a stage and its attention workers.
        """
        parts = (group for part in (layout.groups, *layout.workers) for group in part if group is not None)
        return {self._zone(self.places[group[0]].device_class) for group in parts}

    def _settings(
        self, replica: ReplicaPlan, stages: Sequence[TemplateStage], number: int, served: int
    ) -> tuple[int, int, int] | None:
        """Return (scope, mix, in-flight index) of a replica on these stages."""
        zones = {self.costs.classes[self.costs.ranks[stage.rank][0]].zone for stage in stages}
        zones |= {self.costs.classes[stage.pool_class].zone for stage in stages if stage.pool_class >= 0}
        key = (replica.micro_batch, replica.chunk_tokens, replica.role, replica.sends_afar, replica.attention_dp)
        in_flight, wanted = self.costs.problem.family.in_flight, replica.in_flight // replica.attention_dp
        if wanted not in in_flight:
            return None
        for x, mix in enumerate(self.costs.mixes):
            if (mix.micro_batch, mix.chunk_tokens, mix.role, mix.sends_afar, mix.attention_dp) == key:
                for scope in self._scopes_by_place(number):
                    part = self.costs.scopes[scope]
                    is_able = part.number == served and set(part.zones) == zones and part.serves(mix)
                    if is_able and has_stages(self.costs, part, stages):
                        return scope, x, in_flight.index(wanted)
        return None

    def _scopes_by_place(self, number: int) -> list[int]:
        """Return the scopes in which replica ``number`` may be, first those of the place where it exchanges KV now.

        That is the smallest one with all replicas that the plan's routes join to it, or the whole zone.
        """
        scopes, classes = self.costs.scopes, self.costs.classes
        together = [classes[g] for g in self._exchanging.get(number, ())]

        def rank(scope: int) -> int:
            blocks = scopes[scope].place.blocks
            return len(scopes) if blocks is None else len(blocks)

        found = [i for i, one in enumerate(scopes) if one.place.blocks is None or all(map(one.place.has, together))]
        return sorted(found, key=rank) if together else [i for i in found if scopes[i].place.blocks is None]

    def _of_whole(self, number: int, layout: _Layout, template: Template) -> Iterator[Candidate]:
        kept = template if is_allowed(self.costs, template) else None
        if kept is not None:
            yield Candidate(number, Fate.KEPT, kept, layout.groups, layout.workers, 0.0)
        own = self.costs.mixes[template.mix]
        for role, afar in dict.fromkeys((mix.role, mix.sends_afar) for mix in self.costs.mixes):
            best = self._best_settings(template, role, afar=afar)
            same_work = (role, afar) == (own.role, own.sends_afar)
            if best is not None and not (same_work and kept is not None and best.rate <= kept.rate * WITHIN):
                start_s = self.change_costs.start_s(0.0)
                yield Candidate(number, Fate.RESET, best, layout.groups, layout.workers, start_s)

    def _of_broken(self, number: int, layout: _Layout, template: Template) -> Iterator[Candidate]:
        repaired = self._best_settings(template)
        if repaired is not None:
            start_s = self.change_costs.start_s(self._longest_load(repaired, layout.groups))
            yield Candidate(number, Fate.CHANGED, repaired, layout.groups, layout.workers, start_s)
        shrunk = None if None in layout.groups else self._shrunk(template, layout.workers)
        best = self._best_settings(shrunk[0]) if shrunk is not None else None
        if shrunk is not None and best is not None:
            yield Candidate(number, Fate.CHANGED, best, layout.groups, shrunk[1], self.change_costs.start_s(0.0))

    def _shrunk(
        self, template: Template, workers: tuple[tuple[Group, ...], ...]
    ) -> tuple[Template, tuple[tuple[Group, ...], ...]] | None:
        """Return the template with the attention workers that are left, as many of them as pool sizes allow."""
        stages, pools = [], []
        for stage, cards in zip(template.stages, workers, strict=True):
            there = [card for card in cards if card is not None]
            most = max((p for p in self.costs.pool_sizes if p <= len(there)), default=0)
            if stage.pool_class >= 0 and most == 0:
                return None  # what becomes of the replica without these workers is an option of its own
            stages.append(replace(stage, pool_cards=most if stage.pool_class >= 0 else 0))
            pools.append(tuple(there[: stages[-1].pool_cards]))
        return replace(template, stages=tuple(stages)), tuple(pools)

    def _longest_load(self, template: Template, groups: tuple[Group, ...]) -> float:
        """Return the bytes of the joining GPU that reads the most."""
        sizes = stage_bytes(self.costs, template)
        return max((size for size, group in zip(sizes, groups, strict=True) if group is None), default=0.0)

    def _best_settings(self, template: Template, role: Role | None = None, *, afar: bool = False) -> Template | None:
        """Return the same stages under the engine settings that serve the most, in its own role or another.

        None if no settings are allowed.
        """
        own = self.costs.mixes[template.mix]
        role, afar = (own.role, own.sends_afar) if role is None else (role, afar)
        key = (template.scope, template.stages, role, afar)
        if key not in self._best:
            self._best[key] = self._search_settings(template, role, afar)
        return self._best[key]

    def _search_settings(self, template: Template, role: Role, afar: bool) -> Template | None:
        costs, best = self.costs, None
        if role is Role.PREFILL and any(stage.pool_class >= 0 for stage in template.stages):
            return None  # a prefill replica does not decode, so a pool would be of no use
        for x, mix in enumerate(costs.mixes):
            scope = self._scope_serving(template, mix) if (mix.role, mix.sends_afar) == (role, afar) else None
            if scope is None:
                continue
            if any(costs.rank_dp[stage.rank] != mix.attention_dp for stage in template.stages):
                continue
            for f in range(len(costs.problem.family.in_flight)):
                candidate = replace(template, scope=scope, mix=x, in_flight_index=f)
                candidate = replace(candidate, interval_s=interval_of(costs, candidate))
                if (best is None or candidate.rate > best.rate) and is_allowed(costs, candidate):
                    best = candidate
        return best

    def _scope_serving(self, template: Template, mix: Mix) -> int | None:
        """Return the replica's scope if it serves a mix, or one in the whole zone if its place does not."""
        scopes, own = self.costs.scopes, self.costs.scopes[template.scope]
        if own.serves(mix):
            return template.scope
        if own.place.blocks is None:
            return None
        alike = own.zones, None, own.number
        others = (i for i, one in enumerate(scopes) if (one.zones, one.place.blocks, one.number) == alike)
        able = (i for i in others if scopes[i].serves(mix) and has_stages(self.costs, scopes[i], template.stages))
        return next(able, None)


def has_lost(replica: ReplicaPlan, there: Mapping[str, str]) -> bool:
    """Return whether a replica lost GPUs, so that it does not run any more; ``there``: type of every GPU by name."""
    return any(there.get(device) != part.gpu for part in replica.parts() for device in part.devices)


def _exchanging(plan: Plan, places: Mapping[str, Place]) -> dict[int, frozenset[int]]:
    """Return, for every replica of a plan's KV routes, the classes of all GPUs that routes join, directly or not."""
    found: dict[int, frozenset[int]] = {}
    for numbers in plan.joined_by_routes():
        devices = (name for number in numbers for name in plan.replicas[number].devices() if name in places)
        found |= dict.fromkeys(numbers, frozenset(places[name].device_class for name in devices))
    return found


def has_stages(costs: CostTables, scope: Scope, stages: Sequence[TemplateStage]) -> bool:
    """Return whether a scope has these stages: constraints and zones allow all of their GPUs to do their work in it."""
    tables = scope.tables
    for stage in stages:
        device_class = costs.ranks[stage.rank][0]
        if not scope.computes_on(device_class) or tables.available[device_class] == 0:
            return False
        pool_class = stage.pool_class
        if pool_class >= 0 and (tables.available[pool_class] == 0 or tables.pool_start[stage.rank, pool_class] < 0):
            return False
    return True


def is_allowed(costs: CostTables, template: Template) -> bool:
    """Return whether the family has such a replica: latency limits, memory, and its engine's rules."""
    tables = costs.scopes[template.scope].tables
    if not is_run_by_engine(costs, template):
        return False
    if template.interval_s > float(tables.t_cap[template.mix, template.in_flight_index]) * WITHIN:
        return False
    limit_s = costs.of_scope(template.scope).problem.objective.ttft_limit_s
    if limit_s is not None and least_ttft_limit_s(costs, template) > limit_s * WITHIN:
        return False
    return all(room_layers(costs, template, i) >= stage.layers for i, stage in enumerate(template.stages))


def stage_bytes(costs: CostTables, template: Template) -> list[float]:
    """Return the weight bytes of one GPU of every stage."""
    t, sizes = costs.scopes[template.scope].tables, []
    for stage, role in zip(template.stages, stage_roles(len(template.stages)), strict=True):
        size = float(stage.layers * t.layer_bytes[stage.rank])
        size += float(t.first_bytes[stage.rank]) if role in (FIRST, BOTH) else 0.0
        size += float(t.last_bytes[stage.rank]) if role in (LAST, BOTH) else 0.0
        sizes.append(size - (float(t.tied_bytes[stage.rank]) if role == BOTH else 0.0))
    return sizes
