"""`hetis-plan simulate`: what it prints and saves, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hetis
from hetis.formats.traces import read_trace
from hetis.planner.cli.app import run
from hetis.planner.report.simulation.text import _doubt
from hetis.planner.use_cases.simulation.simulate import SAMPLES, sample_spacing_s
from hetis.profiler import engines
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import prediction_of
from hetis.simulator.values import Fault
from tests.command_line import environment
from tests.fleets import fleet
from tests.planner.command_line import COMMAND, hetis_plan, invoke

CLUSTER = fleet("two", "a100: 2 A100-PCIe-80GB")
HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@contextmanager
def summed() -> Iterator[None]:
    """Count prefill and decode attention as their sum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "_FLASH_ATTENTION_2", ())
        yield


@pytest.fixture(scope="module", autouse=True)
def no_mixed_factor() -> Iterator[None]:
    """Rates and seats here are those of plans that the sum gives."""
    with summed():
        yield


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2-7B on two A100, as `place` saved it."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "cluster.yaml").write_text(CLUSTER)
    out = folder / "plan.json"
    inputs = ("-c", str(folder / "cluster.yaml"), "-m", "Llama-2-7B", "-w", "500/100")
    placed = invoke("place", *inputs, "--no-verify", "--out", str(out))
    assert placed.exit_code == 0, placed.output
    return out


