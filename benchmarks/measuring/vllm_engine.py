"""A vLLM engine in a separate process, run by vLLM's Python, and random Llamas on which the engines must agree.

It answers each line on stdin with one line of JSON.

The first line configures the engine; each further line is a list of prompts with their output lengths. This file
imports nothing else of hetis, and vLLM runs in this one process, so that its CPU seconds cover scheduler, ranks and
kernels.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The dimensions of a Llama."""

    hidden: int
    middle: int
    layers: int
    q_heads: int
    kv_heads: int
    vocab: int


SMALL = ModelSize(hidden=768, middle=2048, layers=12, q_heads=12, kv_heads=4, vocab=32_000)  # 124M parameters
HALF = ModelSize(hidden=512, middle=1408, layers=8, q_heads=8, kv_heads=4, vocab=16_000)  # 40M, head dimension 64
TINY = ModelSize(hidden=128, middle=256, layers=3, q_heads=8, kv_heads=4, vocab=1_000)


def write_model(folder: Path, size: ModelSize, *, most_tokens: int) -> None:
    """Write a float32 checkpoint with weights so large that a wrong head or block changes the text."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.middle,
        num_hidden_layers=size.layers,
        num_attention_heads=size.q_heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=most_tokens,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    """Answer until stdin ends."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    how = json.loads(sys.stdin.readline())
    engine: Any = LLM(
        dtype="float32",
        skip_tokenizer_init=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        enable_prefix_caching=False,
        **how,
    )
    core = engine.llm_engine.engine_core.engine_core
    _tell({"blocks": core.scheduler.cache_config.num_gpu_blocks})
    for line in sys.stdin:
        asked = json.loads(line)
        preempted = 0
        params = [
            SamplingParams(temperature=asked["temperature"], max_tokens=tokens, ignore_eos=True, detokenize=False)
            for tokens in asked["tokens"]
        ]
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for number, (prompt, one) in enumerate(zip(asked["prompts"], params, strict=True)):
            engine.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, one)
        done: dict[str, list[int]] = {}
        while engine.llm_engine.has_unfinished_requests():
            for output in engine.llm_engine.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            preempted = max(preempted, sum(one.num_preemptions for one in core.scheduler.requests.values()))
        _tell(
            {
                "wall_s": time.perf_counter() - wall_s,
                "cpu_s": time.process_time() - cpu_s,
                "preempted": preempted,
                "tokens": [done[str(number)] for number in range(len(params))],
            }
        )


def _tell(answer: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
