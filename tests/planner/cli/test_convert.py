"""`hetis-plan convert`: a trace in our form, with warnings about values that the file does not state."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hetis.formats.traces import read_trace
from tests.formats.traces.test_rates import SCRAPE
from tests.formats.traces.test_trace_forms import AIPERF, BENCH, BURSTGPT, LITELLM, SHAREGPT, VLLM_LOG
from tests.planner.command_line import hetis_plan_here

ANSWERS = [(10, 20), (10, 1), (4, 3), (8, 4)]  # tokens of SHAREGPT, at four characters each


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "profile_export.jsonl").write_text(AIPERF)
    (tmp_path / "server.log").write_text(VLLM_LOG)
    (tmp_path / "sharegpt.json").write_text(SHAREGPT)
    return tmp_path


@pytest.mark.parametrize("name", ["profile_export.jsonl", "server.log"])
@pytest.mark.parametrize("out", ["t.csv", "t.jsonl", "t.csv.gz"])
def test_a_trace_is_written_as_its_requests_are(folder: Path, name: str, out: str) -> None:
    done = hetis_plan_here("convert", name, "--out", out, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert "3 requests, 0.5 requests/s, 550/69 tokens on average" in done.stderr
    assert "warning" not in done.stderr
    trace = read_trace(folder / out)
    assert trace.form == "hetis"
    assert trace.arrival_s.tolist() == pytest.approx([0, 3, 4])
    if out.endswith(".gz"):
        assert gzip.decompress((folder / out).read_bytes()).startswith(b"arrival_s,prompt_tokens,output_tokens\n")


@pytest.mark.parametrize(
    ("name", "text", "form", "left_out"),
    [
        ("burst.csv", BURSTGPT, "BurstGPT", "1 row of failed requests, which have no output"),
        ("spend.csv", LITELLM, "LiteLLM", "1 row of failed requests, which have no output"),
        ("profile_export.jsonl", AIPERF, "aiperf", "2 rows of failed and cancelled requests, and warm-up"),
        ("server.log", VLLM_LOG, "vLLM log", "1 row of requests without a response, which failed or had not ended"),
        ("bench.json", BENCH, "vllm bench", "1 row of failed requests, which have an error or no output"),
    ],
)
def test_rows_that_are_left_out_are_counted_with_what_they_are(
    folder: Path, name: str, text: str, form: str, left_out: str
) -> None:
    (folder / name).write_text(text)
    done = hetis_plan_here("convert", name, "--out", "t.csv", cwd=folder)
    assert f"{name}: 3 requests, " in done.stderr
    assert f"(form: {form}); left out: {left_out}\n" in done.stderr
    assert "left out" not in hetis_plan_here("convert", "t.csv", "--out", "again.csv", cwd=folder).stderr


def test_a_trace_of_failed_requests_alone_is_refused_with_what_they_are(folder: Path) -> None:
    (folder / "burst.csv").write_text("Timestamp,Request tokens,Response tokens\n5,472,0\n")
    done = hetis_plan_here("convert", "burst.csv", cwd=folder)
    assert "burst.csv: has no requests but failed requests, which have no output" in done.stderr


def test_texts_are_counted_by_a_ratio_that_is_said(folder: Path) -> None:
    done = hetis_plan_here("convert", "sharegpt.json", cwd=folder)
    assert done.stdout.splitlines()[1:] == [f"0.0,{prompt},{output}" for prompt, output in ANSWERS]
    assert "warning: lengths are estimates at 4 characters per token" in done.stderr
    assert "warning: the file has no arrival times, so all requests arrive at once; --rate" in done.stderr
    done = hetis_plan_here("convert", "sharegpt.json", "--characters-per-token", "2", "--rate", "4", cwd=folder)
    assert done.stdout.splitlines()[1:3] == ["0.0,20,40", "0.25,20,2"]
    assert "at once" not in done.stderr


def test_a_tokenizer_counts_instead(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    (folder / "model").mkdir()
    made.save(str(folder / "model" / "tokenizer.json"))
    done = hetis_plan_here("convert", "sharegpt.json", "--tokenizer", "model", "--rate", "1", cwd=folder)
    assert done.stdout.splitlines()[1] == "0.0,40,80", "one token a character"
    assert "estimates" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("server.log", "--rate", "1"),
            "server.log: has arrival times (vLLM log): --rate is only for files without them",
        ),
        (
            ("server.log", "--out", "t.parquet"),
            "t.parquet: the name of a trace must end in .csv, .csv.gz, .jsonl, .jsonl.gz",
        ),
        (("sharegpt.json", "--tokenizer", "x"), "x: is not a tokenizer: expected a tokenizer.json or its folder"),
        (("sharegpt.json", "--tokenizer", "sharegpt.json"), "sharegpt.json: is not a tokenizer: "),
        (
            ("sharegpt.json", "--tokenizer", "x", "--characters-per-token", "3"),
            "--characters-per-token cannot be combined",
        ),
        (("nowhere.csv",), "nowhere.csv: no such file"),
    ],
)
def test_what_cannot_be_converted_is_one_error(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    done = hetis_plan_here("convert", *arguments, cwd=folder)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert not list(folder.glob("t.*"))


def test_other_verbs_read_logs_and_send_texts_here(folder: Path) -> None:
    from hetis.formats.documents import load_workload
    from hetis.formats.errors import DocumentError

    assert load_workload(folder / "server.log").rate_rps == 0.5
    with pytest.raises(DocumentError, match="hetis-plan convert counts them"):
        load_workload(folder / "sharegpt.json")
    (folder / "w.json").write_text(
        json.dumps({"apiVersion": "hetis/v1", "kind": "Workload", "name": "w", "trace": "sharegpt.json"})
    )
    with pytest.raises(DocumentError, match="hetis-plan convert counts them"):
        load_workload(folder / "w.json")


def test_a_scrape_becomes_a_workload(folder: Path) -> None:
    (folder / "metrics.txt").write_text(SCRAPE)
    done = hetis_plan_here("convert", "metrics.txt", "--out", "w.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "100 requests" in done.stderr
    assert "300/40 tokens on average (form: metrics of vllm)" in done.stderr
    assert hetis_plan_here("validate", "w.yaml", cwd=folder).returncode == 0
    refused = hetis_plan_here("convert", "metrics.txt", "--out", "w.csv", cwd=folder)
    assert (refused.returncode, "has lengths and rates, but no requests" in refused.stderr) == (2, True)
