"""Proposals: after a lasting change of capacity the planner creates a new plan, which is advice or is activated.

Capacity is the set of nodes that a plan may use: declared, not draining, not lost. It has changed if the active plan
uses a node that is gone, or if there is a node that was not there when that plan was made. A change counts once it has
lasted for ``placement_patience`` without another one; a node that flaps restarts the time.

The planner knows the capacity for which the active plan was made only if that was in its own term. A plan that was
active before counts as made for the nodes at the start of the term, including those that have not connected yet.
Open proposals of earlier terms are in the store: the newest one is taken over, with the capacity in its document, and
the others are withdrawn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from hetis.planner.convert.clusters import basic_view
from hetis.planner.convert.plans import role_of
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.replica import dense_devices_of, nodes_of
from hetis.planner.fleet.settings import ProposalPolicy, policy_from
from hetis.planner.fleet.stored_plans import SEARCHING, AnsweredPlan, StoredPlans
from hetis.planner.fleet.views import Clock, FleetObserver
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation
from hetis.planner.resources.plans import Plans
from hetis.planner.store import Reader, Store, etag_of
from hetis.solver.cluster import node_of
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Role
from hetis.v1 import cluster_pb2, plan_pb2, view_pb2
from hetis.v1 import plan_service_pb2 as pb2

POLL_S = 2.0  # between two polls of a running search
GATHERED_S = 0.5  # gathers changes of capacity: each look covers all nodes, and after a restart all connect
LEAST_GAIN = 0.01  # relative gain in rate from which a proposal may be activated automatically
MOST_NAMED = 5  # nodes named in a reason
_GONE = (cluster_pb2.NODE_STATE_LOST, cluster_pb2.NODE_STATE_UNDECLARED)
_MOST_KEPT = 64  # plans whose replicas are cached; those of two plans per cluster are read repeatedly
_log = logging.getLogger("hetis.planner.proposals")


@dataclass(slots=True, eq=False)
class StoredPlacements:
    """Plans in the form that proposals need. The replicas in a plan's document are read once per state of the plan."""

    _store: Store
    _plans: Plans
    _creation: PlanCreation
    _activation: PlanActivation
    _stored: StoredPlans
    _kept: dict[str, plan_pb2.Plan] = field(default_factory=dict)

    async def plan_in_force(self, cluster: str) -> plan_pb2.Plan | None:
        """Return the active plan with its spec and its replicas, or None."""
        record = await self._store.get(Reader.clusters, cluster)
        return None if record is None or not record.active_plan else await self.plan(record.active_plan)

    async def plan(self, name: str) -> plan_pb2.Plan | None:
        record = await self._store.get(Reader.plans, name)
        if record is None:
            self._kept.pop(name, None)
            return None
        if record.state in SEARCHING:
            return basic_view(record)
        kept = self._kept.get(name)
        if kept is None or kept.etag != etag_of(record):
            request = pb2.GetPlanRequest(name=name, view=view_pb2.VIEW_FULL)
            kept = self._kept[name] = (await self._plans.get(request)).plan
            while len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return kept

    async def open_proposals(self, cluster: str, *, of_traffic: bool = False) -> list[str]:
        """Return the names of the proposals that were never activated, the newest first: those because of capacity, or
        those because of traffic.
        """
        inactive = plan_pb2.ACTIVATION_STATE_INACTIVE
        records = await self._store.read(lambda reader: reader.plans.all(cluster=cluster))
        return [
            record.name
            for record in sorted(records, key=lambda record: record.create_time_s, reverse=True)
            if record.body.origin == plan_pb2.PLAN_ORIGIN_PROPOSAL
            and record.activation == inactive
            and not record.body.HasField("activate_time")
            and record.body.HasField("traffic_proposal") == of_traffic
        ]

    async def capacity_of(self, plan: str) -> frozenset[str]:
        """Return the ids of the nodes for which a plan was made; none if it has no answer."""
        record = await self._store.get(Reader.plans, plan)
        if record is None or not record.body.HasField("result"):
            return frozenset()
        groups = (await self._stored.of(record)).problem.cluster.node_groups
        return frozenset(group.node_name(index) for group in groups for index in range(group.count))

    async def propose(self, cluster: str, spec: plan_pb2.PlanSpec, reason: str) -> str:
        """Create a plan for the available nodes and return its name. Raises ServiceError if that is impossible now."""
        return await self._creation.propose(cluster, spec, reason)

    async def withdraw(self, plan: str) -> None:
        """Cancel a running search, whose result is kept; delete a finished plan unless it was activated."""
        try:
            record = await self._store.get(Reader.plans, plan)
            if record is not None and record.state in SEARCHING:
                await self._plans.cancel(pb2.CancelPlanRequest(name=plan), withdraws=False)
            elif record is not None:
                await self._plans.delete(pb2.DeletePlanRequest(name=plan))
        except ServiceError as error:
            if error.reason not in (Reason.ERROR_REASON_NOT_FOUND, Reason.ERROR_REASON_RESOURCE_IN_USE):
                raise

    async def answered(self, plan: str) -> AnsweredPlan | None:
        """Return a plan with its document; None if it was deleted."""
        record = await self._store.get(Reader.plans, plan)
        return None if record is None else await self._stored.of(record)

    async def activate(self, plan: str) -> None:
        """Activate a plan. Raises ServiceError if that is impossible now."""
        await self._activation.activate(pb2.ActivatePlanRequest(name=plan))

    async def roll_back(self, plan: str) -> None:
        """Activate the plan before the one in force. Raises ServiceError if that is impossible now."""
        await self._activation.rollback(pb2.RollbackPlanRequest(name=plan))


