"""Families of plans, restricted by strategies and engines, so that all share the master, the bound and the checker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hetis.solver.constraints import Constraint, Constraints, Exclude, WithoutTp
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Role


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy: its name, one sentence for people, and how it restricts a family.

    ``shapes`` are fields of `Family`. The sizes tried (TP, micro-batches, chunks, limits on copies and attention
    workers) are the family's.
    """

    name: str
    summary: str
    shapes: Mapping[str, Any]
    is_published: bool = False  # whether it is a heuristic of `hetis.solver.published` instead of a search with a proof

    def restrict(self, family: Family) -> Family:
        """Return the replicas of a family that have the shapes of the strategy."""
        return replace(family, name=self.name, **self.shapes)


_ANY_SHAPE = {"mixed_types": True, "uneven_layers": True}
_PIPELINES = {**_ANY_SHAPE, "attention_dp": ()}
_AS_PUBLISHED = {"engine": None, "in_flight": Family().in_flight}  # heuristics know no engine's rules
_UNIFIED, _APART = {"roles": (Role.UNIFIED,)}, {"roles": (Role.PREFILL, Role.DECODE), "one_type_per_role": False}
_WITHOUT_WORKERS, _ONE_TYPE = {"max_pool": 0}, {"mixed_types": False}
_HEXGEN, _HEXGEN2 = _PIPELINES | _UNIFIED | _WITHOUT_WORKERS, _PIPELINES | _APART | _WITHOUT_WORKERS
STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "hetis",
            "every shape: mixed types, uneven layers, attention workers; prefill and decode apart or not",
            _ANY_SHAPE | {"one_type_per_role": False},
        ),
        Strategy(
            "uniform",
            "what engines do today: one GPU type per replica, equal layers",
            {"mixed_types": False, "uneven_layers": False} | _UNIFIED | _WITHOUT_WORKERS,
        ),
        Strategy("hexgen", "asymmetric TP x PP with uneven layers, no attention workers", _HEXGEN),
        Strategy("hexgen2", "the same for replicas that prefill and replicas that decode, never both", _HEXGEN2),
        Strategy(
            "splitwise",
            "prefill replicas of one GPU type, decode replicas of one",
            _HEXGEN2 | _ONE_TYPE | {"one_type_per_role": True},
        ),
        Strategy(  # without unified replicas there is no mixed pool; each zone has pools, with its own types
            "splitwise-paper",
            "Splitwise's own search: prompt, token, mixed pool",
            _PIPELINES | _WITHOUT_WORKERS | _ONE_TYPE | {"one_type_per_role": False} | _AS_PUBLISHED,
            True,
        ),
        Strategy("hexgen-paper", "HexGen's own heuristic: genetic search over groups", _HEXGEN | _AS_PUBLISHED, True),
        Strategy(
            "hexgen2-paper", "HexGen-2's own heuristic: partition, maximum flow, swaps", _HEXGEN2 | _AS_PUBLISHED, True
        ),
        Strategy(
            "hetis-paper",
            "Hetis's own heuristic: 5% rule, workers shared by a replica",
            _PIPELINES | _UNIFIED | _AS_PUBLISHED,
            True,
        ),
    )
}


def constraints_ignored(strategy: str, constraints: Constraints) -> tuple[Constraint, ...]:
    """Return the constraints that a strategy ignores: published heuristics consider a fleet and TP sizes alone."""
    if not STRATEGIES[strategy].is_published:
        return ()
    return tuple(each for each in constraints if not isinstance(each, Exclude | WithoutTp))


# --- engines


MAX_WORKERS = 8  # limit per stage: with more, exchanging heads takes longer than their attention


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEngine:
    """An engine for which plans can be made.

    Attributes:
        name: the value of ``--engine``.
        summary: one phrase for people.
        max_pool: the most attention workers of a stage.
        version: the engine's version whose rules these are.
        source: the document or setting that states the rules.
    """

    name: str
    summary: str
    max_pool: int
    version: str
    source: str


DEFAULT_ENGINE = "vllm-hetis"
ENGINES: Mapping[str, KnownEngine] = {
    engine.name: engine
    for engine in (
        KnownEngine(
            name="vllm-hetis", version="0.32", max_pool=MAX_WORKERS,
            summary="vLLM with the plugin of this project: attention workers",
            source="docs/vllm.md; launch layouts of hetis-launch",
        ),
        KnownEngine(
            name="vllm", version="0.32", max_pool=0,
            summary="vLLM as it is: uneven pipelines of unlike GPUs",
            source="VLLM_PP_LAYER_PARTITION; one tensor-parallel size; batch queue as deep as the pipeline",
        ),
        KnownEngine(
            name="sglang", version="0.5", max_pool=0,
            summary="SGLang as it is: uneven pipelines of unlike GPUs",
            source="SGLANG_PP_LAYER_PARTITION; --tp-size and --pp-size of a server",
        ),
    )
}  # fmt: skip


def run_by(family: Family, rules: EngineRules) -> Family:
    """Return the replicas of a family that an engine can run.

    Raises:
        InvalidProblemError: there is no such engine.
    """
    if rules.name not in ENGINES:
        raise InvalidProblemError(f"engine {rules.name} is not one of {', '.join(ENGINES)}")
    return replace(
        family, engine=rules, max_pool=min(family.max_pool, ENGINES[rules.name].max_pool),
        in_flight=tuple(range(1, rules.max_stages + 1)),
    )  # fmt: skip
