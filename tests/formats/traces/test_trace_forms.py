"""Traces in the forms that others publish and log, with realistic lines."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.errors import DocumentError
from hetis.formats.traces import Trace, read_trace, rows, trace_text
from hetis.formats.traces.forms import FORMS
from hetis.formats.traces.rows import characters_counter

# First lines of the published files; each has the three requests below.
AZURE_2023 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,374,44
2024-05-10 00:00:04.324509+00:00,396,109
2024-05-10 00:00:04.551807+00:00,879,55
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,374,44,418,Conversation log
45,ChatGPT,396,109,505,Conversation log
118,GPT-4,879,55,934,Conversation log
120,ChatGPT,500,0,500,Conversation log
"""
MOONCAKE = """\
{"timestamp": 27482, "input_length": 374, "output_length": 44, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 396, "output_length": 109, "hash_ids": [46, 47, 48]}
{"timestamp": 30600, "input_length": 879, "output_length": 55, "hash_ids": [46]}
"""


def answer(created: int, prompt: int, completion: int) -> str:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "created": created, "usage": usage}) + "\n"


OPENAI = answer(1_700_000_000, 374, 44) + answer(1_700_000_003, 396, 109) + answer(1_700_000_004, 879, 55)


def nested(**fields: object) -> str:
    return json.dumps(fields) + "\n"


def aiperf(start_s: float, prompt: int, output: int, *, phase: str = "profiling", error: object = None) -> str:
    values = {"input_sequence_length": prompt, "output_sequence_length": output, "time_to_first_token": 45.5}
    return nested(
        metadata={
            "session_num": 0,
            "x_request_id": "r",
            "request_start_ns": 1_763_000_000_000_000_000 + round(start_s * 1e9),
            "benchmark_phase": phase,
            "was_cancelled": False,
        },
        metrics={name: {"value": value, "unit": "tokens"} for name, value in values.items()},
        error=error,
    )


AIPERF = (
    aiperf(-9, 10, 10, phase="warmup")
    + aiperf(0, 374, 44)
    + aiperf(1, 5, 5, error={"code": 408, "type": "TimeoutError", "message": ""})
    + aiperf(3, 396, 109)
    + aiperf(4, 879, 55)
)
RESPONSES = "".join(
    nested(id="resp_1", object="response", created_at=at, usage={"input_tokens": p, "output_tokens": o})
    for at, p, o in ((1_700_000_000, 374, 44), (1_700_000_003, 396, 109), (1_700_000_004, 879, 55))
)
BATCH = "".join(
    nested(id="batch_req_1", custom_id="1", response={"status_code": 200, "body": json.loads(line)}, error=None)
    for line in OPENAI.splitlines()
)
LITELLM = """\
request_id,call_type,api_key,spend,total_tokens,prompt_tokens,completion_tokens,startTime,endTime
1,acompletion,sk,0.1,418,374,44,2025-01-01 12:00:00.000+00:00,2025-01-01 12:00:09
2,acompletion,sk,0.1,505,396,109,2025-01-01T12:00:03Z,2025-01-01 12:00:09
3,acompletion,sk,0.1,934,879,55,2025-01-01 12:00:04,2025-01-01 12:00:09
4,acompletion,sk,0.0,0,77,0,2025-01-01 12:00:05,2025-01-01 12:00:09
"""
BENCH = json.dumps(
    {
        "date": "20261122-100000",
        "backend": "vllm",
        "num_prompts": 4,
        "request_rate": 1.0,
        "input_lens": [374, 396, 9, 879],
        "output_lens": [44, 109, 0, 55],
        "start_times": [9000.5, 9003.5, 9003.6, 9004.5],
        "ttfts": [0.1, 0.1, 0.0, 0.1],
        "errors": ["", "", "connection reset", ""],
    }
)


def ids(number: int) -> str:
    return str(list(range(number)))


