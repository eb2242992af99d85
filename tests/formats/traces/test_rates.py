"""Histograms, means and rates become workloads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.coverage import KNOWN, is_log_right
from hetis.formats.errors import DocumentError
from hetis.formats.traces.rates import measured, of_histograms, of_metrics
from hetis.formats.workload import load_workload

BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, float("inf"))


def histogram(metric: str, cumulative: list[int], total: int, *, model: str = "m") -> str:
    of = f'engine="0",model_name="{model}"'
    rows = [
        f'{metric}_bucket{{{of},le="{"+Inf" if bound > 1e6 else float(bound)}"}} {float(count)}'
        for bound, count in zip(BOUNDS, cumulative, strict=True)
    ]
    return "\n".join([f"# TYPE {metric} histogram", *rows, f"{metric}_sum{{{of}}} {total}", ""])


SCRAPE = (
    histogram("vllm:request_prompt_tokens", [0, 0, 0, 0, 0, 0, 0, 40, 100, 100, 100], 30_000)
    + histogram("vllm:request_generation_tokens", [0, 0, 0, 0, 0, 100, 100, 100, 100, 100, 100], 4_000)
    + "process_start_time_seconds 1764000000.0\n"
)


def test_a_scrape_has_lengths_whose_means_are_its_sums_and_the_rate_since_the_start() -> None:
    found = of_metrics("m", SCRAPE, name="m", at_s=1764000050.0)
    moments = found.workload.moments()
    assert (moments.mean_prompt, moments.mean_output) == (pytest.approx(300.0), pytest.approx(40.0))
    assert found.workload.rate_rps == pytest.approx(2.0)
    assert len(found.workload.bins) == 2
    assert "the rate is the mean over 0.0139 h since the server's start" in found.notes


def test_a_scrape_is_a_workload_of_place(tmp_path: Path) -> None:
    for name in ("metrics.prom", "metrics.txt"):
        (tmp_path / name).write_text(SCRAPE)
        os.utime(tmp_path / name, (1764000100, 1764000100))
        assert load_workload(tmp_path / name).rate_rps == pytest.approx(1.0)


def test_a_server_without_histograms_has_mean_lengths() -> None:
    """SGLang has none of lengths unless it is told to; each of its two counts of requests will do."""
    totals = 'sglang:prompt_tokens_total{tp_rank="0"} 8.0e+06\nsglang:generation_tokens_total{tp_rank="0"} 2.0e+06\n'
    for count in ("sglang:num_requests_total", "sglang:e2e_request_latency_seconds_count"):
        text = f'{totals}{count}{{tp_rank="0"}} 10000.0\nprocess_start_time_seconds 1764000000.0\n'
        found = of_metrics("m", text, name="m", at_s=1764005000.0)
        moments = found.workload.moments()
        assert (moments.mean_prompt, moments.mean_output, found.workload.rate_rps) == (800.0, 200.0, 2.0)
        assert [note for note in found.notes if "all requests have the mean lengths" in note]
    with pytest.raises(DocumentError, match="has no vllm:request_prompt_tokens_bucket nor sglang:prompt_tokens_hist"):
        of_metrics("m", totals, name="m")


def test_models_in_one_scrape_are_said() -> None:
    both = SCRAPE + histogram("vllm:request_prompt_tokens", [0] * 10 + [100], 200_000, model="n")
    found = of_metrics("m", both, name="m")
    assert found.workload.rate_rps is None
    assert found.notes[0] == "it has requests of 2 models together: m, n"


def answer(points: dict[str, list[tuple[float, int]]], kind: str) -> str:
    """Return Prometheus' answer with these counters; in a vector each has one point."""
    result = []
    for key, found in points.items():
        name, bound = key.split()
        labels = {"__name__": f"vllm:request_{name}_tokens_bucket", "le": "+Inf" if bound == "1" else "500.0"}
        values = [[at, str(count)] for at, count in found]
        result.append({"metric": labels} | ({"value": values[0]} if kind == "vector" else {"values": values}))
    return json.dumps({"status": "success", "data": {"resultType": kind, "result": result}})


