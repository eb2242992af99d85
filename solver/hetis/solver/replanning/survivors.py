"""Running replicas on the fleet as it is now: how each may continue, the worth of staying, the GPUs they leave free."""

from __future__ import annotations

from hetis.solver.budget import Budget
from hetis.solver.placement.tables import CostTables
from hetis.solver.placement.template import Template
from hetis.solver.replanning.change import Fate
from hetis.solver.replanning.columns import Candidate, NetMaster
from hetis.solver.replanning.fresh import search_left_over
from hetis.solver.replanning.holdings import in_flight
from hetis.solver.replanning.inventory import inventory_of
from hetis.solver.replanning.problem import HALF_DONE, ReplanningProblem
from hetis.solver.replanning.running import Continuations, places_of


class Survivors:
    """The replicas of a running plan.

    Attributes:
        places: every GPU that is there now.
        templates: each running replica as it runs; None: it lost GPUs.
        candidates: every way in which one may continue.
        stay_rates, stay_shares: requests/s over the horizon that are not lost if one stays, and as a share of its rate.
        keepable: those that may continue unchanged.
    """

    def __init__(self, posed: ReplanningProblem, costs: CostTables) -> None:
        self.posed, self.costs = posed, costs
        self.places = places_of(posed.problem.cluster, costs)
        self.continuations = Continuations(costs, self.places, posed.costs)
        replicas = posed.running.replicas
        self.templates = [self.continuations.template_now(replica) for replica in replicas]
        self.options = [o for i, replica in enumerate(replicas) for o in self.continuations.options(i, replica)]
        self.candidates = [Candidate(template=o.template, option=o, start_s=o.start_s) for o in self.options]
        horizon_s = posed.costs.horizon_s
        whole = {i: template for i, template in enumerate(self.templates) if template is not None}
        self.stay_rates = {i: HALF_DONE * in_flight(replicas[i]) / horizon_s for i in whole}
        self.stay_shares = {i: min(1.0, self.stay_rates[i] / template.rate) for i, template in whole.items()}
        self.keepable = {option.old for option in self.options if option.fate is Fate.KEPT}

    def master(self, demand: float | None) -> NetMaster:
        stays = {old: self.stay_rates[old] for old in self.keepable} if demand is None else {}
        inventory = inventory_of(self.costs, self.places, self.options, stays, self.posed.max_moves)
        return NetMaster(inventory, self.posed.costs, demand, stays, self.stay_shares)

    def all_dropped(self, net: NetMaster) -> float:
        """Return the loss if no running replica is kept: the requests in flight on all that are whole, in net's unit.

        The master counts what keeping gains relative to that loss; results state what dropping loses.
        """
        if net.master.maximises:
            return sum(self.stay_rates.values())
        rent = {i: net.rent_of([(Candidate(template=t), 1)]) for i, t in enumerate(self.templates) if t is not None}
        return sum(share * rent[i] for i, share in self.stay_shares.items())

    def left_over(
        self, strategy: str, budget: Budget, gap_target: float, seed: int, threads: int
    ) -> tuple[Template, ...]:  # fmt: skip
        """Return new replicas to add to all whole running ones; none if these serve the whole demand already."""
        stay: dict[int, Candidate] = {}
        for candidate in self.candidates:
            option = candidate.option
            assert option is not None
            better = option.old not in stay or candidate.template.rate > stay[option.old].template.rate
            if option.fate is not Fate.CHANGED and better:
                stay[option.old] = candidate
        if not stay or self.posed.max_moves == 0:
            return ()
        taken = {name for c in stay.values() if c.option is not None for name in c.option.named()}
        problem, demand_rps = self.posed.problem, None
        if not problem.objective.maximises:
            served = sum(c.template.rate for c in stay.values()) * problem.assumptions.planned_utilisation
            assert problem.objective.demand_rps is not None
            demand_rps = problem.objective.demand_rps - served
            if demand_rps <= 0.0:
                return ()
        return search_left_over(
            self.costs, taken, demand_rps, strategy=strategy, budget=budget, gap_target=gap_target, seed=seed,
            threads=threads,
        )  # fmt: skip
