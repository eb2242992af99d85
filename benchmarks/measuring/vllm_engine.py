"""A vLLM engine in a separate process, run by vLLM's Python. Answers each line on stdin with one line of JSON.

The first line configures the engine; each further line is a list of prompts with their output lengths. This file
imports nothing else of hetis, and vLLM runs in this one process, so that its CPU seconds cover scheduler, ranks and
kernels.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


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
