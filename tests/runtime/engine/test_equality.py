"""The text is the same as if nothing had been split: every token as transformers' `generate` chooses it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, generate, local_devices
from hetis.runtime.engine.request import SamplingParams
from tests.runtime.checkpoints import Model, random_model, random_prompts

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_tied": {"family": "llama", "tie_word_embeddings": True},
    "llama_bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "mistral_window": {"family": "mistral", "sliding_window": 21},
    "qwen2": {},
    "qwen3": {},
    "opt": {"kv_heads": 8},
}


def engine_of(model: Model, *, devices: int = 1, pages: int = 400, **options: Any) -> Engine:
    own = EngineOptions(**({"chunk_tokens": 48} | options))
    return engine_from_folder(model.folder, local_devices([pages] * devices), options=own)


def run_moving(engine: Engine, prompts: list[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """Answers of an engine whose heads are moved at random while tokens flow."""
    chooser = random.Random(seed)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=tokens)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for news in engine.step():
            if news.token is not None:
                answers[news.request].append(news.token)
        for request in list(engine.running.values()):
            head, target = chooser.randrange(len(request.heads)), chooser.randrange(len(engine.stage.devices))
            if chooser.random() < 0.3 and request.heads[head] != target:
                engine.move(request.number, [head], target)
    return [answers[number] for number in numbers]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_token_identical(name: str) -> None:
    model = random_model(**({"family": name} | FAMILIES[name]))
    prompts = random_prompts(1, 5)
    engine = engine_of(model)
    answers = generate(engine, prompts, SamplingParams(max_tokens=24))
    assert [answer.tokens for answer in answers] == [model.generate(prompt, 24) for prompt in prompts]
