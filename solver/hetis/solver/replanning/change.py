"""The change from one plan to another: its costs, what GPUs hold and load, and which replicas stay or lose their KV.

Replicas have no names of their own and are identified by what they hold: a replica of the new plan continues the one of
the old plan with which it shares the most GPUs that keep their weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

HALF_DONE = 0.5  # average share of a request's service that is lost if its KV is dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeCosts:
    """The costs of a change, in seconds in which a replica does not serve.

    Attributes:
        horizon_s: how long the new plan is expected to last; one-time losses are spread over it.
        restart_s: time from stopping an engine until it serves again, without reading weights.
        load_bytes_per_s: the rate at which every GPU reads its weights, all at the same time.
    """

    horizon_s: float = 3600.0
    restart_s: float = 30.0
    load_bytes_per_s: float = 2e9

    def __post_init__(self) -> None:
        for name in ("horizon_s", "load_bytes_per_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidProblemError(f"{name} is {getattr(self, name)}, must be above 0 and finite")
        if not 0 <= self.restart_s < float("inf"):
            raise InvalidProblemError(f"restart_s is {self.restart_s}, must be >= 0 and finite")

    def start_s(self, longest_load_bytes: float) -> float:
        """Return the time until a replica serves, given the bytes of the GPU that reads the most."""
        return self.restart_s + longest_load_bytes / self.load_bytes_per_s

    def served_share(self, start_s: float) -> float:
        """Return the share of the horizon in which a replica serves."""
        return max(0.0, 1.0 - start_s / self.horizon_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanningProblem:
    """The running plan, and the problem as it is now: its cluster has the GPUs that remain and those that have joined.

    ``max_moves``: limit on the GPUs of the new plan with another use than before; None: any number.
    """

    running: Plan
    problem: PlacementProblem
    costs: ChangeCosts = field(default_factory=ChangeCosts)
    max_moves: int | None = None

    def __post_init__(self) -> None:
        if self.max_moves is not None and self.max_moves < 0:
            raise InvalidProblemError(f"max_moves is {self.max_moves}, must be >= 0")


# --- holdings


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The part of the model on a GPU: shard ``rank`` of ``tp`` of the layers from ``first_layer`` to ``end_layer``.

    An attention worker holds the KV of those layers and no weights; ``rank`` is then -1. If ``attention_dp`` copies
    share their experts, ``rank`` is among the ranks of all of them, each of which holds 1/``attention_dp`` of its
    copy's experts.
    """

    gpu: str  # type of the GPU; a device of the same name but another type is another GPU
    first_layer: int
    end_layer: int  # one past the last layer
    tp: int
    rank: int
    attention_dp: int = 1

    @property
    def is_worker(self) -> bool:
        return self.rank < 0

    def weight_bytes(self, model: ModelSpec) -> float:
        """Return the bytes of the shard, including its share of what the first and the last layer additionally need:
        embedding, vision towers, a drafting layer, and LM head.
        """
        return self.bytes_to_load(model, None)

    def bytes_to_load(self, model: ModelSpec, before: Holding | None) -> float:
        """Return the bytes read by a GPU that held ``before``: none for layers it keeps, all if its shard differs."""
        if self.is_worker:
            return 0.0
        same_shard = before is not None and before._shard() == self._shard()
        kept = before if same_shard else None
        own, dp = model.on(self.gpu), self.attention_dp
        layers = sum(_layer_bytes(own, i, dp) for i in self._layers() if kept is None or not kept.has(i))
        tables = self._tables(model) - (kept._tables(model) if kept is not None else frozenset())
        ends = len(tables) * model.embedding_params * model.embedding_bytes
        if self.has(0) and (kept is None or not kept.has(0)):
            ends += model.vision_params * model.embedding_bytes
        last = model.num_layers - 1
        if self.has(last) and (kept is None or not kept.has(last)):
            ends += own.draft_params() * own.weight_bytes
        return (layers + ends) / self.tp

    def _shard(self) -> tuple[str, int, int, int]:
        return self.gpu, self.tp, self.rank, self.attention_dp

    def has(self, layer: int) -> bool:
        return self.first_layer <= layer < self.end_layer

    def _layers(self) -> range:
        return range(self.first_layer, self.end_layer)

    def _tables(self, model: ModelSpec) -> frozenset[str]:
        """Return the names of the tables held, embedding and LM head; a single one if they are tied."""
        ends = (("embedding", 0), ("embedding" if model.tie_embeddings else "head", model.num_layers - 1))
        return frozenset(name for name, layer in ends if self.has(layer))