@dataclass(slots=True)
class _Cluster:
    """The state of a cluster.

    Attributes:
        plan, planned: the active plan, and the capacity for which it was made.
        proposal, proposed: the open proposal, and its capacity; empty if none. The capacity is None until it is known:
            a search of an earlier term has to end first.
    """

    nodes: frozenset[str]  # the cluster's capacity, as of the last look
    since_s: float  # since when the capacity has been that
    changed_s: float | None = None  # when the capacity may have changed since the last look; None if it has not
    plan: str = ""
    planned: frozenset[str] = frozenset()
    proposal: str = ""
    proposed: frozenset[str] | None = frozenset()
    has_adopted: bool = False  # whether the open proposals of earlier terms were looked for
    is_settled: bool = False  # whether there is nothing to do until a change


class PlacementProposals(FleetObserver):
    """Keeps at most one open proposal per cluster. Run `run` once; `step` does all work that is due."""

    def __init__(self, fleet: LiveFleet, placements: StoredPlacements, *, clock: Clock) -> None:
        self._fleet, self._placements, self._clock = fleet, placements, clock
        self._clusters: dict[str, _Cluster] = {}
        self._wake = asyncio.Event()

    # --- FleetObserver

    def capacity_changed(self, cluster: str) -> None:
        """Record that a node was lost, came back, drains or joined; to be called once per cluster at the start, too."""
        now_s = self._clock.monotonic()
        known = self._clusters.get(cluster)
        if known is None:
            self._clusters[cluster] = _Cluster(self._capacity(cluster), now_s)
        else:
            known.changed_s = now_s
        self._wake.set()

    # --- due work

    async def run(self) -> None:
        while True:
            wait_s = await self.step()
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), wait_s)
            except TimeoutError:
                continue
            await asyncio.sleep(GATHERED_S)

    async def step(self) -> float | None:
        """Look at every cluster that is due; return the seconds until the next one is due, or None if none waits."""
        waits = list[float]()
        for name, known in list(self._clusters.items()):
            self._take_change(name, known)
            if known.is_settled:
                continue
            patience_s = policy_from(ProposalPolicy, self._fleet.policy_of(name)).patience_s
            try:
                wait_s = await self._look(name, known)
            except (ServiceError, InvalidProblemError) as error:  # for example, the remaining GPUs do not run the model
                _log.warning("no proposal for %s: %s", name, error)
                wait_s = (error.retry_after_s if isinstance(error, ServiceError) else None) or patience_s
            except Exception:
                _log.exception("checking %s failed", name)  # must not end the loop, which serves all clusters
                wait_s = patience_s
            if known.changed_s is not None:
                wait_s = 0.0  # the capacity has changed in the meantime
            known.is_settled = wait_s is None
            if wait_s is not None:
                waits.append(wait_s)
        return min(waits) if waits else None

    async def _look(self, name: str, known: _Cluster) -> float | None:
        """Look at a cluster; return the seconds until the next look, or None if none is needed."""
        policy = policy_from(ProposalPolicy, self._fleet.policy_of(name))
        if policy.mode == cluster_pb2.REACTION_MODE_OFF or not self._fleet.has_plan(name):
            return None
        nodes = known.nodes
        plan = await self._placements.plan_in_force(name)
        if plan is None:
            return None
        if not known.has_adopted:
            await self._adopt(name, known)
        if plan.name != known.plan:
            is_ours = plan.name == known.proposal and known.proposed is not None
            known.planned = (known.proposed or frozenset()) if is_ours else nodes | _nodes_of(plan)
            known.plan = plan.name
        if known.proposal:
            wait_s = await self._follow(name, known, plan, policy)
            if wait_s is not None or known.proposal:
                return wait_s
        gone, came = _nodes_of(plan) - nodes, nodes - known.planned
        if not gone and not came:
            return None
        left_s = known.since_s + policy.patience_s - self._clock.monotonic()
        if left_s > 0:
            return left_s
        if plan.activation != plan_pb2.ACTIVATION_STATE_ACTIVE:
            return POLL_S  # another change of the plan must finish first
        if not plan.HasField("spec"):
            _log.warning("no proposal for %s: %s was imported, there is no problem to pose again", name, plan.name)
            return None
        known.proposal = await self._placements.propose(name, plan.spec, _reason(gone, came, policy.patience_s))
        known.proposed = nodes
        return POLL_S

    async def _adopt(self, name: str, known: _Cluster) -> None:
        """Take over the newest open proposal of an earlier term, and withdraw the others."""
        found = await self._placements.open_proposals(name)
        for other in found[1:]:
            await self._placements.withdraw(other)
        if found:
            known.proposal, known.proposed = found[0], None
        known.has_adopted = True

    async def _follow(self, name: str, known: _Cluster, plan: plan_pb2.Plan, policy: ProposalPolicy) -> float | None:
        """Follow up the open proposal; forget it if another one may be made."""
        proposal = await self._placements.plan(known.proposal)
        if proposal is None or proposal.name == plan.name:
            known.proposal = ""  # a caller deleted or activated it
            return None
        if known.proposed is None:
            if proposal.state in SEARCHING:
                return POLL_S
            known.proposed = await self._placements.capacity_of(known.proposal)
        if known.proposed != known.nodes:
            if known.proposed < known.nodes and self._are_suspect(name, known.nodes - known.proposed):
                return POLL_S  # after a takeover, nodes that were lost are SUSPECT for a lease
            await self._placements.withdraw(known.proposal)
            known.proposal = ""
            return None
        if proposal.state in SEARCHING:
            return POLL_S
        is_wanted = (
            policy.mode == cluster_pb2.REACTION_MODE_AUTOMATIC
            and proposal.state == plan_pb2.PLAN_STATE_READY
            and proposal.activation == plan_pb2.ACTIVATION_STATE_INACTIVE
            and not proposal.HasField("activate_time")  # it was activated, and then rolled back
        )
        if not is_wanted or not is_better(proposal, plan, known.nodes):
            return None  # it is left to an operator until the capacity changes
        if plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVATING:
            return POLL_S
        await self._placements.activate(proposal.name)
        return None

    def _take_change(self, name: str, known: _Cluster) -> None:
        if known.changed_s is not None:
            nodes = self._capacity(name)
            if nodes != known.nodes:
                known.nodes, known.since_s, known.is_settled = nodes, known.changed_s, False
            known.changed_s = None

    def _are_suspect(self, cluster: str, nodes: Iterable[str]) -> bool:
        found = self._fleet.presence_of(cluster)
        return all(found[node][0] == cluster_pb2.NODE_STATE_SUSPECT for node in nodes if node in found)

    def _capacity(self, cluster: str) -> frozenset[str]:
        found = self._fleet.presence_of(cluster)
        return frozenset(node for node, (state, drains) in found.items() if state not in _GONE and not drains)


