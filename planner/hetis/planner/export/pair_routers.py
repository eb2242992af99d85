"""Routers that send each request to a prefill and a decode replica: vLLM's router, or SGLang's.

There is one for each group of replicas that the plan's routes join, so that no pair is made across groups. Neither
router has weights. Decode replicas with equal rates take turns (`round_robin`). Before vLLM's others, and before its
prefill replicas if there are several, nginx picks by weight, since a decode replica learns from the prefill replica's
answer where the KV is. SGLang's router names the prefill replica itself: replicas with equal rates take turns, and
among others it balances by load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hetis.engines.versions import Engine
from hetis.planner.export.replicas import Launchable
from hetis.solver.plan import Role, joined_by

PORT, SIDE_PORT, METRICS_PORT = 30_000, 31_000, 29_000  # of the first router, and of nginx in front of its sides
VLLM_ROUTER, SGLANG_ROUTER = "vllm-router 0.1.17", "sglang-router 0.3.2"  # whose options are used, both from PyPI
KEY_VARIABLE = "OPENAI_API_KEY"  # vLLM's router sends it to the engines, in place of the client's
_STARTS_S = 1800  # until all engines of a group serve
_EVEN = 0.98  # least share of a group's rate that is served by turns


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGroup:
    """Replicas that the plan's routes join, with the requests/s of each by its position in the plan."""

    number: int
    prefill: Mapping[int, float]
    decode: Mapping[int, float]

    @property
    def name(self) -> str:
        return f"pairs-{self.number}"

    @property
    def rate(self) -> float:
        return sum(self.prefill.values())

    def sides(self) -> tuple[tuple[Role, Mapping[int, float]], ...]:
        return (Role.PREFILL, self.prefill), (Role.DECODE, self.decode)

    def side_name(self, role: Role) -> str:
        return f"{self.name}-{role.value}"

    def side_port(self, role: Role) -> int:
        return SIDE_PORT + 2 * self.number + (role is Role.DECODE)


def router_of(engine: Engine) -> str:
    """Return the distribution and version of the router of an engine's pairs."""
    return SGLANG_ROUTER if engine is Engine.SGLANG else VLLM_ROUTER


def pair_groups(launchable: Launchable) -> list[PairGroup]:
    """Return the groups of the replicas that can be launched, in the order of their first prefill replicas."""
    routes, found = launchable.routes(), list[PairGroup]()
    for members in joined_by(routes):
        prefill, decode = dict[int, float](), dict[int, float]()
        for route in routes:
            if route.prefill in members:
                prefill[route.prefill] = prefill.get(route.prefill, 0.0) + route.rate
                decode[route.decode] = decode.get(route.decode, 0.0) + route.rate
        found.append(PairGroup(number=len(found), prefill=prefill, decode=decode))
    return found


def is_even(rates: Mapping[int, float]) -> bool:
    """Return whether replicas that take turns serve all of their rates, but for a rounding."""
    return min(rates.values()) * len(rates) >= _EVEN * sum(rates.values())


def is_balanced(launchable: Launchable, role: Role, rates: Mapping[int, float]) -> bool:
    """Return whether nginx stands before a side of a group: before prefill it balances load, too."""
    return launchable.engine is not Engine.SGLANG and (len(rates) > 1 if role is Role.PREFILL else not is_even(rates))


def balanced_sides(launchable: Launchable) -> Iterator[tuple[PairGroup, Role, Mapping[int, float]]]:
    """Yield the sides of groups before which nginx stands."""
    for group in pair_groups(launchable):
        yield from ((group, *side) for side in group.sides() if is_balanced(launchable, *side))


def unweighted(launchable: Launchable) -> Iterator[str]:
    """Yield a sentence for each side of a group whose router balances by load in place of the plan's shares."""
    for group in pair_groups(launchable) if launchable.engine is Engine.SGLANG else ():
        for role, rates in group.sides():
            if not is_even(rates):
                names = ", ".join(launchable.replicas[number].name for number in rates)
                yield f"shares of {names} ({role.value}): SGLang's router has no weights and balances by load"


def router_words(
    launchable: Launchable, group: PairGroup, endpoints: Mapping[int, str], *, host: str, port: int = 0,
    metrics_port: int = 0, sides: str = "127.0.0.1",
) -> list[str]:  # fmt: skip
    """Return the command line of a group's router.

    Args:
        launchable: the plan's replicas.
        group: those of the router.
        endpoints: where they serve HTTP, by position in the plan.
        host: where the router listens.
        port, metrics_port: its ports; 0: those of its number.
        sides: host at which nginx stands before `balanced_sides`.
    """
    is_sglang = launchable.engine is Engine.SGLANG
    start = ["python3", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    words = start if is_sglang else ["vllm-router", "--vllm-pd-disaggregation"]
    words += ["--host", host, "--port", str(port or PORT + group.number)]
    words += ["--prometheus-port", str(metrics_port or METRICS_PORT + group.number)]
    words += ["--worker-startup-timeout-secs", str(_STARTS_S), "--worker-startup-check-interval", "5"]
    words += ["--policy", "round_robin"]
    for role, rates in group.sides():
        if is_balanced(launchable, role, rates):
            words += [f"--{role.value}", f"http://{sides}:{group.side_port(role)}"]
            continue
        if not is_even(rates):
            words += [f"--{role.value}-policy", "power_of_two"]
        for number in rates:
            words += [f"--{role.value}", f"http://{endpoints[number]}"]
            if is_sglang and role is Role.PREFILL:
                words.append(str(launchable.replicas[number].addresses.kv_port))
    return words


def entry_points(
    launchable: Launchable, endpoints: Mapping[int, str], routers: Sequence[str], name: str = "", *, held: bool = False
) -> dict[str, float]:
    """Return where whole requests are sent, with the requests/s of each: unified replicas, and routers of pairs.

    If a class of requests is named, they are where its requests are sent, with weights in place of requests/s.
    ``routers``: the endpoints of the groups' routers; empty: the target pairs replicas itself at their ``endpoints``.
    With ``held``, they have the most requests that they get while others hold fewer, in place of requests/s; of all
    requests, those of the class that is named.
    """
    found, plan = dict[str, float](), launchable.plan

    def add(at: str, rate: float, number: int, *others: int) -> None:
        classes = plan.replicas[number].classes
        if rate <= 0 or (name and classes and name not in classes):
            return
        value = rate / (plan.pool_share(classes) if name else 1.0)
        if held:
            members = [launchable.replicas[each] for each in (number, *others)]
            value = sum(each.plan.most_held * each.copies for each in members)
            value *= plan.class_shares()[name] if name and not classes else 1.0
        found[at] = found.get(at, 0.0) + value

    for number, one in launchable.replicas.items():
        if one.plan.role is Role.UNIFIED:
            add(endpoints[number], one.plan.rate, number)
    if routers:
        for at, group in zip(routers, pair_groups(launchable), strict=True):
            add(at, group.rate, *group.prefill, *group.decode)
    else:
        for route in launchable.routes():
            add(endpoints[route.prefill], route.rate, route.prefill, route.decode)
    return found
