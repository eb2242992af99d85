"""The text is the same as if nothing had been split: every token as transformers' `generate` chooses it."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Case(NamedTuple):
    """A cell of the matrix of families, group sizes, devices and precisions."""

    family: str
    q_heads: int
    kv_heads: int
    devices: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.family}-r{self.q_heads // self.kv_heads}-{self.devices}-{self.dtype}"

    def check(self) -> None:
        """Heads move at random while tokens flow, of prompts in chunks, where not all requests have room at a time."""
        own = FAMILIES[self.family] | {"q_heads": self.q_heads, "kv_heads": self.kv_heads, "dtype": self.dtype}
        model = random_model(**({"family": self.family} | own))
        prompts = random_prompts(2, 4, shortest=15)
        pages = max(6, 14 * self.kv_heads // self.devices)  # room for about three of them, and for one in any case
        engine = engine_of(model, devices=self.devices, pages=pages, chunk_tokens=19, growth_tokens=0)
        answers = run_moving(engine, prompts, 20, seed=self.devices)
        assert answers == [model.generate(prompt, 20) for prompt in prompts]
        assert_empty(engine)


# (query heads, KV heads): r = 1, 2, 4, 5, 7, 8 query heads per KV head. OPT has no grouped heads.
GROUPS = ((4, 4), (8, 4), (8, 2), (10, 2), (14, 2), (16, 2))
DEVICES, DTYPES = (1, 2, 3, 5), ("float32", "float64")
MATRIX = [
    Case(family, *heads, devices, dtype)
    for family in FAMILIES
    for heads in (GROUPS if family != "opt" else GROUPS[:1])
    for devices in DEVICES
    for dtype in DTYPES
]
# Of every family and group size one cell, each with the next devices and precision; `make soak` takes them all.
PER_HEADS = len(DEVICES) * len(DTYPES)
SOME = [case for i, case in enumerate(MATRIX) if i % PER_HEADS == 3 * (i // PER_HEADS) % PER_HEADS]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_heads_may_be_split_and_moved_while_tokens_flow(case: Case) -> None:
    case.check()


@pytest.mark.soak
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_the_whole_matrix_is_token_identical(case: Case) -> None:
    case.check()


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