PID = "(APIServer pid=17) "
ASKED, ANSWERED = "[request_logger.py:50] Request", "[request_logger.py:90] Generated response"
IN, OUT, END = "prompt_token_ids: ", "output_token_ids: ", ", prompt_embeds shape: None."
RECEIVED, PARAMS = "[logger.py:43] Received request", "params: SamplingParams(n=1, max_tokens=99)"
OLD_END = ", prompt_embeds shape: None, lora_request: None."
VLLM_LOG = f"""\
{PID}INFO 11-22 10:00:00 [api_server.py:1834] Starting vLLM API server 0 on http://0.0.0.0:8000
{PID}INFO 11-22 10:00:00 [request_logger.py:60] Received request chatcmpl-a: {PARAMS}, lora_request: None.
{PID}DEBUG 11-22 10:00:00 {ASKED} chatcmpl-a details: prompt: 'hi', {IN}{ids(374)}{END}
{PID}DEBUG 11-22 10:00:03 {ASKED} chatcmpl-b details: prompt: 'Generated response x: {IN}[1, 2]', {IN}{ids(396)}{END}
{PID}DEBUG 11-22 10:00:04 {ASKED} chatcmpl-c details: prompt: '', {IN}{ids(879)}{END}
{PID}DEBUG 11-22 10:00:05 {ASKED} chatcmpl-d details: prompt: '', prompt_token_ids: [1]{END}
{PID}DEBUG 11-22 10:00:06 {ANSWERED} chatcmpl-b (streaming delta) details: output_token_ids: [1, 2]
{PID}DEBUG 11-22 10:00:06 {ANSWERED} chatcmpl-a details: {OUT}{ids(44)}
{PID}INFO 11-22 10:00:06 [request_logger.py:98] Generated response chatcmpl-a: output: 'hello', finish_reason: stop
{PID}DEBUG 11-22 10:00:07 {ANSWERED} chatcmpl-b (streaming complete) details: {OUT}{ids(109)}
{PID}DEBUG 11-22 10:00:07 {ANSWERED} chatcmpl-c (streaming delta) details: {OUT}{ids(50)}
{PID}DEBUG 11-22 10:00:08 {ANSWERED} chatcmpl-c (streaming delta) details: {OUT}{ids(5)}
"""
OLD_VLLM_LOG = f"""\
INFO 12-31 23:59:59 {RECEIVED} cmpl-a-0: prompt: 'x', {PARAMS}, {IN}{ids(374)}{OLD_END}
INFO 01-01 00:00:02 {RECEIVED} cmpl-b-0: prompt: 'x', {PARAMS}, {IN}{ids(396)}{OLD_END}
INFO 01-01 00:00:03 {RECEIVED} cmpl-c-0: prompt: 'x', {PARAMS}, {IN}{ids(879)}{OLD_END}
INFO 01-01 00:00:05 [logger.py:68] Generated response cmpl-c-0: output: 'y', {OUT}{ids(55)}, finish_reason: stop
INFO 01-01 00:00:05 [logger.py:68] Generated response cmpl-b-0: output: 'y', {OUT}{ids(109)}, finish_reason: length
INFO 01-01 00:00:05 [logger.py:68] Generated response cmpl-a-0: output: 'y', {OUT}{ids(44)}, finish_reason: stop
"""
SHAREGPT = json.dumps(
    [
        {"id": "a_0", "conversations": [{"from": "human", "value": "a" * 40}, {"from": "gpt", "value": "b" * 80}]},
        {
            "id": "b_0",
            "conversations": [
                {"from": "gpt", "value": "an answer to nothing"},
                {"from": "human", "value": "c" * 20},
                {"from": "gpt", "value": "d" * 4},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "e" * 8},
                {"role": "user", "content": "f" * 8},
                {"role": "assistant", "content": "g" * 12},
                {"role": "user", "content": "h" * 4},
                {"role": "assistant", "content": "i" * 16},
                {"role": "assistant", "content": ""},
            ]
        },
        {"id": "empty", "conversations": []},
    ]
)


def read(folder: Path, name: str, text: str) -> Trace:
    (folder / name).write_text(text, encoding="utf-8")
    return read_trace(folder / name)