def _layer_bytes(model: ModelSpec, layer: int, attention_dp: int) -> float:
    """Return the bytes of a layer on the ranks of one copy, if ``attention_dp`` copies share their experts."""
    if layer < model.prefix_layers:
        return model.dense_layer_params() * model.weight_bytes
    routed = 0.0 if model.experts is None else model.expert_share * model.experts.count * model.expert_params()
    return (model.layer_params() - routed * (1.0 - 1.0 / attention_dp)) * model.weight_bytes


def holdings(plan: Plan) -> dict[str, Holding]:
    """Return the holding of every GPU of the plan by device name; shared attention workers hold their first stage's."""
    found: dict[str, Holding] = {}
    for replica in plan.replicas:
        for device, holding in holdings_of(replica):
            found.setdefault(device, holding)
    return found


def holdings_of(replica: ReplicaPlan) -> Iterator[tuple[str, Holding]]:
    """Yield the same for one replica, in the order of its stages, their attention workers last; every GPU once."""
    dp, shared = replica.attention_dp, set[str]()
    for stage in replica.stages:
        end = stage.first_layer + stage.num_layers
        for i, device in enumerate(stage.devices):
            first, rank = stage.first_layer, i % (stage.tp * dp)
            held = Holding(gpu=stage.gpu, first_layer=first, end_layer=end, tp=stage.tp, rank=rank, attention_dp=dp)
            yield device, held
    for pool in replica.attention_workers:
        stage = replica.stages[pool.stage]
        end = stage.first_layer + stage.num_layers
        for device in pool.devices:
            if device in shared:
                continue
            shared.add(device)
            yield device, Holding(gpu=pool.gpu, first_layer=stage.first_layer, end_layer=end, tp=stage.tp, rank=-1)


# --- changes


class Fate(StrEnum):
    KEPT = "kept"  # same GPUs, weights and settings: its requests continue
    RESET = "reset"  # same GPUs and weights, but other micro-batches, chunks or head groups: its engine restarts
    CHANGED = "changed"  # shares GPUs that keep their weights with an old replica
    NEW = "new"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaChange:
    """The fate of one replica; ``before`` and ``after`` are its positions in the two plans.

    Attributes:
        moved_gpus: GPUs with another use than before.
        load_bytes: weights that all its GPUs read together.
        longest_load_bytes: weights of the GPU that reads the most, for which its start waits.
    """

    fate: Fate
    before: int | None
    after: int | None
    moved_gpus: int = 0
    load_bytes: float = 0.0
    longest_load_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """The changes of all replicas, those of the new plan first.

    Attributes:
        loads: bytes that a GPU reads, for GPUs whose weights change.
        moved: GPUs of the new plan with another use than before, including those that read nothing.
        dropped_requests: requests whose KV is lost if the replicas that do not stay are full.
        dropped_kv_tokens, dropped_kv_bytes: amount of KV of these requests.
    """

    replicas: tuple[ReplicaChange, ...]
    loads: Mapping[str, float]
    moved: tuple[str, ...]
    dropped_requests: int
    dropped_kv_tokens: float
    dropped_kv_bytes: float

    @property
    def load_bytes(self) -> float:
        return sum(self.loads.values())

    def count(self, fate: Fate) -> int:
        """Return the number of replicas with a fate."""
        return sum(change.fate is fate for change in self.replicas)


