"""One engine of `tools.gpu_session`, run by vLLM's Python: a row for each batch, as soon as it is measured."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from statistics import median
from typing import Any


def main() -> None:
    """Read how from stdin."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    how = json.load(sys.stdin)
    llm: Any = LLM(model=how["model"], skip_tokenizer_init=True, disable_log_stats=True, **how["options"])
    engine, steps, number = llm.llm_engine, how["steps"], 0
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    for requests, context in how["points"]:
        source = random.Random(requests * context)
        names = []
        for _ in range(requests):
            number += 1
            names.append(str(number))
            prompt = [source.randrange(3, 900) for _ in range(context)]
            engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        taken_s: list[float] = []
        tokens: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            begun_s = time.perf_counter()
            outputs = engine.step()
            taken_s.append(time.perf_counter() - begun_s)
            tokens |= {one.request_id: list(one.outputs[0].token_ids) for one in outputs if one.finished}
        row = {
            "requests": requests,
            "context": context,
            "step_ms": 1000 * median(taken_s[-steps // 2 :]),  # when all prompts have been computed
            "tokens": [tokens[name] for name in names],
        }
        print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
