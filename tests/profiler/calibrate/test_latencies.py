"""Latencies that clients measure correct a profile's host times, by nothing else than what `vllm bench serve` saves."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.traces.latencies import TimedRequest, load_latencies
from hetis.profiler.calibrate.correction import calibrate
from hetis.profiler.calibrate.latencies import observed_in_latencies
from hetis.profiler.calibrate.observed import ObservedWork
from hetis.profiler.cli.exit_codes import ProfileExitCode
from tests.profiler.calibrate.truth import GPU, MODEL, Truth, replica
from tests.profiler.command_line import invoke


@dataclass
class Served:
    start_s: float
    prompt: int
    output: int
    times: list[float] = field(default_factory=list)


def serve(truth: Truth, *, per_s: float, seconds: float, prompt: int = 256, output: int = 256) -> dict[str, Any]:
    """Return the report of clients of an engine with these times, which computes whole prompts beside its decodes."""
    rng, at_s, waiting = random.Random(7), 0.0, list[Served]()
    while at_s < seconds:
        at_s += rng.expovariate(per_s)
        lengths = rng.randrange(prompt // 2, 2 * prompt), rng.randrange(output // 2, 2 * output)
        waiting.append(Served(at_s, *lengths))
    requests, running, clock = list(waiting), list[Served](), 0.0
    while waiting or running:
        clock = max(clock, waiting[0].start_s) if not running else clock
        fresh = [one for one in waiting if one.start_s <= clock]
        waiting = waiting[len(fresh) :]
        context = sum(one.prompt + len(one.times) for one in running)
        chunk = float(sum(one.prompt for one in fresh))
        clock += truth.seconds(
            ObservedWork(decoding=len(running), attended_tokens=context, prompts=float(len(fresh)), chunk_tokens=chunk),
            rng,
        )
        for one in (running := running + fresh):
            one.times.append(clock + rng.uniform(0.0, 2e-4))  # the way to the client
        running = [one for one in running if len(one.times) < one.output]
    return {
        "start_times": [one.start_s for one in requests],
        "input_lens": [one.prompt for one in requests],
        "output_lens": [one.output for one in requests],
        "ttfts": [one.times[0] - one.start_s for one in requests],
        "itls": [[b - a for a, b in zip(one.times, one.times[1:], strict=False)] for one in requests],
        "errors": ["" for _ in requests],
    }


@pytest.mark.parametrize(("step_s", "sequence_s"), [(2e-3, 10e-6), (0.4e-3, 60e-6)])
def test_a_minute_of_latencies_tells_the_hosts_time(step_s: float, sequence_s: float, tmp_path: Path) -> None:
    truth = Truth(kernels=1.0, step_s=step_s, sequence_s=sequence_s, noise=0.02)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(serve(truth, per_s=8.0, seconds=60.0)))
    observed = observed_in_latencies(str(path), load_latencies(str(path)))
    found = calibrate(observed, replica())
    assert found.judged[-1].after.mape < 0.02 < found.judged[-1].before.mape
    for batch in (2.0, 24.0):  # what an iteration takes, whichever parameters say so
        work = ObservedWork(decoding=batch, attended_tokens=batch * 400)
        predicted = Truth(
            **{
                name: one.after for name, one in zip(("kernels", "step_s", "sequence_s"), found.parameters, strict=True)
            },
            noise=0.0,
        )
        exact = Truth(kernels=1.0, step_s=step_s, sequence_s=sequence_s, noise=0.0).seconds(work, random.Random(0))
        assert predicted.seconds(work, random.Random(0)) == pytest.approx(exact, rel=0.03)


def test_who_decodes_is_told_by_the_times_of_tokens() -> None:
    long = TimedRequest(start_s=0, prompt_tokens=100, output_tokens=11, token_s=tuple(0.1 * n for n in range(1, 12)))
    short = TimedRequest(start_s=0.35, prompt_tokens=50, output_tokens=4, token_s=(0.5, 0.6, 0.7, 0.8))
    failed = TimedRequest(start_s=0.95, prompt_tokens=50, output_tokens=0, token_s=(0.95,), has_failed=True)
    observed = observed_in_latencies("bench.json", [long, short, failed])
    seen = [(round(one.seconds, 6), one.parts[0][1]) for one in observed.observations]
    assert seen == [
        (0.1, ObservedWork(decoding=1, attended_tokens=100 + 1.5)),  # tokens 2 and 3 of the first
        (0.1, ObservedWork(decoding=2, attended_tokens=100 + 6.0 + 50 + 2.0)),  # from 0.5 to 0.8 s
    ]
    assert sum(observed.left_out.values()) == 2  # 0.8 to 0.95, and from there to the end
    assert observed.notes == ("1 requests failed: how long the server worked on them is not known",)


REPORT = serve(Truth(), per_s=2.0, seconds=3.0, output=4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"itls": None}, "has no list itls of each request: save it with vllm bench serve --save-result --save-det"),
        ({"ttfts": [0.1]}, "has lists of different lengths: "),
        ({"ttfts": ["x", *REPORT["ttfts"][1:]]}, "ttfts[0]: is 'x', must be a number from 0 to 1e+12"),
        ({"itls": [[float("nan")], 5, *REPORT["itls"][2:]]}, "itls[1]: is 5, must be a list"),
        ({"errors": ["refused"] * len(REPORT["ttfts"])}, "has no request that was answered"),
        ({"itls": [one[:1] for one in REPORT["itls"]]}, "answers with several tokens at once"),
    ],
)
def test_what_is_no_report_of_latencies_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(REPORT | changed))
    with pytest.raises(DocumentError) as refused:
        observed_in_latencies(str(path), load_latencies(str(path)))
    assert message in str(refused.value)


def test_the_command_reads_a_report_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "bench.json", tmp_path / "profile.json"
    path.write_text(json.dumps(serve(Truth(kernels=1.0, step_s=3e-3), per_s=6.0, seconds=30.0)))
    arguments = ("--from-vllm", path, "-m", MODEL, "--gpu", GPU, "--out", out)
    assert invoke("calibrate", *arguments) == ProfileExitCode.OK
    printed = capsys.readouterr().out
    assert "stretches, evaluated on" in " ".join(printed.split())
    assert "host, each iteration" in printed
    assert out.exists()
