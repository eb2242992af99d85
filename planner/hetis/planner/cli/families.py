"""The family of plans to search: ``--strategy hexgen``, ``--roles prefill,decode``; names come from the registry."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from hetis.solver.plan import Role

if TYPE_CHECKING:
    from hetis.planner.use_cases.sources import ReplicaLimits
    from hetis.solver.problem import EngineRules, EngineSettings

DEFAULT_STRATEGY = "hetis"
ALL_STRATEGIES = ALL_ENGINES = "all"


def strategy(text: str) -> str:
    """Parse the name of a strategy."""
    from hetis.formats.errors import did_you_mean
    from hetis.solver.placement.families import STRATEGIES

    if text not in STRATEGIES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(STRATEGIES)}{did_you_mean(text, STRATEGIES)}")
    return text


def engine(text: str) -> str:
    """Parse the name of an engine, or ``any``."""
    from hetis.formats.errors import did_you_mean
    from hetis.solver.placement.families import ANY_ENGINE, ENGINES

    known = [*ENGINES, ANY_ENGINE]
    if text not in known:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}{did_you_mean(text, known)}")
    return text


def weights(text: str) -> str:
    """Parse the precision of weights, which GPU types may have their own of."""
    from hetis.formats.dtypes import PRECISIONS

    return _precision(text, PRECISIONS)


def kv(text: str) -> str:
    """Parse the precision of KV, which GPU types may have their own of."""
    from hetis.formats.dtypes import KV_PRECISIONS

    return _precision(text, KV_PRECISIONS)


def mtp(text: str) -> str:
    """Parse drafted tokens and their acceptance."""
    from hetis.formats.model import drafts

    return _checked(text, drafts)


def _precision(text: str, known: Collection[str]) -> str:
    from hetis.formats.dtypes import chosen_precision

    return _checked(text, lambda text: chosen_precision(text, known))


def _checked(text: str, read: Callable[[str], object]) -> str:
    """Return a text that can be read."""
    try:
        read(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


@dataclass(frozen=True, slots=True)
class Engines:
    """Engines by name; a class of its own, because typer takes a tuple for several arguments."""

    names: tuple[str, ...]


def engines(text: str) -> Engines:
    """Parse names of engines separated by commas, each once; ``all`` for every one, with ``any``."""
    from hetis.solver.placement.families import ANY_ENGINE, ENGINES

    if text == ALL_ENGINES:
        return Engines((*ENGINES, ANY_ENGINE))
    return Engines(tuple(dict.fromkeys(engine(name.strip()) for name in text.split(","))))


def engine_rules(name: str | None, strategy: str, limits: ReplicaLimits) -> EngineRules | None:
    """Return the rules set by ``--engine`` and its limits. None: any engine, as for published heuristics by default."""
    from hetis.planner.use_cases.sources import engine_rules as rules_of
    from hetis.solver.errors import InvalidProblemError

    try:
        return rules_of(name, strategy, limits)
    except InvalidProblemError as error:
        raise typer.BadParameter(str(error)) from None


def rules_of_engines(asked: Engines | None, limits: ReplicaLimits) -> dict[str, EngineRules | None]:
    """Return rules by engine name, with the limits if they apply to it; only ``any`` unless engines were requested."""
    from hetis.planner.use_cases.sources import ReplicaLimits
    from hetis.solver.placement.families import ANY_ENGINE

    names = (ANY_ENGINE,) if asked is None else asked.names
    limited = [name for name in names if name != ANY_ENGINE or len(names) == 1]
    return {
        name: engine_rules(name, DEFAULT_STRATEGY, limits if name in limited else ReplicaLimits()) for name in names
    }


@dataclass(frozen=True, slots=True)
class Chunks:
    """Sizes of prefill chunks; a class of its own, because typer takes a tuple for several arguments."""

    sizes: tuple[int, ...]


def chunks(text: str) -> Chunks:
    """Parse sizes of prefill chunks separated by commas."""
    from hetis.solver.problem import MOST_CHUNKS, MOST_SETTING

    sizes = [size.strip() for size in text.split(",")]
    if len(sizes) > MOST_CHUNKS:
        raise typer.BadParameter(f"{len(sizes)} sizes are given, at most {MOST_CHUNKS} are tried")
    for size in sizes:
        if not (size.isascii() and size.isdigit() and len(size) < 20 and 1 <= int(size) <= MOST_SETTING):
            raise typer.BadParameter(f"{size[:40]!r} is not a whole number of tokens, 1 to {MOST_SETTING}")
    return Chunks(tuple(sorted(set(map(int, sizes)))))


def engine_settings(max_num_seqs: int | None, chunk_tokens: Chunks | None, kv_blocks: int | None) -> EngineSettings:
    """Return the settings that engines are started with, as options give them."""
    from hetis.solver.problem import EngineSettings

    return EngineSettings(
        max_num_seqs=max_num_seqs,
        chunk_tokens=() if chunk_tokens is None else chunk_tokens.sizes,
        kv_blocks=kv_blocks,
    )


@dataclass(frozen=True, slots=True)
class Strategies:
    """Strategies by name; a class of its own, because typer takes a tuple for several arguments."""

    names: tuple[str, ...]


def strategies(text: str) -> Strategies:
    """Parse names of strategies separated by commas, each once; ``all`` for every one."""
    from hetis.solver.placement.families import STRATEGIES

    names = [name.strip() for name in text.split(",")]
    if names == [ALL_STRATEGIES]:
        return Strategies(tuple(STRATEGIES))
    if ALL_STRATEGIES in names:
        raise typer.BadParameter(f"{text!r} has {ALL_STRATEGIES} beside others: give {ALL_STRATEGIES} alone, or names")
    return Strategies(tuple(dict.fromkeys(map(strategy, names))))


def roles(text: str) -> frozenset[Role]:
    """Parse roles separated by commas; prefill and decode replicas need one another."""
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