def test_an_answer_of_prometheus_has_the_increase_of_its_counters(tmp_path: Path) -> None:
    # From 100 requests to 160, then a restart, and 40 more: 100 in an hour; a quarter of the prompts is longer.
    whole, short = [(0.0, 100), (1800.0, 160), (3600.0, 40)], [(0.0, 75), (1800.0, 120), (3600.0, 30)]
    text = answer({"prompt 1": whole, "prompt 5": short, "generation 5": whole, "generation 1": whole}, "matrix")
    (tmp_path / "range.json").write_text(text)
    found = measured(str(tmp_path / "range.json"))
    assert found is not None
    assert (found.num_requests, found.workload.rate_rps) == (100.0, pytest.approx(100 / 3600))
    assert sorted({one.prompt_tokens: 0 for one in found.workload.bins}) == [250.5, 750.0]
    assert [note for note in found.notes if "rate" in note] == ["the rate is the mean over 1 h"]
    now = answer({"prompt 1": whole[:1], "generation 1": whole[:1]}, "vector")
    (tmp_path / "now.json").write_text(now)
    found = measured(str(tmp_path / "now.json"))
    assert found is not None
    assert (found.num_requests, found.workload.rate_rps) == (100.0, None)
    (tmp_path / "no.json").write_text(now.replace('"100"', '"x"'))
    with pytest.raises(DocumentError, match="is no answer of Prometheus to a query of counters"):
        measured(str(tmp_path / "no.json"))


def test_a_scrape_may_have_line_ends_of_windows() -> None:
    assert of_metrics("m", SCRAPE.replace("\n", "\r\n"), name="m") == of_metrics("m", SCRAPE, name="m")


