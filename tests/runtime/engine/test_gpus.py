"""Where tensors are: stages on GPUs that are none, and, where there is one, on a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.engine.step import Chunk, Step
from hetis.runtime.model.config import read_config
from hetis.runtime.model.decoder import Decoder
from hetis.runtime.model.shard import Shard
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.engine.pipelines import run_moving
from tests.runtime.fake_gpus import FakeGpus


def stage_on(folder: Path, layers: range, ranks: tuple[str, ...], others: tuple[str, ...] = ()) -> Stage:
    """A stage whose ranks and other devices are where the texts say."""
    config = read_config(folder)
    shape = kv_shape(config, layers, page_tokens=16, dtype=config.dtype, ranks=len(ranks))
    shards = [Shard(rank=rank, size=len(ranks)) for rank in range(len(ranks))]
    decoders = [
        Decoder.from_folder(folder, layers=layers, shard=shard, device=device)
        for shard, device in zip(shards, ranks, strict=True)
    ]
    names = [f"l{layers.start}d{number}" for number in range(len(ranks) + len(others))]
    devices = [
        LocalDevice(name, shape, 400, device=device) for name, device in zip(names, (*ranks, *others), strict=True)
    ]
    return Stage(decoders, devices)


def engine_of(folder: Path, *stages: Stage) -> Engine:
    return Engine(read_config(folder), stages, options=EngineOptions(chunk_tokens=48))


FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 21},
    "qwen3": {"attention_bias": True},
    "opt": {"kv_heads": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_on_gpus_and_heads_on_others_never_mix_devices_and_answer_the_same(family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    prompts = random_prompts(1, 4)
    with FakeGpus(4):
        first = stage_on(model.folder, range(2), ("cuda:0", "cuda:1"), ("cuda:2", "cpu"))
        last = stage_on(model.folder, range(2, 3), ("cuda:3",), ("cuda:2",))
        answers = run_moving(engine_of(model.folder, first, last), prompts, 12, seed=3)
    assert answers == [model.generate(prompt, 12) for prompt in prompts]


def test_tokens_are_drawn_from_logits_on_a_gpu_as_from_others() -> None:
    model = random_model()
    prompts = random_prompts(2, 3)
    params = SamplingParams(max_tokens=8, temperature=0.8, top_k=20, top_p=0.9, seed=5, logprobs=3)
    wanted = generate(engine_of(model.folder, stage_on(model.folder, range(3), ("cpu",))), prompts, params)
    with FakeGpus(1):
        found = generate(engine_of(model.folder, stage_on(model.folder, range(3), ("cuda:0",))), prompts, params)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]


@pytest.mark.parametrize("others", [(), ("cuda:1",)])
def test_indices_go_to_a_gpu_once_per_step_however_many_layers_there_are(others: tuple[str, ...]) -> None:
    def copies(layers: int) -> int:
        """To GPUs, in a step that decodes two requests and goes on with a third's prompt."""
        with FakeGpus(2) as gpus:
            stage = stage_on(random_model(num_hidden_layers=layers).folder, range(layers), ("cuda:0",), others)
            heads = (0, 0, len(others), len(others))
            for request in (1, 2):
                stage.run(step_of(request, chunks=(chunk_of(request, 20, heads),), rows=20))
            before = gpus.to_gpus
            stage.run(step_of(3, chunks=(chunk_of(3, 5, heads),), rows=5, decoding=heads))
            return gpus.to_gpus - before

    assert copies(2) == copies(5)


def chunk_of(request: int, count: int, heads: tuple[int, ...]) -> Chunk:
    return Chunk(request=request, incarnation=0, first=0, count=count, total=count, heads=heads)


def step_of(number: int, *, chunks: tuple[Chunk, ...], rows: int, decoding: tuple[int, ...] | None = None) -> Step:
    """A prompt of so many ``rows``; requests 1 and 2 decode where ``decoding`` says where their heads are."""
    requests = np.array([1, 2] if decoding else [], np.int64)
    positions = np.concatenate([np.full(len(requests), 20), np.arange(rows)])
    return Step(
        epoch=1,
        number=number,
        tokens=np.arange(len(positions)),
        positions=positions,
        requests=requests,
        incarnations=np.zeros_like(requests),
        heads=np.array([decoding] * len(requests), np.int64).reshape(len(requests), 4),
        chunks=chunks,
        outputs=np.array([len(positions) - 1]),
    )


def test_the_gpus_that_are_none_refuse_what_real_ones_refuse() -> None:
    with FakeGpus(2):
        here, there, cpu = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"), torch.ones(2)
        for mixed in (lambda: here + there, lambda: torch.cat([here, cpu]), lambda: cpu.mul_(here)):
            with pytest.raises(RuntimeError, match="tensors on"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        with pytest.raises(RuntimeError, match="cuda:2 is not there"):
            cpu.to("cuda:2")
        assert (here[torch.tensor([0])].device, here.sum().tolist()) == (torch.device("cuda:0"), 2)
        assert torch.equal((here + there.to(here)).cpu(), torch.tensor([2.0, 2.0]))


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_answers_as_the_model_also_with_two_ranks_on_it(ranks: int) -> None:
    model = random_model()
    prompts = random_prompts(1, 4)
    engine = engine_of(model.folder, stage_on(model.folder, range(3), ("cuda:0",) * ranks, ("cuda:0", "cpu")))
    assert run_moving(engine, prompts, 12, seed=3) == [model.generate(prompt, 12) for prompt in prompts]
