"""``hetis-plan fits``: the answer, its numbers, what would help, and what is refused."""

from __future__ import annotations

import json

import pytest

from hetis.planner.cli.exit_codes import ExitCode
from tests.planner.command_line import hetis_plan_here


def run(*words: str) -> tuple[int, str, str]:
    done = hetis_plan_here(*words)
    return done.returncode, done.stdout, done.stderr


GPT_ON_H100 = ("fits", "gpt-oss-120b", "--gpu", "H100-SXM-80GB", "--engine-version", "0.10.1")


def test_a_model_that_does_not_start_says_what_is_missing_and_what_would_help() -> None:
    code, text, _ = run(*GPT_ON_H100)
    assert code == ExitCode.INFEASIBLE
    assert "openai/gpt-oss-120b on 1 H100-SXM-80GB: does not fit" in text
    assert "GiB are missing on each GPU before any KV: vLLM does not start" in text
    assert "--max-num-seqs 64: " in text
    assert "2 GPUs: " in text


def test_the_parts_add_up_to_what_tools_report_of_the_gpu() -> None:
    code, text, _ = run(*GPT_ON_H100, "--max-num-seqs", "64", "-o", "json")
    (found,) = json.loads(text)["fits"]
    room = found["room"]
    assert code == ExitCode.OK
    assert sum(size for name, size in room.items() if name != "reported_bytes") == pytest.approx(room["reported_bytes"])
    assert found["options"] == ["--max-model-len", str(found["longest_context"]), "--max-num-seqs", "64"]


def test_a_context_that_is_wanted_must_fit() -> None:
    words = ("fits", "Llama-3.3-70B", "--gpu", "3090=4", "--weights", "awq-int4", "--context")
    assert run(*words, "32k")[0] == ExitCode.OK
    code, text, _ = run(*words, "131072", "-o", "json")
    (found,) = json.loads(text)["fits"]
    assert code == ExitCode.INFEASIBLE
    assert 32_768 < found["longest_context"] < 131_072
    assert found["why_not"] == f"the longest request has {found['longest_context']:,} tokens, 131,072 are wanted"
    assert found["start"]["tp"] == 4


def test_without_gpus_every_common_type_has_the_fewest_that_start() -> None:
    code, text, _ = run("fits", "Qwen3-32B", "-o", "json")
    found = {one["gpu"]: one for one in json.loads(text)["fits"]}
    assert code == ExitCode.OK
    assert found["H100-SXM-80GB"]["num_gpus"] == 1 < found["L40S"]["num_gpus"]
    assert all(one["starts"] for one in found.values())


def test_ranks_that_the_model_cannot_have_are_refused() -> None:
    code, _, error = run("fits", "Llama-3.3-70B", "--gpu", "H100-SXM-80GB=4", "--tp", "3")
    assert code == ExitCode.INVALID
    assert "--tp is 3, meta-llama/Llama-3.3-70B-Instruct on 4 GPUs can have 1, 2, 4" in error


@pytest.mark.parametrize("gpu", ["H100-SXM-80GB=0", "H100-SXM-80GB=x", "H9000=2"])
def test_gpus_that_are_none_are_refused(gpu: str) -> None:
    code, _, error = run("fits", "Llama-3.3-70B", "--gpu", gpu)
    assert code == ExitCode.INVALID
    assert "--gpu" in error


@pytest.mark.parametrize("version", ["abc", "latest", ""])
def test_versions_that_are_none_are_refused(version: str) -> None:
    code, _, error = run("fits", "Llama-3.3-70B", "--gpu", "H100-SXM-80GB", "--engine-version", version)
    assert code == ExitCode.INVALID
    assert "--engine-version" in error
