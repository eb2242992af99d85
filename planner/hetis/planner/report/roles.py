"""Prefill and decode replicas, and the routes of prompts' KV between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from hetis.planner.report.figures import digits, percent, plural
from hetis.planner.use_cases.devices import number_ranges
from hetis.planner.use_cases.grouping import ReplicaGroup
from hetis.solver.plan import Plan, Role

MAX_NUMBERS = 24  # characters for the numbers of equal replicas
MAX_ROUTES = 12  # pairs of replica shapes; the rest is summarised in a line


def count_by_role(plan: Plan) -> str:
    """Return ``1 prefill, 2 decode``; empty if every replica is unified."""
    counts = {role: sum(one.role is role for one in plan.replicas) for role in Role}
    if counts[Role.UNIFIED] == len(plan.replicas):
        return ""
    return ", ".join(f"{count:,} {role}" for role, count in counts.items() if count)


def rates_by_role(plan: Plan) -> str:
    """Return the possible rates of both sides and the routed rate, in saturated requests/s."""
    rates = {role: sum(one.rate for one in plan.replicas if one.role is role) for role in Role}
    routed = sum(route.rate for route in plan.kv_routes)
    text = f"prefill {digits(rates[Role.PREFILL])}, decode {digits(rates[Role.DECODE])}, routed {digits(routed)}"
    return f"{text}, unified {digits(rates[Role.UNIFIED])}" if rates[Role.UNIFIED] else text


def route_table(plan: Plan, groups: Sequence[ReplicaGroup]) -> Table:
    """Return routes between replicas of equal shape, one row each, the largest first."""
    group_of = {number: i for i, group in enumerate(groups) for number in group.numbers}
    rates: defaultdict[tuple[int, int], float] = defaultdict(float)
    for route in plan.kv_routes:
        rates[group_of[route.prefill], group_of[route.decode]] += route.rate
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("prefill", overflow="fold")
    table.add_column("decode", overflow="fold")
    for name in ("requests/s", "of prefill", "of decode"):
        table.add_column(name, justify="right")
    pairs = sorted(rates, key=lambda pair: -rates[pair])
    for pair in pairs[:MAX_ROUTES]:
        sender, receiver = (groups[i] for i in pair)
        shares = (percent(rates[pair] / group.rate) if group.rate else "" for group in (sender, receiver))
        table.add_row(_named(sender), _named(receiver), digits(rates[pair], 4), *shares)
    rest = pairs[MAX_ROUTES:]
    if rest:
        table.add_row(f"… {plural(len(rest), 'more pair')}", "", digits(sum(rates[pair] for pair in rest)), "", "")
    return table


def _named(group: ReplicaGroup) -> str:
    gpus = ", ".join(dict.fromkeys(stage.gpu for stage in group.first.stages))
    numbers = number_ranges(group.numbers).strip("[]")
    if len(numbers) > MAX_NUMBERS:
        numbers = f"{numbers[:MAX_NUMBERS].rpartition(',')[0]},… ({len(group.numbers):,})"
    return f"{'replica' if len(group.numbers) == 1 else 'replicas'} {numbers} ({gpus})"
