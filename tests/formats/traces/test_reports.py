"""Reports of benchmarks and logs of SGLang: requests where they have them, in small files of their real forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.traces import load_trace, read_trace
from hetis.formats.traces.rows import characters_counter
from hetis.formats.workload import load_workload

SGLANG_BENCH = {
    "backend": "sglang", "dataset_name": "random", "request_rate": 1.0, "duration": 8.0, "completed": 3,
    "total_input_tokens": 1649, "total_output_tokens": 208, "input_lens": [374, 396, 9, 879],
    "output_lens": [44, 109, 0, 55], "ttfts": [0.1, 0.1, 0.0, 0.1], "errors": ["", "", "reset", ""],
}  # fmt: skip


def guidellm(*, is_new: bool) -> dict[str, object]:
    def request(start: float, prompt: int, output: int) -> dict[str, object]:
        if not is_new:
            return {"start_time": start, "prompt_tokens": prompt, "output_tokens": output}
        return {
            "type_": "generative_request_stats",
            "info": {"timings": {"request_start": start}},
            "input_metrics": {"text_tokens": prompt, "total_tokens": prompt},
            "output_metrics": {"text_tokens": output},
        }

    done = [request(1763.0, 374, 44), request(1766.0, 396, 109), request(1767.0, 879, 55)]
    return {"benchmarks": [{"requests": {"successful": done, "errored": [{}], "incomplete": []}}]}


def lifecycle(start: float, prompt: int, output: int, error: object = None) -> dict[str, object]:
    info = {"input_tokens": prompt, "output_tokens": output, "output_token_times": [start + 1]}
    return {"start_time": start, "end_time": start + 2, "request": "{}", "response": "", "info": info, "error": error}


LIFECYCLE = [
    lifecycle(70.5, 374, 44),
    lifecycle(70.6, 10, 1, {"error_type": "Timeout", "error_msg": ""}),
    lifecycle(73.5, 396, 109),
    lifecycle(74.5, 879, 55),
]
OPENROUTER = """\
generation_id,created_at,cost_total,tokens_prompt,tokens_completion,tokens_reasoning,model_permaslug,cancelled
gen-3,2026-06-28 03:47:01.500,0.01,879,55,0,openai/gpt-oss-120b,false
gen-2,2026-06-28 03:47:00.500,0.01,396,109,9,openai/gpt-oss-120b,false
gen-1,2026-06-28 03:46:57.500,0.01,374,44,0,openai/gpt-oss-120b,false
gen-0,2026-06-28 03:46:50.500,0.01,374,0,0,openai/gpt-oss-120b,true
"""


def finish(second: int, prompt: int, output: int, took: float, *, rid: str = "a1") -> str:
    meta = {"id": rid, "finish_reason": {"type": "stop"}, "prompt_tokens": prompt, "completion_tokens": output}
    meta |= {"cached_tokens": 0, "e2e_latency": took}
    sampling = "sampling_params={'max_new_tokens': 99}, text=\"a 'prompt_tokens': 5 of a user\""
    request = f"obj=GenerateReqInput(rid='{rid}', {sampling})"
    return f"[2026-05-20 08:02:{second:02}] Finish: {request}, out={{'text': 'x', 'meta_info': {meta}}}\n"


SGLANG_LOG = (
    "[2026-05-20 08:02:00 TP0] Load weight begin.\n"
    + finish(10, 374, 44, 4.0)
    + finish(10, 396, 109, 1.0)
    + finish(11, 5, 1, 0.1, rid="HEALTH_CHECK_1")
    + finish(12, 879, 55, 2.0)
)


def event(kind: str, second: float, **out: object) -> str:
    body = {"timestamp": f"2026-05-20T08:02:{second:06.3f}Z", "event": kind, "rid": "a"}
    return json.dumps(body | ({"out": {"meta_info": out}} if out else {})) + "\n"


SGLANG_JSON = (
    event("request.received", 1)
    + event("request.finished", 6, prompt_tokens=374, completion_tokens=44)
    + event("request.received", 7)
    + event("request.finished", 9, prompt_tokens=396, completion_tokens=109)
    + event("request.finished", 10, prompt_tokens=879, completion_tokens=55)
)
MULTI_TURN = """\
{"session_id": "s1", "timestamp": 1000, "input_length": 374, "output_length": 44}
{"session_id": "s1", "delay": 3000, "input_length": 396, "output_length": 109}
{"session_id": "s2", "timestamp": 5000, "input_length": 879, "output_length": 55}
"""


@pytest.mark.parametrize(
    ("name", "text", "form", "arrivals"),
    [
        ("online.jsonl", json.dumps(SGLANG_BENCH) + "\n", "SGLang bench_serving", (0.0, 2.0, 6.0)),
        ("one.json", json.dumps(SGLANG_BENCH, indent=1), "SGLang bench_serving", (0.0, 2.0, 6.0)),
        ("benchmarks.json", json.dumps(guidellm(is_new=False)), "guidellm", (0.0, 3.0, 4.0)),
        ("benchmarks.json", json.dumps(guidellm(is_new=True)), "guidellm", (0.0, 3.0, 4.0)),
        ("per_request_lifecycle_metrics.json", json.dumps(LIFECYCLE), "inference-perf", (0.0, 3.0, 4.0)),
        ("activity.csv", OPENROUTER, "OpenRouter", (0.0, 3.0, 4.0)),
        ("server.log", SGLANG_LOG, "SGLang log", (0.0, 3.0, 4.0)),
        ("server.txt", SGLANG_LOG, "SGLang log", (0.0, 3.0, 4.0)),
        ("server.log", SGLANG_JSON, "SGLang log in JSON", (0.0, 3.0, 4.0)),
        ("turns.jsonl", MULTI_TURN, "Mooncake, multi-turn", (1.0, 4.0, 5.0)),
    ],
)
def test_forms_are_told_by_what_files_contain(
    tmp_path: Path, name: str, text: str, form: str, arrivals: tuple[float, ...]
) -> None:
    (tmp_path / name).write_text(text)
    trace = read_trace(tmp_path / name)
    assert trace.form == form
    assert trace.arrival_s.tolist() == pytest.approx(arrivals)
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]
    assert load_workload(tmp_path / name).rate_rps == pytest.approx(trace.rate_rps)


def test_texts_of_genai_perf_are_counted(tmp_path: Path) -> None:
    def request(at_ns: int, usage: object) -> dict[str, object]:
        payload = json.dumps({"messages": [{"role": "user", "content": "q" * 40}], "max_tokens": 9})
        chunks = [{"choices": [{"delta": {"content": "a"}}]} for _ in range(3)]
        events = [*chunks, {"choices": [], "usage": usage}, "[DONE]"]
        responses = [{"response": f"data: {json.dumps(one)}\n\n"} for one in events]
        return {"timestamp": at_ns, "request_inputs": {"payload": payload}, "response_outputs": responses}

    experiment = {"experiment": {"mode": "request_rate", "value": 1}}
    experiment["requests"] = [request(10**18, None), request(10**18 + 2 * 10**9, {"completion_tokens": 7})]  # type: ignore[assignment]
    path = tmp_path / "profile_export.json"
    path.write_text(json.dumps({"service_kind": "openai", "experiments": [experiment]}))
    trace = read_trace(path, count=characters_counter(4.0))
    assert (trace.form, trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ("genai-perf", [10, 10], [3, 7])
    assert trace.arrival_s.tolist() == [0.0, 2.0]
    with pytest.raises(DocumentError, match="has texts but no token counts: hetis-plan convert"):
        load_trace(path)


def test_units_are_doubted_where_the_rate_is_impossible(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"timestamp": i, "input_length": 40, "output_length": 9} for i in range(0, 4001, 2)]
    for changes, form, rate in (
        ({}, "Mooncake", 500.0),
        ({"timestamp": 0.75}, "Mooncake, in seconds", 2 / 3),
        ({"chat_id": 1, "parent_chat_id": -1, "timestamp": 1000}, "Qwen-Bailian, in milliseconds", 0.5),
    ):
        scale = changes.get("timestamp", 1)
        made = [{**row, **changes, "timestamp": scale * row["timestamp"]} for row in rows]
        path.write_text("\n".join(map(json.dumps, made)))
        trace = read_trace(path)
        assert (trace.form, trace.rate_rps) == (form, pytest.approx(rate))
        assert len(trace.readings) == 1
    path.write_text("\n".join(json.dumps({**row, "timestamp": row["timestamp"] // 4}) for row in rows))
    assert "are taken as seconds, 2 requests/s; as milliseconds: 2e+03" in read_trace(path).readings[0]
    path.write_text("\n".join(json.dumps({**row, "timestamp": row["timestamp"] * 20}) for row in rows))
    assert read_trace(path).readings == ()


def test_cached_tokens_are_said(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 40}}
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"created": 1780000000 + i, "usage": usage}) for i in range(3)))
    said = "40% of the prompt tokens were cached: --prefix-hit-rate 0.4 counts that"
    assert read_trace(path).readings == (said,)
    assert read_trace(path, prefix_hit_rate=0.3).readings == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"benchmarks": [{"requests": {"successful": [{"prompt_tokens": 3, "output_tokens": 1}]}}]}',
            "successful[0].request_start_time",
        ),
        ('{"benchmarks": []}', "has no requests"),
        ('{"experiments": 3, "x": 1}', "has experiments, x: expected an array of requests, or a report of vllm bench"),
        ('{"input_lens": [1, 2], "output_lens": [1]}', "has lists of different lengths: 2 input_lens, 1 output_lens"),
    ],
)
def test_a_wrong_report_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DocumentError) as caught:
        read_trace(path, count=characters_counter(4.0))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
