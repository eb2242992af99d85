"""The transition to a new plan: which replicas continue, start or drain, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from hetis.planner.convert.plans import TO_PROTO, role_of
from hetis.solver.cluster import node_of
from hetis.v1 import plan_service_pb2, replica_pb2

Kind = plan_service_pb2.TransitionKind
Step = plan_service_pb2.TransitionStep

START_BESIDE, DRAIN, START_INSTEAD = 1, 2, 3  # waves
# Predictions of a plan about a replica, which another workload changes without any effect on an engine.
_PREDICTIONS = ("rate_rps", "ttft_s", "tpot_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """The correspondence between a plan's replicas and running ones.

    Attributes:
        names: the replica's name by its index in the plan, kept and new ones.
        kept: those of them that are running already and stay unchanged.
        leaving: running replicas that the plan does not contain, in order.
    """

    names: tuple[str, ...]
    kept: frozenset[str]
    leaving: tuple[str, ...]


def match_replicas(
    running: Mapping[str, replica_pb2.ReplicaPlan],
    plan_replicas: Sequence[replica_pb2.ReplicaPlan],
    *,
    cluster: str,
    plan: str,
    runs_same_model: Callable[[str], bool] = lambda _name: True,
    taken: Collection[str] = (),
) -> Matching:
    """Find the replicas of a plan that run already, and name the others after the plan and their index in it.

    Args:
        running: shapes of the cluster's replicas by name, without those that stopped or failed.
        plan_replicas: the plan's, in its order.
        cluster: `clusters/{cluster}`.
        plan: `plans/{plan}`.
        runs_same_model: whether a running replica serves the plan's model, with the same precision.
        taken: names that no new replica may have, besides those in `running`: of every replica that has a record.
    """
    free: dict[bytes, list[str]] = {}
    for name, shape in running.items():
        if runs_same_model(name):
            free.setdefault(_identity(shape), []).append(name)
    found = [(free.get(_identity(shape)) or [""]).pop(0) for shape in plan_replicas]
    used = {*taken, *running}
    names = tuple(name or _new_name(cluster, plan, index, used) for index, name in enumerate(found))
    kept = frozenset(filter(None, found))
    return Matching(names=names, kept=kept, leaving=tuple(name for name in running if name not in kept))


def plan_transition(
    running: Mapping[str, replica_pb2.ReplicaPlan],
    plan_replicas: Sequence[replica_pb2.ReplicaPlan],
    *,
    cluster: str,
    plan: str,
    load_bytes: Callable[[replica_pb2.ReplicaPlan], int],
    runs_same_model: Callable[[str], bool] = lambda _name: True,
    taken: Collection[str] = (),
) -> list[Step]:
    """Return the steps from what runs to a plan; the arguments are those of `match_replicas`.

    Wave 1 starts replicas that need no GPU of a departing replica, wave 2 drains the departing ones, wave 3 starts the
    rest. Kept replicas are in wave 1. ``load_bytes`` returns the bytes that the GPUs of a replica load.
    """
    matching = match_replicas(
        running, plan_replicas, cluster=cluster, plan=plan, runs_same_model=runs_same_model, taken=taken
    )
    leaving = [
        Step(wave=DRAIN, kind=Kind.TRANSITION_KIND_DRAIN, replica=name, devices=devices_of(running[name]))
        for name in matching.leaving
    ]
    occupied = {device for step in leaving for device in step.devices}
    steps = [*leaving]
    for name, shape in zip(matching.names, plan_replicas, strict=True):
        devices = devices_of(shape)
        if name in matching.kept:
            steps.append(Step(wave=START_BESIDE, kind=Kind.TRANSITION_KIND_KEEP, replica=name, devices=devices))
        else:
            wave = START_BESIDE if occupied.isdisjoint(devices) else START_INSTEAD
            start = Step(wave=wave, kind=Kind.TRANSITION_KIND_START, replica=name, devices=devices)
            start.load_bytes = load_bytes(shape)
            steps.append(start)
    return sorted(steps, key=lambda step: step.wave)


def dense_devices_of(shape: replica_pb2.ReplicaPlan) -> list[str]:
    """Return the GPUs that the replica cannot serve without, as `node/index`, the primary's first."""
    return [device for stage in shape.stages for device in stage.devices]


def devices_of(shape: replica_pb2.ReplicaPlan) -> list[str]:
    """Return all its GPUs, as `node/index`: those of its stages, then its attention workers."""
    workers = dict.fromkeys(device for pool in shape.attention_workers for device in pool.devices)  # shared ones once
    return [*dense_devices_of(shape), *workers]


def nodes_of(shape: replica_pb2.ReplicaPlan) -> list[str]:
    """Return the ids of the nodes that it has GPUs on, the primary's first."""
    return list(dict.fromkeys(map(node_of, devices_of(shape))))


def _identity(shape: replica_pb2.ReplicaPlan) -> bytes:
    same = replica_pb2.ReplicaPlan()
    same.CopyFrom(shape)
    for field in _PREDICTIONS:
        same.ClearField(field)  # type: ignore[arg-type]  # the stubs list the names as a literal
    same.role = TO_PROTO[role_of(shape)]  # replicas that were started before roles existed are unified
    return same.SerializeToString(deterministic=True)


def _new_name(cluster: str, plan: str, index: int, used: set[str]) -> str:
    first = f"{cluster}/replicas/{plan.rpartition('/')[2]}-{index}"
    name, again = first, 1
    while name in used:
        again += 1
        name = f"{first}-{again}"
    used.add(name)
    return name