@pytest.mark.parametrize(
    ("name", "text", "arrivals"),
    [
        ("azure.csv", AZURE_2023, (0.0, 4.314579, 4.541877)),
        ("azure.csv", AZURE_2024, (0.0, 4.314579, 4.541877)),
        ("burst.csv", BURSTGPT, (5.0, 45.0, 118.0)),
        ("conversation_trace.jsonl", MOONCAKE, (27.482, 30.535, 30.6)),
        ("burstgpt.tsv", BURSTGPT.replace(",", "\t"), (5.0, 45.0, 118.0)),
        ("burstgpt.csv", BURSTGPT.replace(",", ";"), (5.0, 45.0, 118.0)),
        ("answers.jsonl", OPENAI, (0.0, 3.0, 4.0)),
        ("answers.json", f"[{','.join(OPENAI.splitlines())}]", (0.0, 3.0, 4.0)),
        ("responses.jsonl", RESPONSES, (0.0, 3.0, 4.0)),
        ("batch_output.jsonl", BATCH, (0.0, 3.0, 4.0)),
        ("spend.csv", LITELLM, (0.0, 3.0, 4.0)),
        ("profile_export.jsonl", AIPERF, (0.0, 3.0, 4.0)),
        ("bench.json", BENCH, (0.0, 3.0, 4.0)),
        ("server.log", VLLM_LOG, (0.0, 3.0, 4.0)),
        ("server.log", OLD_VLLM_LOG, (0.0, 3.0, 4.0)),
    ],
    ids=[
        *(
            "azure 2023",
            "azure 2024",
            "burstgpt",
            "mooncake",
            "tabs",
            "semicolons",
            "openai",
            "array",
            "responses",
            "batch",
            "litellm",
        ),
        *("aiperf", "vllm bench", "vllm log", "old vllm log"),
    ],
)
def test_known_forms_are_read_as_they_are(tmp_path: Path, name: str, text: str, arrivals: tuple[float, ...]) -> None:
    trace = read(tmp_path, name, text)
    assert trace.arrival_s.tolist() == pytest.approx(arrivals, abs=1e-5)
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]


@pytest.mark.parametrize("blank", ["\n", "\r\n", "  \n\n"])
def test_blank_lines_before_the_columns_are_skipped_and_counted(tmp_path: Path, blank: str) -> None:
    assert read(tmp_path, "t.csv", blank + AZURE_2023).prompt_tokens.tolist() == [374, 396, 879]
    line = 1 + blank.count("\n")
    for text, at in (
        (AZURE_2023 + "yesterday,3,1\n", line + 4),
        ("a,b\n1,2\n", line),
        (AZURE_2023 + "2023-11-16 18:15:52,1,2,3\n", line + 4),
    ):
        with pytest.raises(DocumentError) as caught:
            read(tmp_path, "t.csv", blank + text)
        assert [problem.line for problem in caught.value.problems] == [at]
    with pytest.raises(DocumentError, match=r"t\.csv:1: is empty"):
        read(tmp_path, "t.csv", blank)


def test_rows_of_other_forms_are_refused_in_their_own_words(tmp_path: Path) -> None:
    with pytest.raises(DocumentError) as caught:
        read(tmp_path, "t.csv", AZURE_2023 + "yesterday,3,0\n")
    assert [problem.path for problem in caught.value.problems] == ["TIMESTAMP", "GeneratedTokens"]
    assert "'yesterday' is not a time" in str(caught.value)


def test_a_file_in_no_known_form_says_what_it_has_and_what_it_might(tmp_path: Path) -> None:
    fields = {"ts": 1, "input_tokens": 3, "usage": {"prompt": 2}}
    with pytest.raises(DocumentError) as caught:
        read(tmp_path, "t.jsonl", json.dumps(fields))
    (problem,) = caught.value.problems
    assert problem.line == 1
    assert "the file has the fields ts, input_tokens, usage.prompt; known forms: " in problem.message
    assert all(form.name in problem.message for form in FORMS)


def test_every_form_says_where_it_is_from() -> None:
    assert all(form.source for form in FORMS)
    assert len({(*form.fields, *form.also) for form in FORMS}) == len(FORMS)


def test_seconds_are_told_from_milliseconds(tmp_path: Path) -> None:
    """Qwen-Bailian has Mooncake's fields in seconds, and blocks of 16 tokens; it also names chats."""
    rows = [
        {"timestamp": 0.5 * i, "input_length": 40, "output_length": 9, "hash_ids": [1, 2, 10 + i]} for i in range(5)
    ]
    named = [{"chat_id": i, "parent_chat_id": -1, **row} for i, row in enumerate(rows)]
    for form, lines in (("Qwen-Bailian", named), ("Mooncake, in seconds", rows)):
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        trace = read_trace(path, prefix_hit_rate="trace")
        assert (trace.form, trace.rate_rps) == (form, 2.0)
        assert trace.prefix_hit_rate == pytest.approx(4 * 32 / (5 * 40))
    path.write_text("\n".join(json.dumps(row | {"timestamp": round(2000 * row["timestamp"])}) for row in rows))
    assert read_trace(path).rate_rps == 1.0, "whole numbers are milliseconds"


