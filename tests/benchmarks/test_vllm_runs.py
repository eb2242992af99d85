"""Load stages against measured ones: how rows are posed, and the open loop."""

from __future__ import annotations

import pytest

from benchmarks.accuracy.vllm_runs import Run, open_loop, posed

ROW = {
    "run": "1", "gpu": "H100", "model": "meta-llama/Llama-3.1-8B-Instruct", "tp": "1", "max_num_batched_tokens": "2048",
    "rate_rps": "8", "prompt_tokens": "575", "output_tokens": "238", "e2e_mean_ms": "1892.7", "ttft_mean_ms": "25.2",
    "itl_mean_ms": "7.9",
}  # fmt: skip
RUN = Run(
    run="1", gpu="H100-SXM-80GB", model="m", tp=1, chunk_tokens=100, rate_rps=1.0, prompt_tokens=5000, output_tokens=4,
    measured_s=(1.0, 1.0, 1.0), others_s={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"gpu": "Z9"}, "unknown GPU"),
        ({"model": "no/such"}, "not in the catalogue"),
        ({"rate_rps": "fast"}, "no number"),
        ({"tp": "0"}, "not above 0"),
        ({"tp": "3"}, "do not divide"),
    ],
)
def test_bad_rows_are_skipped_and_counted(wrong: dict[str, str], reason: str) -> None:
    runs, skipped = posed([ROW, ROW | wrong])
    assert [run.rate_rps for run in runs] == [8.0]
    assert skipped.total() == 1
    assert reason in next(iter(skipped))


def test_iterations_of_one_second_give_latencies_that_can_be_counted() -> None:
    """A prompt whose 2% are 100 tokens fills one iteration; four tokens take four iterations."""
    first_s, last_s = open_loop(RUN, [0.0], lambda *contents: 1.0, lambda tokens: tokens)
    assert (first_s, last_s) == ([1.0], [4.0])
