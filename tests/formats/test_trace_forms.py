"""Traces in the forms in which others publish and log them, as lines of theirs look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.trace_forms import FORMS
from hetis.formats.traces import Trace, read_trace

# Heads of the published files; the three requests of each are the ones below.
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
        ("answers.jsonl", OPENAI, (0.0, 3.0, 4.0)),
    ],
    ids=["azure 2023", "azure 2024", "burstgpt", "mooncake", "openai"],
)
def test_known_forms_are_read_as_they_are(tmp_path: Path, name: str, text: str, arrivals: tuple[float, ...]) -> None:
    trace = read(tmp_path, name, text)
    assert trace.arrival_s.tolist() == pytest.approx(arrivals, abs=1e-5)
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]


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
    assert len({form.fields for form in FORMS}) == len(FORMS)