def is_better(proposal: plan_pb2.Plan, plan: plan_pb2.Plan, nodes: Iterable[str]) -> bool:
    """Return whether a proposal serves more than ``nodes`` leave of the active plan.

    False if that is not known.

    Plans of the highest rate count with the rates that they keep.
    """
    if proposal.result.replicas_truncated or plan.result.replicas_truncated:
        return False
    served, left = served_rps(proposal.result), left_rps(plan.result, set(nodes))
    if proposal.result.unit == plan.result.unit:
        served, left = served * _kept_share(proposal.result), left * _kept_share(plan.result)
    return served > left * (1 + LEAST_GAIN)


def _kept_share(result: plan_pb2.PlanResult) -> float:
    """Return the share of a plan's saturated rate that it keeps within its limits; 1: not known."""
    served = served_rps(result)
    return result.value / served if result.unit == "requests/s" and served > 0.0 else 1.0


def served_rps(result: plan_pb2.PlanResult) -> float:
    """Return the rate in requests/s that a plan serves: by its unified replicas, and over its routes."""
    unified = sum(one.rate_rps for one in result.replicas if role_of(one) is Role.UNIFIED)
    return unified + sum(route.rate_rps for route in result.kv_routes)


def left_rps(result: plan_pb2.PlanResult, there: set[str]) -> float:
    """Return an upper bound on the rate that the nodes ``there`` can serve of a plan, as if KV could take any route."""
    left = dict.fromkeys(Role, 0.0)
    for replica in result.replicas:
        if there.issuperset(map(node_of, dense_devices_of(replica))):
            left[role_of(replica)] += replica.rate_rps
    return left[Role.UNIFIED] + min(left[Role.PREFILL], left[Role.DECODE])


def _nodes_of(plan: plan_pb2.Plan) -> frozenset[str]:
    return frozenset(node for replica in plan.result.replicas for node in nodes_of(replica))


def _reason(gone: Iterable[str], came: Iterable[str], patience_s: float) -> str:
    """Return the reason for a proposal as a human-readable sentence."""
    parts = [
        f"{_named(nodes)} {'is' if len(nodes) == 1 else 'are'} {what}"
        for nodes, what in ((sorted(gone), "gone"), (sorted(came), "available but not used by the plan in force"))
        if nodes
    ]
    return f"For {patience_s:g} s {' and '.join(parts)}."


def _named(nodes: list[str]) -> str:
    if len(nodes) <= MOST_NAMED:
        return ", ".join(nodes)
    return f"{', '.join(nodes[:MOST_NAMED])} and {len(nodes) - MOST_NAMED} more"