def simulated(plan: Path, *arguments: str) -> dict[str, Any]:
    result = invoke("simulate", str(plan), "--threads", "1", *arguments, "-o", "json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the stderr, on one line, of a run that must end with exit code 2."""
    assert run(["simulate", *arguments]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return " ".join(err.replace("│", " ").split())


def test_a_crowd_that_comes_at_once_is_sampled_as_long_as_it_is_served(plan: Path) -> None:
    # At this rate the last request arrives after 50 ns; serving them takes seconds.
    found = simulated(plan, "--rate", "1e9", "--requests", "50")
    assert found["runs"][0]["counts"]["finished"] == 50
    assert found["limits"] == {"ttft_s": 2.0, "tpot_s": 0.1}


MOONCAKE = """\
{"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [1, 2]}
{"timestamp": 100, "input_length": 1000, "output_length": 50, "hash_ids": [1, 3]}
{"timestamp": 200, "input_length": 600, "output_length": 50, "hash_ids": [1, 2]}
"""


def ttft_s(found: dict[str, Any]) -> float:
    return float(found["summary"]["ttft_s"]["mean"])


def test_prefix_hits_let_the_first_token_come_earlier(plan: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(MOONCAKE)
    for source in ((), ("--trace", str(trace))):
        found = [
            simulated(plan, "--requests", "300", "--rate", "20", *source, "--prefix-hit-rate", rate)
            for rate in ("0", "40%", "0.9")
        ]
        assert [one["load"].get("prefix_hit_rate", 0) for one in found] == [0, 0.4, 0.9]
        assert ttft_s(found[0]) > ttft_s(found[1]) > ttft_s(found[2])
        # As without the option.
        assert found[0] == simulated(plan, "--requests", "300", "--rate", "20", *source)
    counted = simulated(plan, "--requests", "300", "--trace", str(trace), "--prefix-hit-rate", "trace")
    # One block of the second request, and all of the third except the one token that is always computed.
    assert counted["load"]["prefix_hit_rate"] == pytest.approx((512 + 599) / 2200)


def test_a_trace_without_the_hits_that_were_planned_is_warned_of(plan: Path, tmp_path: Path) -> None:
    document = json.loads(plan.read_text())
    document["inputs"]["documents"]["workload"]["prefix_hit_rate"] = 0.4
    with_hits = tmp_path / "plan.json"
    with_hits.write_text(json.dumps(document))
    base = (str(with_hits), "--requests", "100", "--rate", "20", "--threads", "1")
    warned = invoke("simulate", *base, "--trace", "500/100")
    assert "500/100 has no prefix hit rate, while the plan expects 0.4 of prompt tokens" in " ".join(
        warned.stderr.split()
    )
    assert simulated(with_hits, "--requests", "100")["load"]["prefix_hit_rate"] == 0.4
    for rate in ("0", "0.4"):
        assert "prefix" not in invoke("simulate", *base, "--trace", "500/100", "--prefix-hit-rate", rate).stderr


def test_a_saturated_fleet_says_what_it_serves(plan: Path) -> None:
    found = simulated(plan, "--saturate", "--requests", "1500")
    assert found["throughput_rps"] > 0
    assert found["throughput_rps"] == found["summary"]["throughput_rps"]["value"]
    assert found["ratios"]["throughput"] == pytest.approx(found["throughput_rps"] / found["planned"]["rate_rps"])
    assert found["load"]["arrivals"] == "saturated"


def test_a_rate_that_was_not_measured_is_unknown_without_a_unit(plan: Path) -> None:
    result = invoke("simulate", str(plan), "--requests", "20", "--kv-blocks", "60", "--trace", "3000/100")
    assert "nothing is served: no replica has room for any of the 20 requests" in result.stdout
    assert re.search(r"^Throughput +unknown$", result.stdout, re.MULTILINE)
    assert "unknown/s" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--requests 20", "too short: no request finished before the last one arrived"),
        ("--requests 40 --rate 2", "too short to tell whether requests pile up"),
        ("--requests 1000 --rate 2", ""),
        ("--requests 400 --rate 90", "not sustained: requests pile up"),
        ("--requests 20 --saturate", "too short: no request finished"),
        (
            "--requests 60 --rate 2 --fail a100/0@1s --fail a100/1@5s --join a100/0@2s --fail a100/0@9s",
            "never served: no replica is left to serve them; a100/0, a100/1 failed and did not rejoin",
        ),
    ],
)
def test_what_is_said_of_a_load_is_right(plan: Path, arguments: str, words: str) -> None:
    table = " ".join(invoke("simulate", str(plan), *arguments.split(), "--threads", "1").stdout.split())
    for each in ("too short", "not sustained", "never served"):
        assert (each in table) == (each in words)
    assert words in table


def test_a_load_of_which_some_can_never_be_held_is_not_said_to_pile_up() -> None:
    counts = SimpleNamespace(arrived=1000, finished=900, rejected=100, unfinished=0)
    found: Any = SimpleNamespace(summary=SimpleNamespace(counts=counts, steady=False))
    assert _doubt(found) == "not sustained: 100 of 1,000 requests rejected, no replica can hold them"


def test_a_run_that_is_too_short_neither_agrees_nor_disagrees(plan: Path) -> None:
    found = simulated(plan, "--requests", "20")
    assert found["steady"] is None
    assert found["agrees"] is None


def test_the_same_seed_gives_the_same_answer_and_another_one_does_not(plan: Path) -> None:
    first, again, other = (simulated(plan, "--requests", "400", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["summary"] != other["summary"]


def test_the_default_load_is_the_planned_goodput_on_the_plan_s_workload(plan: Path) -> None:
    found = simulated(plan, "--requests", "300")
    utilisation = json.loads(plan.read_text())["result"]["utilisation"]
    assert found["load"]["rate_rps"] == pytest.approx(utilisation * found["planned"]["rate_rps"])
    assert found["load"]["lengths"] == "500/100"
    # Every request has 500 prompt and 100 output tokens.
    assert found["summary"]["prompt_tokens_per_s"] == pytest.approx(5 * found["summary"]["output_tokens_per_s"])


def test_bursts_wait_longer_than_even_arrivals(plan: Path) -> None:
    even, bursts = (simulated(plan, "--requests", "1500", "--cv", cv)["summary"] for cv in ("0", "4"))
    assert bursts["ttft_s"]["p95"] > 1.5 * even["ttft_s"]["p95"]


def test_files_hold_the_first_run(plan: Path, tmp_path: Path) -> None:
    requests = tmp_path / "r.csv"
    found = simulated(plan, "--requests", "300", "--rate", "2", "--requests-csv", str(requests))
    trace = read_trace(requests)
    assert len(trace.arrival_s) == found["summary"]["counts"]["arrived"] == 300
    replayed = simulated(plan, "--trace", str(requests), "--recorded")
    assert replayed["summary"]["ttft_s"]["p95"] == pytest.approx(found["summary"]["ttft_s"]["p95"], rel=1e-3)


def test_a_sweep_brackets_the_goodput(plan: Path) -> None:
    found = simulated(plan, "--sweep", "--requests", "400", "--tolerance", "10%")
    swept = found["sweep"]
    assert found["goodput_rps"] == swept["goodput_rps"] > 0
    assert swept["beyond_rps"] - swept["goodput_rps"] <= 0.1 * swept["beyond_rps"]
    rates = [point["rate_rps"] for point in swept["points"]]
    assert rates == sorted(rates)
    table = invoke("simulate", str(plan), "--sweep", "--requests", "400", "--tolerance", "20%", "--threads", "1")
    assert "Goodput" in table.stdout
    assert max(len(line) for line in table.stdout.splitlines()) <= 80


def test_processes_change_nothing_but_the_time(plan: Path) -> None:
    arguments = ("simulate", str(plan), "--requests", "200", "--seeds", "3", "-o", "json")
    apart = hetis_plan(*arguments, "--threads", "2")
    assert apart.returncode == 0, apart.stderr
    assert json.loads(apart.stdout) == json.loads(hetis_plan(*arguments, "--threads", "1").stdout)


def test_requests_beyond_the_context_are_clipped_and_counted(plan: Path, tmp_path: Path) -> None:
    trace = tmp_path / "long.jsonl"
    lines = [{"arrival_s": i, "prompt_tokens": 9000 if i % 4 == 0 else 100, "output_tokens": 20} for i in range(100)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = simulated(plan, "--trace", str(trace), "--recorded")
    assert found["load"]["clipped"] == 25
    assert found["summary"]["counts"]["finished"] == 100
    table = invoke("simulate", str(plan), "--trace", str(trace), "--recorded", "--threads", "1").stdout
    assert "25 requests clipped" in " ".join(table.split())


def test_a_run_until_a_late_failure_has_no_more_samples_than_any(plan: Path) -> None:
    found = hetis.load_plan(plan)
    load = Load(lengths=found.problem.workload, max_position=4096, arrivals=Arrivals.DRAWN, rate_rps=5.0)
    early, late = (Fault(at_s=at_s, device="a100/0") for at_s in (1.0, 1e9))
    assert sample_spacing_s(found.value, load, 100, (early,)) == 100 / 5.0 / SAMPLES
    assert sample_spacing_s(found.value, load, 100, (late, early)) == 1e9 / SAMPLES


def test_a_run_of_few_requests_is_sampled_as_long_as_one_takes(plan: Path) -> None:
    found = hetis.load_plan(plan)
    load = Load(lengths=found.problem.workload, max_position=4096, arrivals=Arrivals.DRAWN, rate_rps=1e6)
    request_s = 100 * prediction_of(found.value).tpot_s  # of 100 output tokens
    assert 1 / prediction_of(found.value).rate_rps < request_s / 10
    assert sample_spacing_s(found.value, load, 1) == pytest.approx(request_s / SAMPLES)


def test_expected_values_of_engines_that_run_more_than_was_planned_say_so(plan: Path, tmp_path: Path) -> None:
    document = json.loads(plan.read_text())
    for replica in document["replicas"]:
        replica["max_num_seqs"] = 2 * replica["micro_batch"] * replica["in_flight"]
    more = tmp_path / "plan.json"
    more.write_text(json.dumps(document))
    said = f"all requests that engines may run at once (up to {document['replicas'][0]['max_num_seqs']})"
    for path in (plan, more):
        found = invoke("simulate", str(path), "--requests", "100", "--rate", "5", "--threads", "1")
        assert (said in " ".join(found.stdout.split())) is (path is more)
    # A run with a setting of its own says what that changes.
    given = invoke("simulate", str(more), "--requests", "100", "--rate", "5", "--threads", "1", "--max-num-seqs", "8")
    assert "may run at once" not in given.stdout


def test_ctrl_c_gives_what_there_is(plan: Path) -> None:
    command = [*COMMAND, "simulate", str(plan), "--requests", "5000000", "--rate", "1", "--threads", "1", "-o", "json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
    ) as process:
        line = process.stderr.readline()
        while " 0 of " in line:  # no request has arrived within the first seconds of a busy machine
            line = process.stderr.readline()
        assert "simulating" in line
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["complete"] is False
    assert 0 < document["summary"]["counts"]["arrived"] < 5_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "0"), "'0' is out of range, must be above zero and finite"),
        (("--rate", "fast"), "'fast' is not a number of requests per second"),
        (("--saturate", "--rate", "1"), "--saturate and --rate cannot be combined"),
        (("--saturate", "--sweep"), "--saturate and --sweep cannot be combined"),
        (("--sweep", "--rate", "1"), "--sweep and --rate cannot be combined"),
        (("--sweep", "--requests-csv", "r.csv"), "--requests-csv shows a single run, not --sweep"),
        (("--recorded",), "--recorded needs --trace"),
        (("--saturate", "--cv", "2"), "--cv applies to random arrivals"),
        (("--recorded", "--trace", "500/100"), "500/100 is a distribution of lengths: it has no recorded arrivals"),
        (("--trace", "missing.csv"), "missing.csv: no such file"),
        (("--trace", "azure_con_2023"), "did you mean azure_conv_2023?"),
        (("--requests-csv", "/no/such/folder/r.csv"), "cannot be written: no folder /no/such/folder"),
        (("--requests-csv", "-"), "--requests-csv needs a file: it cannot write to standard output (-)"),
        (("--requests", "0"), "0 is out of range, must be at least 1"),
        (("--seeds", "0"), "0 is out of range, must be at least 1"),
        (("--fail", "a100/0"), "'--fail': 'a100/0' is not a device and a time such as a100/0@30s"),
        (("--join", "a100/0@soon"), "'--join': 'a100/0@soon': 'soon' is not a duration"),
        (("--fail", "a100/7@3s", "--join", "b/0@1s"), "no device 'a100/7' in the cluster"),
        (("--join", "a100/0@40s"), "a100/0 joins at 40 s, it has not failed before"),
        (("--fail", "a100/0@30s", "--join", "a100/0@20s"), "a100/0 joins at 20 s, it has not failed before"),
        (("--tolerance", "0"), "must be above 0"),
        (("--tolerance", "5%"), "--tolerance needs --sweep"),
        (("--attainment", "90%", "--ttft-statistic", "p99"), "no statistic is taken: leave out --ttft-statistic"),
        (("--tpot-statistic", "p99", "--tpot", "none"), "--tpot-statistic is given, but TPOT has no limit (--tpot)"),
        (("--attainment", "90%", "--ttft", "none", "--tpot", "none"), "but neither TTFT nor TPOT has a limit"),
        (("--attainment", "101%"), "'101%' is out of range, must be above 0 and at most 100%"),
        (("--attainment", "90%", "--saturate"), "--saturate and --attainment cannot be combined"),
        (("--ttft-statistic", "p99", "--saturate"), "--saturate and --ttft-statistic cannot be combined"),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_message(
    plan: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refusal(capsys, str(plan), *arguments)


def test_all_unknown_devices_are_named_at_once(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = refusal(capsys, str(plan), "--fail", "a100/9@1s", "--fail", "b/0@2s")
    assert "2 problems in the input" in err
    assert "'a100/9'" in err
    assert "'b/0'" in err


def test_every_bad_row_of_a_trace_is_named(plan: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text(HEADER + "0,100,10\n1,-5,10\n2,100,none\n")
    err = refusal(capsys, str(plan), "--trace", str(trace))
    assert f"{trace}:3: prompt_tokens: is -5, must be 1 to 10000000" in err
    assert f"{trace}:4: output_tokens: 'none' is not a whole number" in err


def test_a_plan_without_replicas_is_refused(plan: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = json.loads(plan.read_text())
    document["replicas"] = []
    (tmp_path / "empty.json").write_text(json.dumps(document))
    assert "the plan has no replicas" in refusal(capsys, str(tmp_path / "empty.json"))
