"""Which replicas of a plan compute prompts for which others, and where they reach each other."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.runtime.replica.processes import node_of
from hetis.solver.plan import Plan, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSite:
    """A replica that computes prompts.

    Attributes:
        replica: its number in the plan.
        node: of its engine.
        is_near: every engine that asks it is on its node.
    """

    replica: int
    node: str
    is_near: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSites:
    """Of one replica: ``own``, where it computes prompts for others, or ``others``, where its are computed."""

    own: PromptSite | None = None
    others: tuple[PromptSite, ...] = ()

    def __bool__(self) -> bool:
        return self.own is not None or bool(self.others)


def prompt_sites(plan: Plan, replica: int) -> PromptSites:
    """Along the plan's routes; where it has none, every decode replica asks every prefill replica."""
    match plan.replicas[replica].role:
        case Role.PREFILL:
            return PromptSites(own=_site(plan, replica))
        case Role.DECODE:
            sending = {route.prefill for route in plan.kv_routes if route.decode == replica}
            prefilling = sorted(sending) or _of_role(plan, Role.PREFILL)
            return PromptSites(others=tuple(_site(plan, number) for number in prefilling))
    return PromptSites()


def _site(plan: Plan, replica: int) -> PromptSite:
    receiving = {route.decode for route in plan.kv_routes if route.prefill == replica}
    decoding = receiving or _of_role(plan, Role.DECODE)
    node = _engine_node(plan, replica)
    is_near = all(_engine_node(plan, number) == node for number in decoding)
    return PromptSite(replica=replica, node=node, is_near=is_near)


def _of_role(plan: Plan, role: Role) -> list[int]:
    return [number for number, replica in enumerate(plan.replicas) if replica.role is role]


def _engine_node(plan: Plan, replica: int) -> str:
    return node_of(plan.replicas[replica].stages[0].devices[0])
