"""An iteration in a log: its contents, its context, and the time between lines."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.vllm_logs import load_iteration_log, read_iterations
from hetis.profiler.calibrate.between import between_iterations
from hetis.profiler.calibrate.iterations import NO_GAP, observed_in_log
from hetis.profiler.calibrate.observed import Observed, ObservedWork
from tests.profiler.calibrate.logs import KV_TOKENS, SAMPLE, head, line, text_of


def read(lines: Sequence[str], *, context: float | None = None, pp: int = 1, tp: int = 1) -> Observed:
    log = read_iterations("x", text_of(lines, pp=pp, tp=tp).splitlines(keepends=True))
    return observed_in_log("x", log, context_tokens=context)


def works(found: Observed) -> list[ObservedWork]:
    return [work for one in found.observations for _, work in one.parts]


def test_the_real_servers_log_has_every_kind() -> None:
    log = load_iteration_log(str(SAMPLE))
    found = observed_in_log("x", log)
    assert found.left_out == {"first 10 of an engine": 10}
    assert len(found.observations) == len(log.servers[0].iterations) - 10
    assert {work.kind.value for work in works(found)} == {"decode", "mixed", "prefill"}
    assert found.origin == "vLLM 0.32.0"
    assert found.tp == 1
    assert all(one.attended_tokens >= one.decoding for one in works(found))


def test_requests_attend_to_the_kv_that_was_in_use_before() -> None:
    """10% of the cache, less half a block of 16 for each of 4 requests. Lines state the share at an iteration's end."""
    found = read([line(20 + i, 0.01, decoding=4, used=used) for i, used in enumerate((0.1, 0.5, 0.9))])
    before = [(one.attended_tokens + 4 * 7.5) / KV_TOKENS for one in works(found)]
    assert before == pytest.approx([0.1, 0.1, 0.5])  # the first iteration has no line before it, and uses its own share


def test_the_context_that_is_given_goes_before_the_logs() -> None:
    found = read([line(20, 0.01, decoding=4, used=None)], context=500.0)
    assert works(found)[0].attended_tokens == 2000.0
    with pytest.raises(DocumentError, match="has no KV cache usage: --context"):
        read([line(20, 0.01, decoding=4, used=None)])
    log = read_iterations("x", [line(20, 0.01, decoding=4)])
    with pytest.raises(DocumentError, match=r"has no KV cache size \(a line of the server's start\): --context"):
        observed_in_log("x", log)


def test_a_prompt_that_fills_iterations_has_its_past() -> None:
    """Chunks of 2000, 2000 and 1000 tokens in iterations of at most 2002, beside two requests that decode."""
    lines = [
        line(20, 0.05, prompts=1, chunk=2000, decoding=2),
        line(21, 0.05, prompts=1, chunk=2000, decoding=2),
        line(22, 0.03, prompts=1, chunk=1000, decoding=2),
        line(23, 0.03, prompts=1, chunk=700, decoding=2),
    ]
    found = works(read(lines))
    assert [work.past_tokens for work in found] == [0, 2000, 4000, 0]
    held = 0.1 * KV_TOKENS - 2 * 7.5
    assert [work.attended_tokens for work in found] == pytest.approx([held, held - 2000, held - 4000, held])


def served_alone(prompts: int, *, chunk: int, answers: int = 3) -> list[str]:
    """Return iterations of prompts of one length, one at a time, each with ``answers`` further iterations."""
    lines = list[str]()
    for _ in range(prompts):
        lines.append(line(20 + len(lines), 0.03, prompts=1, chunk=chunk, used=0.003))
        lines += [line(20 + len(lines) + i, 0.008, decoding=1, used=0.003) for i in range(answers)]
    return lines


def test_prompts_of_one_length_do_not_continue_each_other() -> None:
    found = works(read(served_alone(5, chunk=1000)))
    assert {work.past_tokens for work in found} == {0.0}
    held = 0.003 * KV_TOKENS - 7.5
    assert [work.attended_tokens for work in found if work.decoding] == pytest.approx([held] * 15)


