"""Which family of plans to search: ``--strategy hexgen``, ``--roles prefill,decode``; names come from the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from hetis.solver.plan import Role

if TYPE_CHECKING:
    from hetis.solver.problem import EngineRules

ALL_STRATEGIES = "all"


def strategy(text: str) -> str:
    """The name of a strategy."""
    from hetis.formats.errors import did_you_mean
    from hetis.solver.placement.strategies import STRATEGIES

    if text not in STRATEGIES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(STRATEGIES)}{did_you_mean(text, STRATEGIES)}")
    return text


def engine(text: str) -> str:
    """The name of an engine, or ``any``."""
    from hetis.formats.errors import did_you_mean
    from hetis.solver.placement.engines import ANY_ENGINE, ENGINES

    known = [*ENGINES, ANY_ENGINE]
    if text not in known:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}{did_you_mean(text, known)}")
    return text


def engine_rules(name: str | None, strategy: str, max_stages: int | None, max_gpus: int | None) -> EngineRules | None:
    """What ``--engine`` and its limits ask for; None: any engine will do, as for published heuristics by default."""
    from hetis.planner.use_cases.sources import engine_rules as rules_of
    from hetis.solver.errors import InvalidProblemError

    try:
        return rules_of(name, strategy, max_stages=max_stages, max_gpus=max_gpus)
    except InvalidProblemError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, slots=True)
class Strategies:
    """Strategies by name; a class of its own, for typer takes a tuple for several arguments."""

    names: tuple[str, ...]


def strategies(text: str) -> Strategies:
    """Names of strategies with commas between them, each once; ``all`` for every one."""
    from hetis.solver.placement.strategies import STRATEGIES

    names = [name.strip() for name in text.split(",")]
    if names == [ALL_STRATEGIES]:
        return Strategies(tuple(STRATEGIES))
    if ALL_STRATEGIES in names:
        raise typer.BadParameter(f"{text!r} has {ALL_STRATEGIES} beside others: give {ALL_STRATEGIES} alone, or names")
    return Strategies(tuple(dict.fromkeys(map(strategy, names))))


def roles(text: str) -> frozenset[Role]:
    """Roles with commas between them; prefill and decode replicas need one another."""
    from hetis.formats.errors import did_you_mean

    known, names = [role.value for role in Role], [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    found = frozenset(map(Role, names))
    if (Role.PREFILL in found) != (Role.DECODE in found):
        alone, missing = (Role.PREFILL, Role.DECODE) if Role.PREFILL in found else (Role.DECODE, Role.PREFILL)
        raise typer.BadParameter(f"{text!r} has {alone} replicas without {missing} replicas, which they need")
    return found
