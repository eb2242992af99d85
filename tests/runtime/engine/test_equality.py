"""The text is the same as if nothing had been split: every token as transformers' `generate` chooses it."""

from __future__ import annotations

from typing import Any

import pytest

from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, generate, local_devices
from hetis.runtime.engine.request import SamplingParams
from tests.runtime.checkpoints import Model, random_model, random_prompts
from tests.runtime.engine.pipelines import assert_empty, run_moving

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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_token_identical(name: str) -> None:
    model = random_model(**({"family": name} | FAMILIES[name]))
    prompts = random_prompts(1, 5)
    engine = engine_of(model)
    answers = generate(engine, prompts, SamplingParams(max_tokens=24))
    assert [answer.tokens for answer in answers] == [model.generate(prompt, 24) for prompt in prompts]


# r = 1, 2, 4, 5, 7, 8 query heads per KV head
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (8, 4), (8, 2), (10, 2), (14, 2), (16, 2)])
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
def test_heads_may_be_split_and_moved_while_tokens_flow(q_heads: int, kv_heads: int, devices: int) -> None:
    model = random_model("qwen2", q_heads=q_heads, kv_heads=kv_heads)
    prompts = random_prompts(2, 4)
    engine = engine_of(model, devices=devices)
    assert run_moving(engine, prompts, 20, seed=devices) == [model.generate(prompt, 20) for prompt in prompts]
    assert_empty(engine)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_float64_as_well(name: str) -> None:
    model = random_model(dtype="float64", **({"family": name} | FAMILIES[name]))
    prompts = random_prompts(3, 4)
    engine = engine_of(model, devices=3)
    assert run_moving(engine, prompts, 20, seed=1) == [model.generate(prompt, 20) for prompt in prompts]
    assert_empty(engine)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_what_our_own_unsplit_engine_gives(dtype: str) -> None:
    """The order of operations differs from transformers', which a random model amplifies: the oracle is ourselves."""
    model = random_model("qwen3", dtype=dtype)
    prompts = random_prompts(4, 5)
    unsplit = generate(engine_of(model), prompts, SamplingParams(max_tokens=30))
    assert run_moving(engine_of(model, devices=3), prompts, 30, seed=5) == [answer.tokens for answer in unsplit]


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("pages", [1, 2, 4])
def test_prompts_may_end_at_a_page_boundary(pages: int, more: int) -> None:
    model = random_model()
    [prompt] = random_prompts(pages, 1, shortest=16 * pages + more, longest=16 * pages + more)
    engine = engine_of(model, devices=2)
    assert run_moving(engine, [prompt], 18, seed=pages) == [model.generate(prompt, 18)]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 16, 17, 1000])
def test_prompts_may_be_prefilled_in_chunks_of_any_size(chunk_tokens: int) -> None:
    model = random_model("mistral", sliding_window=21)
    prompts = random_prompts(6, 4, longest=50)
    engine = engine_of(model, devices=3, chunk_tokens=chunk_tokens)
    assert run_moving(engine, prompts, 12, seed=3) == [model.generate(prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("devices", [1, 3])
def test_requests_that_make_room_for_others_end_the_same(devices: int) -> None:
    model = random_model()
    prompts = random_prompts(7, 8, shortest=20, longest=40)
    engine = engine_of(model, devices=devices, pages=54 // devices, growth_tokens=0)
    assert run_moving(engine, prompts, 40, seed=8) == [model.generate(prompt, 40) for prompt in prompts]
    assert engine.num_preempted > 0
    assert_empty(engine)