def test_litellm_writes_times_as_numbers_too(tmp_path: Path) -> None:
    rows = [{"startTime": 1764000000.1 + i, "prompt_tokens": 100, "completion_tokens": 20} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_trace(tmp_path / "t.jsonl").rate_rps == pytest.approx(1.0)


def lines(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def litellm(second: int, prompt: int, output: int, status: str = "success") -> dict[str, object]:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "status": status}
    return {"startTime": 1_780_000_000.5 + second, "messages": [{"role": "user", "content": "hi"}], **counts}


REQUESTS = ((0, 374, 44), (3, 396, 109), (4, 879, 55))
SPAN = {"id": "a", "type": "SPAN", "startTime": "2026-05-20T08:02:00.000Z", "usageDetails": {}}
FAILED = SPAN | {"type": "GENERATION"}


def langfuse(second: int, prompt: int, output: int) -> dict[str, object]:
    usage = {"input": prompt, "output": output, "total": prompt + output}
    return {"type": "GENERATION", "startTime": f"2026-05-20T08:02:0{second}.000Z", "usageDetails": usage}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # times in other units than the API's, as proxies write them
        *(
            (f"{unit}.jsonl", lines(*({"created": at(second), "usage": {"prompt_tokens": p, "completion_tokens": o}}
                                      for second, p, o in REQUESTS)))
            for unit, at in {
                "ms": lambda second: 1_780_000_000_000 + 1000 * second,
                "ns": lambda second: (1_780_000_000 + second) * 10**9,
                "iso": lambda second: f"2026-05-20T10:02:0{second}+02:00",
            }.items()
        ),
        ("failed.jsonl", lines(*(litellm(*one) for one in REQUESTS), litellm(5, 7, 9, "failure"))),
        ("failed.json", json.dumps([*(litellm(*one) for one in REQUESTS), litellm(5, 7, 9, "failure")])),
        (
            "failed.csv",
            "startTime,prompt_tokens,completion_tokens,status\n"
            "0,374,44,success\n3,396,109,success\n4,879,55,success\n5,7,9,failure\n",
        ),
        ("pandas.csv", "Timestamp,Request tokens,Response tokens\n0,374.0,44.0\n3,396.0,109.0\n4,879.0,55.0\n"),
        ("langfuse.json", json.dumps({"data": [SPAN, FAILED, *(langfuse(*one) for one in REQUESTS), SPAN]})),
        (
            "langfuse_blob.jsonl",
            lines(*({"start_time": f"2026-05-20 08:02:0{second}.963000", "usage_details": {"input": p, "output": o}}
                    for second, p, o in REQUESTS)),
        ),
        (
            "api.json",
            json.dumps({"data": [{"created_at": f"2026-05-20T08:02:0{second}Z", "tokens_prompt": p,
                                  "tokens_completion": o} for second, p, o in REQUESTS]}),
        ),
    ],
)  # fmt: skip
def test_variants_of_known_forms_are_the_same_requests(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    trace = read_trace(tmp_path / name)
    assert (trace.arrival_s - trace.arrival_s[0]).tolist() == pytest.approx([0.0, 3.0, 4.0], abs=1e-6)
    assert list(zip(trace.prompt_tokens, trace.output_tokens, strict=True)) == [one[1:] for one in REQUESTS]


def test_points_in_time_in_our_form_count_from_the_first(tmp_path: Path) -> None:
    """A simulation would wait for 56 years otherwise."""
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n1780000003,5,5\n1780000000,5,5\n")
    assert read_trace(tmp_path / "t.csv").arrival_s.tolist() == [0.0, 3.0]
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n30,5,5\n33,5,5\n")
    assert read_trace(tmp_path / "t.csv").arrival_s.tolist() == [30.0, 33.0]


def test_a_later_turn_needs_its_time_or_its_delay(tmp_path: Path) -> None:
    turn: dict[str, object] = {"session_id": "a", "input_length": 5, "output_length": 5}
    (tmp_path / "turns.jsonl").write_text(lines(turn | {"timestamp": 0}, turn | {"delay_ms": 3000}))
    with pytest.raises(DocumentError, match=r"turns\.jsonl:2: timestamp: '' is not a number"):
        read_trace(tmp_path / "turns.jsonl")


def test_conversations_may_stand_on_lines(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 80}]
    (tmp_path / "lmsys.jsonl").write_text(lines(*({"conversation_id": i, "conversation": turns} for i in "ab")))
    with pytest.raises(DocumentError, match="has texts but no token counts"):
        read_trace(tmp_path / "lmsys.jsonl")
    trace = read_trace(tmp_path / "lmsys.jsonl", count=characters_counter(4.0))
    assert (trace.form, trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (
        "conversations",
        [10, 10],
        [20, 20],
    )


def test_conversations_are_a_request_for_every_answer(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(SHAREGPT)
    trace = read_trace(path, count=characters_counter(4))
    assert list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)) == [
        (10, 20),
        (10, 1),
        (4, 3),
        (8, 4),
    ]
    assert (trace.form, trace.has_times, trace.rate_rps) == ("conversations", False, None)
    with pytest.raises(DocumentError, match="has texts but no token counts: hetis-plan convert counts them"):
        read_trace(path)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), st.integers(1, 40), st.sampled_from(["", " ", "\n,"]))