def test_prompts_of_one_length_that_fill_the_budget_end_where_they_decode() -> None:
    budget = "Chunked prefill is enabled with max_num_batched_tokens=1000.\n"
    found = works(read([budget, *served_alone(5, chunk=1000)]))
    assert {work.past_tokens for work in found} == {0.0}
    two_at_a_time = [
        budget,
        line(20, 0.03, prompts=1, chunk=999, decoding=1),
        line(21, 0.03, prompts=1, chunk=998, decoding=2),
        line(22, 0.03, prompts=1, chunk=400, decoding=2),  # the second prompt's rest
    ]
    assert [work.past_tokens for work in works(read(two_at_a_time))] == [0, 0, 998]


def test_prompts_of_one_length_that_replace_answered_requests_do_not_continue() -> None:
    """As a closed loop sends them: each begins as another request ends, so that equally many decode throughout."""
    lines = [line(20 + i, 0.05, prompts=1, chunk=1998, decoding=2) for i in range(4)]
    lines += [line(24 + i, 0.01, decoding=3) for i in range(20)]
    assert {work.past_tokens for work in works(read(lines))} == {0.0}


def test_the_budget_in_the_log_tells_which_prompts_continue() -> None:
    """Without it, 1,500 tokens look like an iteration that was filled."""
    lines = [line(20 + i, 0.05, prompts=1, chunk=chunk, decoding=2) for i, chunk in enumerate((1498, 1498, 700))]
    assert [work.past_tokens for work in works(read(lines))] == [0, 1498, 2996]
    budget = "INFO 11-23 16:40:00 [s.py:9] Chunked prefill is enabled with max_num_batched_tokens=8192.\n"
    assert [work.past_tokens for work in works(read([budget, *lines]))] == [0, 0, 0]


def test_a_past_longer_than_requests_may_be_is_none() -> None:
    """Prompts that fill the budget and whose only token is their first one never decode."""
    budget = "INFO 11-23 16:40:00 [s.py:9] Chunked prefill is enabled with max_num_batched_tokens=1000.\n"
    lines = [budget, *(line(20 + i, 0.05, prompts=1, chunk=1000) for i in range(6))]
    log = read_iterations("x", text_of(lines).splitlines(keepends=True))
    found = observed_in_log("x", log, max_tokens=2500)
    assert [work.past_tokens for work in works(found)] == [0, 1000, 0, 1000, 0, 1000]


def test_servers_of_one_log_have_their_own_settings() -> None:
    lines = [
        *(line(20 + i, 0.01, decoding=4) for i in range(2)),
        head().replace(f"{KV_TOKENS:,}", "100,000"),
        *(line(20 + i, 0.01, decoding=4) for i in range(2)),
    ]
    held = [(one.attended_tokens + 4 * 7.5) for one in works(read(lines))]
    assert held == pytest.approx([40_000, 40_000, 10_000, 10_000])


def test_servers_that_differ_in_what_is_calibrated_are_refused() -> None:
    one = [line(20, 0.01, decoding=1)]
    with pytest.raises(DocumentError, match="is of servers with TP degrees 4 and 8, one after the other: split it"):
        read([*one, head(tp=8), *one], tp=4)
    with pytest.raises(DocumentError, match="is of servers with models m and n, one after the other: split it"):
        read([*one, head().replace("model='m'", "model='n'"), *one])
    with pytest.raises(DocumentError, match="2 pipeline stages, whose iterations overlap"):
        read([*one, head(), *one], pp=2)


