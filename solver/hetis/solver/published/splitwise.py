"""`splitwise-paper`: pools of equal machines, as Splitwise (ISCA'24, arXiv 2311.18677) provisions them.

`docs/strategies.md` lists what is reconstructed. A machine is a TP group inside a node, or a pipeline of up to
`MAX_STAGES` groups of one size if one cannot hold the model. KV is sent from every prompt machine to every token
machine in equal shares, within a zone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from hetis.solver.placement.replicas.template import Template
from hetis.solver.plan import KvRoute, ReplicaPlan, Role
from hetis.solver.published.heuristic import Decisions, Search
from hetis.solver.published.replicas import Part

MAX_STAGES = 8  # TP groups per machine
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine: the GPUs of each machine in the zone, and its replica in each role that it can have."""

    members: tuple[Part, ...]
    replicas: Mapping[Role, Template]

    def rate(self, role: Role) -> float:
        return self.replicas[role].rate if role in self.replicas else 0.0


@dataclass(frozen=True, slots=True)
class Pools:
    """The kinds and sizes of the prompt and the token pool; the other machines of both kinds form the mixed pool."""

    prompt: Machine
    token: Machine
    num_prompt: int
    num_token: int

    def split_rate(self) -> float:
        """Return the requests/s through both pools."""
        return min(self.num_prompt * self.prompt.rate(Role.PREFILL), self.num_token * self.token.rate(Role.DECODE))

    def assigned(self) -> Iterator[tuple[Role, Machine, Part]]:
        """Yield role, kind and GPUs of every machine; remaining machines that cannot do both are idle."""
        chosen = self.prompt.members[: self.num_prompt]
        left = self.prompt.members[self.num_prompt :]
        is_same = self.prompt is self.token
        tokens = left if is_same else self.token.members
        rest = [] if is_same else [(self.prompt, gpus) for gpus in left]
        rest += [(self.token, gpus) for gpus in tokens[self.num_token :]]
        yield from ((Role.PREFILL, self.prompt, gpus) for gpus in chosen)
        yield from ((Role.DECODE, self.token, gpus) for gpus in tokens[: self.num_token])
        yield from ((Role.UNIFIED, kind, gpus) for kind, gpus in rest if Role.UNIFIED in kind.replicas)

    def rate(self) -> float:
        """Return the total requests/s."""
        mixed = sum(kind.rate(role) for role, kind, _ in self.assigned() if role is Role.UNIFIED)
        return self.split_rate() + mixed


def search_splitwise(search: Search) -> Decisions:
    """Return the plan that Splitwise's provisioning finds."""
    replicas, routes = list[ReplicaPlan](), list[KvRoute]()
    for zone in search.zones:
        pools = best_pools(machines(search, zone))
        search.tell(f"pools of zone {zone}")
        if pools is not None:
            tokens = len(replicas) + pools.num_prompt
            share = pools.split_rate() / (pools.num_prompt * pools.num_token)
            routes += (
                KvRoute(prefill=prefill, decode=decode, rate=share)
                for prefill in range(len(replicas), tokens)
                for decode in range(tokens, tokens + pools.num_token)
            )
            replicas += (search.on_gpus(kind.replicas[role], gpus) for role, kind, gpus in pools.assigned())
    return Decisions([] if search.budget.is_spent() else replicas, routes)


def machines(search: Search, zone: str) -> list[Machine]:
    """Return all kinds of machines that a zone's nodes can be cut into and that can prefill or decode."""
    found = list[Machine]()
    duties = {role: search.duty(role, zone) for role in search.costs.problem.family.roles}
    for rank, (device_class, tp) in enumerate(search.costs.ranks):
        by_node: dict[str, list[int]] = defaultdict(list)
        for gpu in search.gpus.of_zone(zone):
            if search.gpus.device_class[gpu] == device_class:
                by_node[search.gpus.nodes[gpu]].append(gpu)
        # The TP groups of this size that the nodes hold; a machine has consecutive ones.
        groups = [gpus[i : i + tp] for gpus in by_node.values() for i in range(0, len(gpus) - tp + 1, tp)]
        for stages in range(1, min(MAX_STAGES, len(groups)) + 1):
            if search.budget.is_spent():
                return []
            fitting = {role: search.replicas.at_best_setting((rank,) * stages, duty) for role, duty in duties.items()}
            replicas = {role: template for role, template in fitting.items() if template is not None}
            if Role.PREFILL in replicas or Role.DECODE in replicas:
                starts = range(0, len(groups) - stages + 1, stages)
                members = (tuple(chain.from_iterable(groups[i : i + stages])) for i in starts)
                found.append(Machine(tuple(members), replicas))
    return found


def best_pools(kinds: list[Machine]) -> Pools | None:
    """Return the pools with the highest rate, or None if no two machines can prefill and decode."""
    gpus = {id(kind): frozenset(gpu for member in kind.members for gpu in member) for kind in kinds}
    found: list[Pools] = []
    for prompt in kinds:
        for token in kinds:
            if prompt is not token and gpus[id(prompt)] & gpus[id(token)]:
                continue  # all GPUs of a pool's type are cut alike
            num_prompt, num_token = pool_sizes(
                prompt.rate(Role.PREFILL), token.rate(Role.DECODE), len(prompt.members), len(token.members),
                is_same=prompt is token,
            )  # fmt: skip
            if num_prompt and num_token:
                found.append(Pools(prompt, token, num_prompt, num_token))
    return max(found, key=Pools.rate, default=None)


def pool_sizes(
    prompt_rate: float, token_rate: float, most_prompt: int, most_token: int, *, is_same: bool
) -> tuple[int, int]:
    """Return the fewest prompt and token machines with the highest flow, or (0, 0) if none serve anything.

    Args:
        prompt_rate, token_rate: requests/s of one machine in each pool.
        most_prompt, most_token: available machines; the same ones if ``is_same``.
    """
    if prompt_rate <= 0.0 or token_rate <= 0.0:
        return 0, 0
    splits = [(p, most_prompt - p) for p in range(1, most_prompt)] if is_same else [(most_prompt, most_token)]
    flow = max((min(p * prompt_rate, t * token_rate) for p, t in splits), default=0.0)
    return math.ceil(flow / prompt_rate - ROUNDING), math.ceil(flow / token_rate - ROUNDING)
