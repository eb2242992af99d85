"""What engines run: for each the rules that its plans keep to, and where the rules come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hetis.solver.errors import InvalidProblemError
from hetis.solver.problem import EngineRules, Family

MAX_WORKERS = 8  # of a stage: with more, exchanging heads takes longer than their attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine that plans can be made for.

    Attributes:
        name: what ``--engine`` calls it.
        summary: for people, one phrase.
        max_pool: attention workers that a stage may have.
        version: the one that the rules were read from.
        source: where.
    """

    name: str
    summary: str
    max_pool: int
    version: str
    source: str


ANY_ENGINE, DEFAULT_ENGINE = "any", "vllm-hetis"
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm-hetis",
            summary="vLLM with the plugin of this project: attention workers",
            max_pool=MAX_WORKERS,
            version="0.32",
            source="docs/vllm.md; launch layouts of hetis-launch",
        ),
        Engine(
            name="vllm",
            summary="vLLM as it is: uneven pipelines of unlike GPUs",
            max_pool=0,
            version="0.32",
            source="VLLM_PP_LAYER_PARTITION; one tensor-parallel size; batch queue as deep as the pipeline",
        ),
        Engine(
            name="sglang",
            summary="SGLang as it is: uneven pipelines of unlike GPUs",
            max_pool=0,
            version="0.5",
            source="SGLANG_PP_LAYER_PARTITION; --tp-size and --pp-size of a server",
        ),
    )
}


def run_by(family: Family, rules: EngineRules | None) -> Family:
    """The replicas of a family that an engine runs; all of them where any engine will do.

    Raises:
        InvalidProblemError: there is no such engine.
    """
    if rules is None:
        return family
    if rules.name not in ENGINES:
        raise InvalidProblemError(f"engine {rules.name} is not one of {', '.join([*ENGINES, ANY_ENGINE])}")
    return replace(
        family, engine=rules, max_copies=1, max_pool=min(family.max_pool, ENGINES[rules.name].max_pool),
        in_flight=tuple(range(1, rules.max_stages + 1)),
    )  # fmt: skip
