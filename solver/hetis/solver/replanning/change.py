"""The change from one plan to another: which replicas stay, what every GPU loads, which KV is dropped.

Replicas have no names of their own and are identified by what they hold: a replica of the new plan continues the one of
the old plan with which it shares the most GPUs that keep their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.solver.replanning.holdings import Holding, holdings, holdings_of, in_flight
from hetis.solver.workload import WorkloadMoments


class Fate(StrEnum):
    KEPT = "kept"  # same GPUs, weights and settings: its requests continue
    RESET = "reset"  # same GPUs and weights, other micro-batches, chunk or head groups: its engine restarts
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
        moved: GPUs of the new plan with another use than before, including those with nothing to read.
        dropped_requests: requests whose KV is lost if the replicas that do not stay are full.
        dropped_kv_tokens, dropped_kv_bytes: KV of these requests.
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
    before: Plan, after: Plan, model: ModelSpec, moments: WorkloadMoments, *, same_model: bool = True
) -> PlanChange:
    """Return the change from one plan to another of the same model.

    Args:
        before, after: the plans; devices of the same name are the same GPU.
        model: of ``after``.
        moments: of the traffic on ``before``, for the KV that is dropped.
        same_model: False if the weights of ``before`` are of no use.
    """
    held = holdings(before) if same_model else {}
    partners = _partners(before, after) if same_model else {}
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
    dropped = [c.before for c in changes if c.before is not None and c.fate is not Fate.KEPT]
    requests = sum(in_flight(before.replicas[number]) for number in dropped)
    tokens = {n: in_flight(before.replicas[n]) * _context(before.replicas[n], moments) for n in dropped}
    return PlanChange(
        replicas=tuple(changes),
        loads={device: size for device, size in loads.items() if size > 0},
        moved=tuple(dict.fromkeys(moved)),
        dropped_requests=requests,
        dropped_kv_tokens=sum(tokens.values()),
        dropped_kv_bytes=sum(
            in_flight(before.replicas[n])
            * model.cached_tokens(size / in_flight(before.replicas[n]))
            * model.on(before.replicas[n].stages[0].gpu).kv_bytes_per_token()
            for n, size in tokens.items()
        )
        + requests * model.num_layers * model.state_bytes(),
    )


def _context(replica: ReplicaPlan, moments: WorkloadMoments) -> float:
    """Return the tokens in the KV of a request on this kind of replica."""
    return moments.resident_context if replica.micro_batch else moments.prefilling_context


def _partners(before: Plan, after: Plan) -> dict[int, int]:
    """Return the old replica that each new one continues, pairing those that share most GPUs with equal holdings."""
    owner = {
        device: (number, holding)
        for number, replica in enumerate(before.replicas)
        for device, holding in holdings_of(replica)
    }
    shared: dict[tuple[int, int], int] = {}
    for number, replica in enumerate(after.replicas):
        for device, holding in holdings_of(replica):
            if device in owner and owner[device][1] == holding and not holding.is_worker:
                pair = (number, owner[device][0])
                shared[pair] = shared.get(pair, 0) + 1
    partners: dict[int, int] = {}
    taken: set[int] = set()
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
    """Return whether an engine that runs one replica also runs the other: GPUs, layers, head groups, settings."""
    return (
        (one.stages, one.attention_workers, one.role) == (other.stages, other.attention_workers, other.role)
        and (one.micro_batch, one.in_flight, one.chunk_tokens)
        == (other.micro_batch, other.in_flight, other.chunk_tokens)
        and one.kv_zones == other.kv_zones
    )
