"""Engines of several stages, ranks and copies in this process, and what keeps their heads moving."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.model.config import read_config
from hetis.runtime.model.decoder import Decoder
from hetis.runtime.model.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stage: the layer after its last, ranks, attention workers, copies, and KV pages of each device."""

    until: int
    ranks: int = 1
    workers: int = 0
    copies: int = 1
    pages: int = 400


@cache
def decoder_of(folder: Path, layers: range, rank: int, ranks: int) -> Decoder:
    return Decoder.from_folder(folder, layers=layers, shard=Shard(rank=rank, size=ranks))


def stages_of(folder: Path, parts: Sequence[Part]) -> list[Stage]:
    """The stages of a pipeline, each from the layer where the one before ends."""
    config, stages, first = read_config(folder), [], 0
    for number, part in enumerate(parts):
        layers = range(first, part.until)
        shape = kv_shape(config, layers, page_tokens=16, dtype=config.dtype, ranks=part.ranks)
        for copy in range(part.copies):
            names = [f"s{number}c{copy}d{i}" for i in range(part.ranks + part.workers)]
            decoders = [decoder_of(folder, layers, rank, part.ranks) for rank in range(part.ranks)]
            stages.append(Stage(decoders, [LocalDevice(name, shape, part.pages) for name in names]))
        first = part.until
    return stages


def pipeline_of(folder: Path, *parts: Part, overlaps: bool = False, **options: int) -> Engine:
    own = EngineOptions(**({"chunk_tokens": 48} | options))
    return Engine(read_config(folder), stages_of(folder, parts), options=own, overlaps=overlaps)


def run_moving(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, *, seed: int, often: float = 0.3
) -> list[list[int]]:
    """Answers of an engine whose heads are moved at random, on every stage, while tokens flow."""
    chooser = random.Random(seed)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=tokens)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for news in engine.step():
            if news.token is not None:
                answers[news.request].append(news.token)
        for request in list(engine.running.values()):
            for number, heads in list(request.heads.items()):
                head, target = chooser.randrange(len(heads)), chooser.randrange(engine.stages[number].num_devices)
                if chooser.random() < often and heads[head] != target:
                    engine.move(request.number, [head], target, stage=number)
    return [answers[number] for number in numbers]


def assert_empty(engine: Engine) -> None:
    """Nothing is left of requests that ended, on any stage."""
    for part in engine.stages:
        part.placement.check_invariants()
        assert len(part.placement) == 0
        assert isinstance(part.stage, Stage)
        assert part.stage.prompts == ()
        for device in part.stage.devices:
            assert isinstance(device, LocalDevice)
            device.pool.check_invariants()
            assert device.pool.free_pages == device.num_pages