def test_arrays_are_read_in_pieces_of_any_size(lengths: list[int], chunk: int, blank: str) -> None:
    items = [{"timestamp": i, "input_length": n, "output_length": 1} for i, n in enumerate(lengths)]
    text = "[" + f",{blank}".join(map(json.dumps, items)) + "]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK", chunk)
        found = list(rows.array_rows("t.json", io.StringIO(text), None))
    assert [int(values[1]) for _, _, values in found] == lengths


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.json", "", "begins with '', expected a JSON array"),
        ("t.json", "[1]", "[0] is 1, expected an object"),
        ("t.json", "[{", "[0] is not JSON: "),
        (
            "t.json",
            '[{"a": 1}]',
            "[0]: fields arrival_s, prompt_tokens, output_tokens are missing; the file has the fields a;",
        ),
        ("t.json", '{"input_lens": [1]}', "has no output_lens, but input_lens: save the report with each"),
        ("t.json", '{"input_lens": [1], "output_lens": [], "start_times": [1]}', "1 start_times, 1 input_lens, 0 out"),
        ("t.json", "[" * 100_000, "[0] is nested too deeply"),
        ("t.json", '[{"timestamp": 0, "input_length": 0, "output_length": 1}]', "[0].input_length: is 0, must be 1 to"),
        ("t.log", "INFO: 127.0.0.1 - GET /health", "has no request in vLLM's or SGLang's form: vLLM logs them with"),
        (
            "t.log",
            "INFO 11-22 10:00:00 [l.py:1] Received request a-1: params: SamplingParams(), lora_request: None.",
            "has no token ids of requests and their answers: vLLM logs them with --enable-log-requests",
        ),
        (
            "t.log",
            "INFO 13-45 10:00:00 [l.py:1] Received request a-1: params",
            "has no request in vLLM's or SGLang's form",
        ),
    ],
)
def test_what_is_no_trace_says_so_once(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(tmp_path, name, text)
    (problem,) = caught.value.problems
    assert said in str(problem)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=9))
def test_a_written_trace_reads_the_same(rows: list[tuple[float, int, int]]) -> None:
    columns = [np.array(column) for column in zip(*sorted(rows), strict=True)]
    trace = Trace(name="t", arrival_s=columns[0], prompt_tokens=columns[1], output_tokens=columns[2])
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("csv", "jsonl"):
            path = Path(folder) / f"t.{ending}"
            path.write_text("".join(trace_text(trace, as_jsonl=ending == "jsonl")))
            again = read_trace(path)
            for name in ("arrival_s", "prompt_tokens", "output_tokens"):
                assert np.array_equal(getattr(again, name), getattr(trace, name))