@given(st.lists(st.integers(0, 50), min_size=3, max_size=9).filter(any), st.floats(0, 1))
def test_lengths_lie_within_their_buckets_and_have_the_mean(counts: list[int], place: float) -> None:
    bounds = [10.0 * 2**i for i in range(len(counts))]
    lows, total = [1.0, *bounds], 0.0
    cumulative = dict[float, float]()
    for i, count in enumerate(counts):
        total += count * (lows[i] + place * (bounds[i] - lows[i]))
        cumulative[bounds[i]] = float(sum(counts[: i + 1]))
    found = of_histograms("m", [(cumulative, total), ({1.0: 7.0}, 7.0)], name="m", form="f", rate_rps=1.0)
    assert found.workload.moments().mean_prompt == pytest.approx(total / sum(counts))
    for one in found.workload.bins:
        assert any(low <= one.prompt_tokens * (1 + 1e-9) and one.prompt_tokens <= high * (1 + 1e-9)
                   for low, high, n in zip(lows, bounds, counts, strict=False) if n)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            SCRAPE.replace("_prompt_tokens", "_other"),
            "has no vllm:request_prompt_tokens_bucket nor sglang:prompt_tokens",
        ),
        (SCRAPE.replace("} 40.0", "} 400.0"), "counts 100 requests of at most 500 tokens, but 400 below that"),
        (SCRAPE.replace("} 100.0", "} 0").replace("} 40.0", "} 0"), "counts no requests"),
        (SCRAPE.replace('le="500.0"', 'le="x"'), "^m:10: vllm:request_prompt_tokens_bucket: .* to float: 'x'"),
        (SCRAPE.replace("} 30000", "} 3e+nan"), "^m:13: vllm:request_prompt_tokens_sum: .* to float: '3e.nan'"),
    ],
)
def test_wrong_histograms_are_refused(text: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        of_metrics("m", text, name="m")


def info(second: int, prompt: float, output: float) -> str:
    return (
        f"(APIServer pid=1) INFO 11-22 10:00:{second:02} [loggers.py:259] Engine 000: Avg prompt throughput: {prompt} "
        f"tokens/s, Avg generation throughput: {output} tokens/s, Running: 3 reqs, Waiting: 0 reqs, "
        "GPU KV cache usage: 1.2%, Prefix cache hit rate: 25.0%\n"
    )


ACCESS = '(APIServer pid=1) INFO:     10.0.0.1:39000 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'


def test_info_lines_of_vllm_are_rates(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text(info(0, 300.0, 40.0) + ACCESS * 4 + info(10, 300.0, 40.0) + ACCESS * 2 + info(20, 0.0, 40.0))
    found = measured(str(path))
    assert (found.form, found.workload.rate_rps) == ("vLLM's INFO lines", pytest.approx(6 / 30))
    moments = found.workload.moments()
    assert (moments.mean_prompt, moments.mean_output) == (pytest.approx(1000.0), pytest.approx(200.0))
    assert "25% of prompts were in the prefix cache: --prefix-hit-rate 0.25 counts that" in found.notes
    path.write_text(info(0, 300.0, 40.0) + info(10, 300.0, 40.0))
    with pytest.raises(DocumentError, match=r"has 300 tokens/s of prompts and 40 of outputs, but no line of a request"):
        measured(str(path))


def test_batches_of_sglang_are_rates(tmp_path: Path) -> None:
    def line(second: int, text: str) -> str:
        return f"[2026-05-20 08:02:{second:02} TP0] {text}\n"

    decode = (
        "Decode batch, #running-req: 4, #token: 477, token usage: 0.90, gen throughput (token/s): 50.0, #queue-req: 6"
    )
    prefill = "Prefill batch, #new-seq: 2, #new-token: 700, #cached-token: 100, token usage: 0.00, #queue-req: 0"
    path = tmp_path / "server.log"
    path.write_text(line(0, decode) + line(2, prefill) + line(4, decode) + line(8, prefill) + line(10, decode))
    workload = load_workload(path)
    assert workload.rate_rps == pytest.approx(0.4)
    assert (workload.bins[0].prompt_tokens, workload.bins[0].output_tokens) == (400.0, 125.0)


def test_reports_of_means_have_one_length(tmp_path: Path) -> None:
    path = tmp_path / "profile_export_genai_perf.json"
    means = {"input_sequence_length": 200.0, "output_sequence_length": 50.0, "request_throughput": 4.0}
    path.write_text(json.dumps({name: {"unit": "tokens", "avg": value} for name, value in means.items()}))
    workload = load_workload(path)
    assert (workload.rate_rps, workload.bins[0].prompt_tokens, workload.bins[0].output_tokens) == (4.0, 200.0, 50.0)
    run = {
        "backend": "sglang",
        "duration": 10.0,
        "completed": 40,
        "total_input_tokens": 4000,
        "total_output_tokens": 800,
    }
    (tmp_path / "online.jsonl").write_text(json.dumps(run) + "\n" + json.dumps(run | {"completed": 20}) + "\n")
    assert load_workload(tmp_path / "online.jsonl").rate_rps == pytest.approx(3.0)
    done = {"count": 60, "prompt_len": {"mean": 100.0}, "output_len": {"mean": 50.0}}
    summary = {"load_summary": {"count": 60}, "successes": done | {"throughput": {"requests_per_sec": 1.5}}}
    (tmp_path / "summary_lifecycle_metrics.json").write_text(json.dumps(summary))
    workload = load_workload(tmp_path / "summary_lifecycle_metrics.json")
    assert (workload.rate_rps, workload.bins[0].prompt_tokens, workload.bins[0].output_tokens) == (1.5, 100.0, 50.0)


def test_what_bench_serving_prints_has_means(tmp_path: Path) -> None:
    (tmp_path / "bench.txt").write_text(
        "INFO starting\n============ Serving Benchmark Result ============\n"
        "Successful requests:                     1000      \nBenchmark duration (s):                  500.00    \n"
        "Total input tokens:                      219000    \nTotal generated tokens:                  184000    \n"
        "Request throughput (req/s):              2.00      \n"
    )
    workload = load_workload(tmp_path / "bench.txt")
    assert (workload.rate_rps, workload.bins[0].prompt_tokens, workload.bins[0].output_tokens) == (2.0, 219.0, 184.0)


@pytest.mark.parametrize("path", sorted((KNOWN / "logs").iterdir()), ids=lambda path: path.name)
def test_logs_of_all_tools_have_the_lengths_and_the_rate_of_their_requests(path: Path) -> None:
    assert is_log_right(path)


def test_llama_cpp_has_requests_without_times(tmp_path: Path) -> None:
    """Its timings lack a request that has not ended."""
    one = "prompt eval time = 120.0 ms / 374 tokens (0.3 ms per token)\n       eval time = 9.0 ms / 44 tokens (22 ms)\n"
    (tmp_path / "l.log").write_text(one + one.splitlines()[0])
    found = measured(str(tmp_path / "l.log"))
    assert found is not None
    assert (found.num_requests, found.workload.rate_rps) == (1, None)
    assert "the log has no times: give --demand" in found.notes