def plan_change(
    before: Plan, after: Plan, model: ModelSpec, moments: Mapping[tuple[str, ...], WorkloadMoments], *,
    replaced: ModelSpec | None = None,
) -> PlanChange:  # fmt: skip
    """Return the change from one plan to another.

    Args:
        before, after: the plans; devices of the same name are the same GPU.
        model: model of ``after``.
        moments: of the traffic on ``before``, for the KV that is dropped, by the classes that a replica serves.
        replaced: model of ``before`` if it is another one, whose weights cannot be used.
    """
    held = holdings(before) if replaced is None else {}
    partners = _partners(before, after) if replaced is None else {}
    was = replaced or model
    changes, loads, moved = [], dict[str, float](), list[str]()
    for number, replica in enumerate(after.replicas):
        change = _change_of(replica, number, partners.get(number), before, held, model)
        changes.append(change)
        for device, holding in holdings_of(replica):
            if held.get(device) != holding and device not in loads:
                moved.append(device)
                loads[device] = holding.bytes_to_load(model, held.get(device))
    continued = set(partners.values())
    changes += [
        ReplicaChange(fate=Fate.GONE, before=number, after=None)
        for number in range(len(before.replicas))
        if number not in continued
    ]
    dropped = [before.replicas[c.before] for c in changes if c.before is not None and c.fate is not Fate.KEPT]
    requests = sum(replica.planned_seats for replica in dropped)
    tokens = [
        replica.planned_seats * _context(replica, moments.get(replica.classes, moments[()])) for replica in dropped
    ]
    return PlanChange(
        replicas=tuple(changes),
        loads={device: size for device, size in loads.items() if size > 0},
        moved=tuple(dict.fromkeys(moved)),
        dropped_requests=requests,
        dropped_kv_tokens=sum(tokens),
        dropped_kv_bytes=sum(
            replica.planned_seats
            * was.cached_tokens(size / replica.planned_seats)
            * was.on(replica.stages[0].gpu).kv_bytes_per_token()
            for replica, size in zip(dropped, tokens, strict=True)
        )
        + requests * was.num_layers * was.state_bytes(),
    )


def _context(replica: ReplicaPlan, moments: WorkloadMoments) -> float:
    """Return the KV tokens of a request on this kind of replica."""
    return moments.resident_context if replica.micro_batch else moments.prefilling_context


def _partners(before: Plan, after: Plan) -> dict[int, int]:
    """Return the old replica that each new one continues: pairs that share the most GPUs with equal holdings."""
    owner = {
        device: (number, holding)
        for number, replica in enumerate(before.replicas)
        for device, holding in holdings_of(replica)
    }
    shared = Counter(
        (number, owner[device][0])
        for number, replica in enumerate(after.replicas)
        for device, holding in holdings_of(replica)
        if device in owner and owner[device][1] == holding and not holding.is_worker
    )
    partners, taken = dict[int, int](), set[int]()
    for number, old in sorted(shared, key=lambda pair: (-shared[pair], pair)):
        if number not in partners and old not in taken:
            partners[number] = old
            taken.add(old)
    return partners


def _change_of(
    replica: ReplicaPlan, number: int, old: int | None, before: Plan, held: Mapping[str, Holding], model: ModelSpec
) -> ReplicaChange:
    moving = [(device, holding) for device, holding in holdings_of(replica) if held.get(device) != holding]
    loads = [holding.bytes_to_load(model, held.get(device)) for device, holding in moving]
    if old is None:
        fate = Fate.NEW
    elif is_same(before.replicas[old], replica):
        fate = Fate.KEPT
    else:
        same_gpus = set(before.replicas[old].devices()) == set(replica.devices())
        fate = Fate.CHANGED if moving or not same_gpus else Fate.RESET
    return ReplicaChange(
        fate=fate,
        before=old,
        after=number,
        moved_gpus=len({device for device, _ in moving}),
        load_bytes=sum(loads),
        longest_load_bytes=max(loads, default=0.0),
    )


def is_same(one: ReplicaPlan, other: ReplicaPlan) -> bool:
    """Return whether an engine that runs one replica also runs the other: equal GPUs, layers, head groups, settings.

    Of the zones that receive KV it only matters whether there are others than its own: a zone that joins the fleet, or
    another order of zones, changes nothing in the engine.
    """
    matters = attrgetter(
        "stages", "attention_workers", "role", "micro_batch", "in_flight", "chunk_tokens", "sends_afar"
    )
    return bool(matters(one) == matters(other))
