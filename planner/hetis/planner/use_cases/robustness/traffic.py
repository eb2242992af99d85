"""The traffic of a plan at given rates of its replicas: unified ones, and prefill with decode ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from hetis.planner.use_cases.robustness.groups import Group
from hetis.planner.use_cases.robustness.routing import most_routed
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments


class Traffic:
    """The traffic of one problem, without its profiles."""

    def __init__(self, problem: PlacementProblem, moments: WorkloadMoments) -> None:
        self._problem, self._moments = problem, moments

    def served(self, rates: Sequence[tuple[Group, float]]) -> tuple[float, float]:
        """Return the saturated requests/s of the unified replicas, and of the others together, by groups' rates."""
        unified, hops = 0.0, defaultdict[tuple[str, str], float](float)
        prefill = defaultdict[tuple[str, tuple[str, ...]], float](float)
        decode = defaultdict[str, float](float)
        for group, rate in rates:
            match group.shape.role:
                case Role.PREFILL:
                    prefill[group.zones[0], group.kv_zones] += group.count * rate
                case Role.DECODE:
                    decode[group.zones[0]] += group.count * rate
                case _:
                    unified += group.count * rate
                    for pair in pairwise(group.zones):
                        hops[pair] += group.count * rate
        if not prefill:
            return unified, 0.0
        return unified, most_routed(prefill, decode, self._links({zone for zone, _ in prefill}, decode, hops))

    def _links(
        self, senders: Iterable[str], receivers: Iterable[str], hops: Mapping[tuple[str, str], float]
    ) -> dict[tuple[str, str], float]:
        """Return the requests/s whose KV the links between zones carry besides the hops of unified replicas."""
        model, moments, network = self._problem.model, self._moments, self._problem.cluster.network
        hop_bytes = (moments.mean_computed + moments.mean_output) * model.hidden * model.activation_bytes
        kv_bytes = model.prompt_kv_bytes(moments.mean_prompt)
        pairs = [(here, there) for here in senders for there in receivers if here != there]
        return {
            pair: max(0.0, network.zone_link(*pair).bytes_per_s - hops.get(pair, 0.0) * hop_bytes) / kv_bytes
            for pair in pairs
        }
