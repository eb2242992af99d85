"""The rungs of a plan: what the best plan of each reaches, and what the next rung would buy and cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.report.figures import digits, percent, plural, with_unit
from hetis.planner.report.tables import as_group, narrowing, section
from hetis.planner.use_cases.record.forms import RungFound
from hetis.planner.use_cases.record.parts import Requested, Rungs, Surviving
from hetis.solver.placement.rungs import RUNGS
from hetis.solver.plan import Plan

FEW = 3  # targets that are named
LITTLE_LEFT = 0.5  # share below which what a loss leaves is red


def rung_section(plan: Plan) -> RenderableType | None:
    """Return a line for each rung, and one on the next; None: rungs were not climbed."""
    found = Rungs.of(plan).found
    if not any(one.is_chosen for one in found):
        return None
    return section("Rungs of complexity", _lines(found, plan))


@as_group
def _lines(found: Sequence[RungFound], plan: Plan) -> Iterator[RenderableType]:
    heads = ("<rung", "requests/s", "USD/h", "GPUs", "left after a loss", "shapes", "'carried by")
    yield narrowing(*heads, rows=[_row(one, found) for one in found], least=("shapes", "USD/h", "carried by"))
    if (words := next_rung(found, plan)) is not None:
        yield Text(words)


def _row(one: RungFound, found: Sequence[RungFound]) -> list[RenderableType]:
    name = Text(f"{'▸' if one.is_chosen else ' '} {one.name}", style="bold" if one.is_chosen else "")
    if (words := _nothing_new(one, found)) is not None:
        return [name, Text(words, style="dim"), "", "", "", "", ""]
    assert one.rate_rps is not None, "it has a plan"
    share = left_share(one)
    left = Text(percent(share), style="red" if share < LITTLE_LEFT else "")
    usd = "unknown" if one.usd_per_hour is None else digits(one.usd_per_hour)
    return [name, digits(one.rate_rps, 4), usd, f"{one.gpus:,}", left, f"{one.shapes:,}", _targets(one)]


def _nothing_new(one: RungFound, found: Sequence[RungFound]) -> str | None:
    """Return why a rung has no plan of its own; None: it has."""
    if one.value is None:
        return "none"
    lower = next((other for other in found if other.name == one.of), one)
    return None if lower is one or lower.value is None else "the same"


def _targets(one: RungFound) -> str:
    if one.targets is None:
        return "unknown"
    if not one.targets:
        return "no export"
    named = ", ".join(one.targets[:FEW])
    rest = len(one.targets) - FEW
    return named if rest <= 0 else f"{plural(len(one.targets), 'export')}"


def left_share(one: RungFound) -> float:
    """Return the share of its rate that a rung's plan keeps without the worst node."""
    return (one.left_rps or 0.0) / one.rate_rps if one.rate_rps else 0.0


def next_rung(found: Sequence[RungFound], plan: Plan) -> str | None:
    """Return what the next rung with a better plan would buy and cost; None: there is none."""
    names = [one.name for one in found]
    mine = next(one for one in found if one.is_chosen)
    above = (one for one in found[names.index(mine.name) + 1 :] if one.value is not None and one.of == one.name)
    other = next((one for one in above), None)
    if other is None or other.value is None or mine.value is None:
        return None
    rung, unit = RUNGS[other.name], plan.result.unit
    if plan.objective.maximises:
        gain = f"{other.value / mine.value - 1.0:+.1%} {unit}"
    else:
        gain = f"{with_unit(other.value, unit)} instead of {digits(mine.value, 4)}"
    over = f" over up to {plural(other.nodes, 'node')} each" if other.nodes and other.nodes > 1 else ""
    left = f"left after a loss {percent(left_share(mine))} -> {percent(left_share(other))}"
    return f"--rung {other.name}: {gain} with {rung.summary}{over}; {left}; needs {rung.needs}"


def survival_words(plan: Plan) -> str | None:
    """Return what is left after the loss that a plan had to survive, with the bound; None: there was none."""
    found, place = Surviving.of(plan), Requested.of(plan).survive
    if found.left_rps is None:
        return None
    left = f"{digits(found.left_rps, 4)} requests/s are left after losing any one {place}"
    if found.bound_rps is not None:
        return f"{left}; no plan leaves more than {digits(found.bound_rps, 4)}"
    return left if found.keep is None else f"{left}, at least {percent(found.keep)} of all"
