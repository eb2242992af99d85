"""Traces, reports and logs in the forms of their tools, all of three requests: 374, 396 and 879 tokens in, 44, 109 and
55 out, within four seconds.
"""

from __future__ import annotations

import json

REQUESTS = ((0.0, 374, 44), (3.0, 396, 109), (4.0, 879, 55))
_S = 1_780_000_000.0  # of the first one, in seconds since 1970


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table(header: str, form: str) -> str:
    return header + "\n" + "".join(form.format(at=at, p=p, o=o, i=i) + "\n" for i, (at, p, o) in enumerate(REQUESTS))


def _moment(at: float) -> str:
    return f"2026-05-20 08:02:{10 + at:06.3f}"


_USAGE = [{"prompt_tokens": p, "completion_tokens": o} for _, p, o in REQUESTS]
_LENGTHS = {"input_lens": [p for _, p, _ in REQUESTS], "output_lens": [o for *_, o in REQUESTS]}
_BLOCKS = [{"input_length": p, "output_length": o, "hash_ids": list(range(-(-p // 512)))} for _, p, o in REQUESTS]
LOGS: dict[str, tuple[str, str]] = {
    "hetis": ("t.csv", _table("arrival_s,prompt_tokens,output_tokens", "{at},{p},{o}")),
    "Azure": (
        "t.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{_moment(at)},{p},{o}\n" for at, p, o in REQUESTS),
    ),
    "BurstGPT": ("t.csv", _table("Timestamp,Model,Request tokens,Response tokens", "{at},GPT-4,{p},{o}")),
    "Mooncake": ("t.jsonl", _lines(*({"timestamp": int(at * 1e3), **b} for b, (at, *_) in zip(_BLOCKS, REQUESTS)))),  # noqa: B905
    "Mooncake, turns": (
        "t.jsonl",
        _lines(
            {"session_id": "a", "timestamp": 0, **_BLOCKS[0]},
            {"session_id": "a", "delay": 3000, **_BLOCKS[1]},
            {"session_id": "a", "delay": 1000, **_BLOCKS[2]},
        ),
    ),
    "Qwen-Bailian": (
        "t.jsonl",
        _lines(
            *({"chat_id": 1, "parent_chat_id": -1, "timestamp": REQUESTS[i][0], **b} for i, b in enumerate(_BLOCKS))
        ),
    ),
    "OpenAI": ("t.jsonl", _lines(*({"created": int(_S + REQUESTS[i][0]), "usage": u} for i, u in enumerate(_USAGE)))),
    "LiteLLM": ("t.jsonl", _lines(*({"startTime": _S + REQUESTS[i][0], **u} for i, u in enumerate(_USAGE)))),
    "OpenRouter": (
        "t.csv",
        "generation_id,created_at,tokens_prompt,tokens_completion\n"
        + "".join(f"g,{_moment(at)},{p},{o}\n" for at, p, o in reversed(REQUESTS)),
    ),
    "inference-perf": (
        "t.json",
        json.dumps([{"start_time": at, "info": {"input_tokens": p, "output_tokens": o}} for at, p, o in REQUESTS]),
    ),
    "guidellm": (
        "t.json",
        json.dumps(
            {
                "benchmarks": [
                    {
                        "requests": {
                            "successful": [
                                {"request_start_time": _S + at, "prompt_tokens": p, "output_tokens": o}
                                for at, p, o in REQUESTS
                            ]
                        }
                    }
                ]
            }
        ),
    ),
    "vllm bench": ("t.json", json.dumps({**_LENGTHS, "start_times": [at for at, *_ in REQUESTS]})),
    "SGLang bench_serving": ("t.jsonl", _lines({**_LENGTHS, "duration": 6.0})),
    "SGLang log": (
        "t.log",
        "".join(
            f"[{_moment(at)[:19]}] Finish: obj=GenerateReqInput(rid='a', text='x'), out={{'meta_info': "
            f"{{'prompt_tokens': {p}, 'completion_tokens': {o}, 'e2e_latency': 1.0}}}}\n"
            for at, p, o in REQUESTS
        ),
    ),
    "scrape": (
        "t.prom",
        "".join(
            f'{name}_bucket{{le="{max(lengths)}"}} 3\n{name}_bucket{{le="+Inf"}} 3\n{name}_sum {sum(lengths)}\n'
            for name, lengths in (
                ("vllm:request_prompt_tokens", _LENGTHS["input_lens"]),
                ("vllm:request_generation_tokens", _LENGTHS["output_lens"]),
            )
        ),
    ),
    "vLLM's INFO lines": (
        "t.log",
        '"POST /v1/completions HTTP/1.1" 200 OK\n' * 3
        + "".join(
            f"INFO 05-20 08:02:{s:02} [loggers.py:1] Engine 000: Avg prompt throughput: "
            f"{sum(_LENGTHS['input_lens']) / 6} tokens/s, "
            f"Avg generation throughput: {sum(_LENGTHS['output_lens']) / 6} tokens/s, Running: 1 reqs\n"
            for s in (10, 13)
        ),
    ),
    "genai-perf, means": (
        "t.json",
        json.dumps(
            {
                "input_sequence_length": {"avg": sum(_LENGTHS["input_lens"]) / 3},
                "output_sequence_length": {"avg": sum(_LENGTHS["output_lens"]) / 3},
                "request_throughput": {"avg": 0.5},
            }
        ),
    ),
}