def test_what_is_no_observation_is_counted_by_reason() -> None:
    lines = [
        *(line(i, 0.5, decoding=1) for i in range(10)),
        line(10, 0.01, decoding=1, dummy=True),
        line(11, 0.01, decoding=2, tokens=6),
        line(12, 0.01, decoding=1, more=", encoder inputs: 1, encoder output embeddings: 99"),
        line(13, 0.01),
        "(Worker pid=5) WARNING 11-23 16:40:00 [j.py:9] Triton kernel JIT compilation during inference: f.\n",
        line(14, 0.01, decoding=1),
        line(15, 0.0, decoding=1),
        line(16, 0.01, decoding=1),
    ]
    found = read(lines)
    assert found.left_out == {
        "first 10 of an engine": 10,
        "idle data-parallel rank": 1,
        "several tokens of a sequence (speculative decoding, or preempted and computed again)": 1,
        "encoded images or sound": 1,
        "computed nothing": 1,
        "compiled a kernel": 1,
        "took no time": 1,
    }
    assert len(found.observations) == 1


def test_a_pipelines_log_is_refused() -> None:
    with pytest.raises(DocumentError, match="2 pipeline stages, whose iterations overlap"):
        read([line(20, 0.01, decoding=1)], pp=2)


def steady(count: int, *, elapsed_s: float, period_s: float, start: int = 20, at_s: float = 0.0) -> list[str]:
    return [line(start + i, elapsed_s, decoding=1, at_s=at_s + i * period_s) for i in range(count)]


def test_time_between_iterations_is_that_of_the_clock() -> None:
    """8 ms of waiting every 10 ms, for 40 s by a clock of whole seconds; then a pause, which does not count."""
    lines = steady(4000, elapsed_s=0.008, period_s=0.010)
    lines += [line(4020, 0.02, prompts=1, chunk=10, at_s=500.0)]
    lines += steady(4000, elapsed_s=0.008, period_s=0.010, start=4021, at_s=500.02)
    found = read(lines)
    assert found.observations[0].seconds == pytest.approx(0.010, rel=0.01)
    assert found.notes == ()


def test_engines_are_stretches_of_their_own() -> None:
    both = [
        text
        for i in range(4000)
        for text in (
            line(20 + i, 0.008, decoding=1, at_s=i * 0.01),
            line(20 + i, 0.004, decoding=1, at_s=i * 0.01, engine=1),
        )
    ]
    gap_s = between_iterations(read_iterations("x", both)).seconds
    assert gap_s == pytest.approx(0.004, rel=0.05)  # 2 ms in the first, 6 ms in the second


def test_a_clock_that_is_too_coarse_is_said() -> None:
    found = read(steady(100, elapsed_s=0.008, period_s=0.010))
    assert found.notes == (NO_GAP,)
    assert found.observations[0].seconds == 0.008


def test_a_clock_that_is_set_back_tells_nothing() -> None:
    lines = steady(2000, elapsed_s=0.008, period_s=0.010, at_s=1000.0)
    lines += steady(2000, elapsed_s=0.008, period_s=0.010, start=2020, at_s=0.0)
    gap_s = between_iterations(read_iterations("x", lines)).seconds
    assert gap_s == pytest.approx(0.002, abs=0.0005)


@pytest.mark.parametrize("pause_s", [0.9, 10.0, 3600.0])
def test_a_pause_is_no_time_of_iterations(pause_s: float) -> None:
    """The host stands still once, or its clock is set forward, in 40 seconds with 2 ms between iterations."""
    lines = steady(2500, elapsed_s=0.008, period_s=0.010)
    lines += steady(1500, elapsed_s=0.008, period_s=0.010, start=2520, at_s=25.0 + pause_s)
    found = read(lines)
    assert found.observations[0].seconds == pytest.approx(0.010, abs=0.0002)
    assert ["while requests run: 1, of " in note for note in found.notes] == ([True] if pause_s > 3 else [])


def test_a_server_that_logs_late_tells_the_same() -> None:
    """Its lines wait for 20 seconds, and then come at once."""
    lines = [line(20 + i, 0.008, decoding=1, at_s=max(i * 0.01, 20.0 * (500 < i < 2500))) for i in range(6000)]
    gap_s = between_iterations(read_iterations("x", lines)).seconds
    assert gap_s == pytest.approx(0.002, abs=0.0005)
