"""Simulation of a plan on requests, in virtual time."""

from __future__ import annotations

import math

from hetis.simulator.building import Builder
from hetis.simulator.events import Events
from hetis.simulator.faults import Faults
from hetis.simulator.fleet import SimulatedFleet
from hetis.simulator.kv_transfers import KvTransfers
from hetis.simulator.request_log import RequestLog
from hetis.simulator.router import router_of
from hetis.simulator.series import Sampler
from hetis.simulator.values import Requests, Run, SaturatingSource, Settings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem


def simulate(plan: Plan, problem: PlacementProblem, requests: Requests, settings: Settings | None = None) -> Run:
    """Return the run of a plan on requests: a list or an endless stream of arrivals, or a saturating source.

    A pure function: the same arguments give the same run. It ends when every request is finished, or at
    ``settings.horizon_s``, which an endless stream needs.

    Raises:
        InvalidProblemError: the plan contradicts the problem, arrivals fall, or a fault names an unknown device.
    """
    settings = settings or Settings()
    log, events = RequestLog(), Events()
    builder = Builder(plan, problem, log, events, settings)
    fleet = SimulatedFleet(builder.replicas(), log, events, router_of(settings))
    if plan.kv_routes:
        fleet.transfers = KvTransfers(
            plan, problem, builder.fleet, fleet.replicas, log, events, fleet.route, builder.links,
            to_emptiest=settings.router == "fewest-tokens",
        )  # fmt: skip
    if not fleet.takers:
        raise InvalidProblemError("the plan has no replica that takes prompts")
    faults = Faults(fleet)
    for fault in settings.faults:
        if fault.device not in builder.fleet.devices:
            raise InvalidProblemError(f"fault at {fault.at_s} s: the cluster has no device {fault.device}")
        events.at(fault.at_s, faults.change, fault.device, fault.joins)
    sampler = None
    if settings.sample_every_s is not None:
        sampler = Sampler(fleet.replicas, events, settings.sample_every_s)
    if isinstance(requests, SaturatingSource):
        fleet.serve_all(requests)
    else:
        fleet.serve(iter(requests))
    end_s = events.run(math.inf if settings.horizon_s is None else settings.horizon_s)
    if events.is_empty:
        _check_all_is_given_back(fleet)
    return log.run(end_s, None if sampler is None else sampler.series(end_s))


def _check_all_is_given_back(fleet: SimulatedFleet) -> None:
    """Check that no request holds a block when nothing is left to happen; anything else is a bug of the simulator."""
    if fleet.held or any(replica.queue for replica in fleet.replicas):
        return  # some wait for devices that never return
    for replica in fleet.replicas:
        assert replica.outstanding == 0, f"replica {replica.number} still has {replica.outstanding} requests"
        assert replica.is_empty(), f"replica {replica.number} still holds KV blocks"
