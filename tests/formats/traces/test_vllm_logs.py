"""Iterations in vLLM's log: of the real server, of older versions, behind collectors, and never a crash."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats import vllm_logs
from hetis.formats.errors import DocumentError
from hetis.formats.vllm_logs import load_iteration_log, read_iterations
from tests.profiler.calibrate.logs import KV_TOKENS, SAMPLE, head, line, text_of


def test_a_log_of_the_real_server_is_read_whole() -> None:
    (log,) = load_iteration_log(str(SAMPLE)).servers
    text = SAMPLE.read_text()
    assert len(log.iterations) == text.count("Iteration(") > 100
    assert [one.index for one in log.iterations] == list(range(len(log.iterations)))
    assert (log.version, log.tp, log.pp, log.kv_tokens, log.block_tokens) == ("0.32.0", 1, 1, 131_072, 128)
    assert (log.max_tokens, log.budget_tokens) == (4096, None)
    assert (log.model, log.quantization, log.kv_dtype) == ("model", "None", "auto")
    first = next(one for one in log.iterations if one.context_requests and one.index >= 10)
    assert (first.index, first.context_tokens, first.elapsed_s, first.kv_ratio) == (12, 309, 0.6695, 0.003)
    assert not any(one.is_dummy or one.has_encoder or one.after_compiling for one in log.iterations)


def test_lines_of_older_versions_have_no_engine_and_no_use_of_the_cache() -> None:
    old = (
        "(EngineCore_DP1 pid=7) INFO 03-01 09:00:00 [core.py:346] Iteration(4): 1 context requests, 12 context tokens, "
        "3 generation requests, 3 generation tokens, iteration elapsed time: 8.25 ms\n"
    )
    (one,) = read_iterations("x", [old]).servers[0].iterations
    assert (one.engine, one.index, one.context_tokens, one.generation_requests) == (1, 4, 12, 3)
    assert (one.elapsed_s, one.kv_ratio) == (0.00825, None)


def test_marks_of_a_line_are_read() -> None:
    lines = [
        line(1, 0.01, decoding=1, dummy=True),
        line(2, 0.01, decoding=1, more=", encoder inputs: 2, encoder output embeddings: 600"),
        "(Worker pid=5) WARNING 11-23 16:40:00 [jit_monitor.py:9] Triton kernel JIT compilation during inference: f.\n",
        line(3, 0.9, decoding=1, engine=2),
        line(4, 0.01, decoding=1, engine=2),
    ]
    found = read_iterations("x", lines).servers[0].iterations
    assert [one.is_dummy for one in found] == [True, False, False, False]
    assert [one.has_encoder for one in found] == [False, True, False, False]
    assert [one.after_compiling for one in found] == [False, False, True, False]
    assert [one.engine for one in found] == [0, 0, 2, 2]


def test_a_collectors_time_is_finer_than_the_servers() -> None:
    plain, collected = line(1, 0.01, decoding=1), "2026-11-23T16:40:00.123456789Z " + line(1, 0.01, decoding=1)
    own, finer = read_iterations("x", [plain]), read_iterations("x", [collected])
    assert own.clock_step_s == 1.0
    assert finer.clock_step_s == 1e-3
    clock_s = finer.servers[0].iterations[0].clock_s
    assert clock_s is not None
    assert clock_s % 1 == pytest.approx(0.123456, abs=1e-6)


def test_colours_are_no_part_of_a_line() -> None:
    coloured = line(1, 0.01, decoding=1).replace("Engine 000", "\x1b[36mEngine 000\x1b[0m")
    assert read_iterations("x", [coloured]).servers[0].iterations[0].index == 1


def test_packed_files_and_standard_input_are_logs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of([line(1, 0.01, decoding=1)]).encode()
    packed = tmp_path / "vllm.log.gz"
    packed.write_bytes(gzip.compress(text))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    for log in (load_iteration_log(str(packed)), load_iteration_log("-")):
        assert [(len(server.iterations), server.kv_tokens) for server in log.servers] == [(1, KV_TOKENS)]
    packed.write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(DocumentError, match="is not a complete gzip file"):
        load_iteration_log(str(packed))


def test_what_is_no_such_log_says_how_to_make_one(tmp_path: Path) -> None:
    for text in ("", head(), "no log\n", "\x00\xff"):
        (tmp_path / "x.log").write_text(text)
        with pytest.raises(DocumentError, match="--enable-logging-iteration-details"):
            load_iteration_log(str(tmp_path / "x.log"))
    with pytest.raises(DocumentError, match="no such file"):
        load_iteration_log(str(tmp_path / "none.log"))
    with pytest.raises(DocumentError, match="is a folder"):
        load_iteration_log(str(tmp_path))


def test_a_long_log_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_logs, "MAX_ITERATIONS", 3)
    log = read_iterations("x", (line(i, 0.01, decoding=1) for i in range(5)))
    assert len(log.servers[0].iterations) == 3
    assert log.is_cut


def test_a_server_that_starts_again_is_another_one() -> None:
    """Its first settings are logged before its engines say that they start; a size that is said later adds to them."""
    lines = [
        head(tp=4),
        head(tp=4),  # of a second engine
        line(0, 0.01, decoding=1),
        line(1, 0.01, decoding=1),
        "(APIServer pid=5) INFO 11-23 16:50:00 [s.py:9] Chunked prefill is enabled with max_num_batched_tokens=2048.\n",
        head(tp=8).replace(f"{KV_TOKENS:,}", "100,000"),
        line(0, 0.01, decoding=1),
        "INFO 11-23 16:50:00 [c.py:9] block_size=32\n",
        line(1, 0.01, decoding=1),
    ]
    found = read_iterations("x", lines).servers
    settings = [(one.tp, one.kv_tokens, one.budget_tokens, one.block_tokens, len(one.iterations)) for one in found]
    assert settings == [(4, KV_TOKENS, None, None, 2), (8, 100_000, 2048, 32, 2)]


_PARTS = st.sampled_from(
    [
        "Iteration(", "): ", "9" * 400, "-1", "\u0663", "1.5", "0", "\n", ",,,", "\x1b[3", "(dummy)", "13-45 99:99:99",
        " context requests, ", " context tokens, ", " generation requests, ", " generation tokens, iteration",
        " elapsed time: ", " ms", " KV cache size: ", " tokens", "2026-13-45T99:99:99.9", "tensor_parallel_size=",
        "block_size: ", line(1, 0.01, decoding=1), line(2, 9e5, prompts=1, chunk=999_999_999, used=9.99),
    ]
)  # fmt: skip


@given(st.lists(st.one_of(_PARTS, st.text(max_size=20)), max_size=40))
def test_reading_never_crashes(parts: list[str]) -> None:
    try:
        log = read_iterations("x", "".join(parts).splitlines(keepends=True))
    except DocumentError:
        return
    assert all(server.iterations for server in log.servers)
    assert log.servers
    assert all(one.elapsed_s >= 0 and one.context_tokens >= 0 for server in log.servers for one in server.iterations)
