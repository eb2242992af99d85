"""`hetis-profile calibrate` as its users see it: a log or a server in, a profile and its error out."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.profile import load_profile, profile_to_data
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.engines import ENGINES
from hetis.solver.profile import Op, Piece
from tests.planner.command_line import hetis_plan_here
from tests.profiler.calibrate.logs import KV_TOKENS, SAMPLE, line, prom, text_of
from tests.profiler.calibrate.test_scraping import CACHE, ZERO, counters, server
from tests.profiler.calibrate.truth import GPU, MODEL, Truth, works
from tests.profiler.command_line import hetis_profile, invoke

TRUTH = Truth(kernels=1.5, step_s=2e-3, sequence_s=12e-6, noise=0.02)
BETWEEN_S = 1e-3  # part of an iteration's time in which the engine does not wait


def write_log(path: Path, truth: Truth = TRUTH, count: int = 1500) -> Path:
    """Write the log of an engine with these times, which is never idle."""
    rng, at_s, lines = random.Random(3), 0.0, []
    for index, work in enumerate(works(count, alone=0.0)):
        seconds = truth.seconds(work, rng)
        at_s += seconds
        if lines:  # the line before an iteration states the cache's use at its beginning
            lines[-1] = lines[-1].replace("usage: 0.0%", f"usage: {_used(work.attended_tokens, work.decoding):.1f}%")
        counts = {"prompts": int(work.prompts), "chunk": int(work.chunk_tokens), "decoding": int(work.decoding)}
        lines.append(line(20 + index, seconds - BETWEEN_S, **counts, used=0.0, at_s=at_s))
    path.write_text(text_of(lines))
    return path


def _used(attended_tokens: float, decoding: float) -> float:
    return (attended_tokens + 7.5 * decoding) / KV_TOKENS * 100


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("logs") / "vllm.log")


def test_a_log_corrects_the_shipped_profile(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    arguments = ("--from-vllm", log, "--model", MODEL, "--gpu", GPU, "--out", out)
    assert invoke("calibrate", *arguments, "-o", "json") == ProfileExitCode.OK
    report = json.loads(capsys.readouterr().out)
    after = {one["name"]: one["after"] for one in report["parameters"]}
    assert after["kernels"] == pytest.approx(TRUTH.kernels, rel=0.05)
    assert after["step"] == pytest.approx(TRUTH.step_s, rel=0.15)
    assert after["sequence"] == pytest.approx(TRUTH.sequence_s, rel=0.25)
    whole = report["errors"][-1]
    assert whole["kind"] == "all"
    assert whole["after"]["mape"] < 0.05 < 0.15 < whole["before"]["mape"]
    assert report["fitted"] + report["judged"] == 1500
    assert (report["tp"], report["engine"], report["out"]) == (1, "vLLM 0.32.0", str(out))
    corrected, shipped = load_profile(out), shipped_profile(GPU)
    assert corrected.gpu == GPU
    assert [fit.pieces for fit in corrected.fits if fit.op is Op.TRANSFER] == [
        fit.pieces for fit in shipped.fits if fit.op is Op.TRANSFER
    ]


def test_a_type_that_only_the_profile_names_is_not_checked_which_is_said(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, own = tmp_path / "known.json", tmp_path / "own.json"
    assert invoke("model", GPU, "--out", known) == ProfileExitCode.OK
    own.write_text(json.dumps(json.loads(known.read_text()) | {"gpu": "X1"}))
    arguments = ("--from-vllm", log, "--model", MODEL, "--profile", own, "--out", tmp_path / "corrected.json")
    assert invoke("calibrate", *arguments) == ProfileExitCode.OK
    assert "X1 is not in the catalogue: rates and memory were not checked" in " ".join(capsys.readouterr().err.split())


def test_a_corrected_profile_is_planned_with(log: Path, tmp_path: Path) -> None:
    """The plan is slower by the engine's overhead, and a corrected profile needs no further correction."""
    arguments = ("--from-vllm", str(log), "--model", MODEL)
    done = hetis_profile("calibrate", *arguments, "--gpu", GPU, "--out", "p.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written to p.yaml" in done.stderr
    cluster = tmp_path / "c.yaml"
    cluster.write_text(
        f"{{apiVersion: hetis/v1, kind: Cluster, name: c, nodes: [{{name: n, gpus: [{{type: {GPU}}}]}}], "
        "network: {bandwidth: 10GB/s, latency: 10us}}\n"
    )
    plan = ("place", "--cluster", "c.yaml", "--model", MODEL, "--workload", "300/50", "--objective", "throughput")
    rates = []
    for profile in ((), ("--profile", "p.yaml")):
        placed = hetis_plan_here(*plan, *profile, "--no-verify", "-o", "json", cwd=tmp_path)
        assert placed.returncode == 0, placed.stderr
        rates.append(json.loads(placed.stdout)["result"]["value"])
    assert rates[1] < rates[0]

    again = hetis_profile("calibrate", *arguments, "--profile", "p.yaml", "--out", "q.json", cwd=tmp_path)
    assert again.returncode == ProfileExitCode.MISSED, again.stderr
    assert "no correction reduces the error on held-out data: q.json was not written" in again.stderr
    assert not (tmp_path / "q.json").exists()


def test_without_a_file_the_profile_of_plans_for_vllm_is_corrected(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--from-vllm", log, "--model", MODEL, "--gpu", GPU, "--out", tmp_path / "p.json", "-o", "json")
    assert invoke("calibrate", *arguments) == ProfileExitCode.OK
    before = {one["name"]: one["before"] for one in json.loads(capsys.readouterr().out)["parameters"]}
    assert (before["step"], before["sequence"]) == (ENGINES["vllm"].step_s, ENGINES["vllm"].sequence_s)


def cpu() -> dict[str, Any]:
    """Return a profile of kernels that take 30 times as long as those of an L40S, and for FLOPs another 30 times."""
    shipped = shipped_profile("L40S")

    def slower(piece: Piece) -> Piece:
        more = {name: 30 * value for name, value in asdict(piece).items()}
        return Piece(**more | {"flop_s": 900 * piece.flop_s})

    fits = tuple(replace(fit, pieces=tuple(map(slower, fit.pieces))) for fit in shipped.fits)
    return profile_to_data(replace(shipped, gpu="CPU", fits=fits))


def test_the_real_servers_log_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU is no L40S, which is said, and anything nearer is corrected. The model is the one that made the log."""
    spec = tmp_path / "model.yaml"
    spec.write_text(
        "{apiVersion: hetis/v1, kind: ModelSpec, name: tiny, num_layers: 8, hidden: 768, intermediate: 2048, "
        "q_heads: 12, kv_heads: 4, head_dim: 64, vocab: 4096}\n"
    )
    arguments = ("--from-vllm", SAMPLE, "--model", spec, "--out", tmp_path / "p.json")
    assert invoke("calibrate", *arguments, "--gpu", "L40S") == ProfileExitCode.MISSED
    assert "times the profile's time, expected 0.05 to 20: check that the model" in capsys.readouterr().err
    (tmp_path / "cpu.json").write_text(json.dumps(cpu()))
    assert invoke("calibrate", *arguments, "--profile", tmp_path / "cpu.json", "-o", "json") == ProfileExitCode.OK
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"]["first 10 of an engine"] == 10
    assert report["errors"][-1]["after"]["mape"] < 0.5 < report["errors"][-1]["before"]["mape"]


def test_a_servers_metrics_correct_what_they_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten requests decode in 20 ms an iteration, interval after interval, which determines one parameter."""
    from hetis.profiler.calibrate import scraping

    monkeypatch.setattr(scraping.watch, "__kwdefaults__", scraping.watch.__kwdefaults__ | {"sleep": lambda _: None})
    growing = [name for name in ZERO if name not in ("num_requests_running", "kv_cache_usage_perc")]
    answers = [
        (200, prom(counters(**{name: counters()[name] * number for name in growing}), cache=CACHE))
        for number in range(25)
    ]
    with server(answers) as url:
        arguments = ("--from-vllm", url, "--model", MODEL, "--gpu", GPU, "--out", tmp_path / "p.json")
        assert invoke("calibrate", *arguments, "--for", "24s", "-o", "json") == ProfileExitCode.OK
    report = json.loads(capsys.readouterr().out)
    assert (report["observed"], report["fitted"] + report["judged"]) == ("intervals", 24)
    assert sum(one["margin"] is not None for one in report["parameters"]) == 1
    assert report["errors"][-1]["after"]["mape"] < 0.001 < report["errors"][-1]["before"]["mape"]


def test_the_logs_degree_counts_unless_another_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    path = tmp_path / "two.log"
    path.write_text(
        write_log(tmp_path / "one.log", count=100).read_text().replace("parallel_size=1, p", "parallel_size=2, p")
    )
    arguments = ("--from-vllm", path, "--model", MODEL, "--gpu", GPU, "--out", tmp_path / "p.json")
    invoke("calibrate", *arguments, "-o", "json")
    assert json.loads(capsys.readouterr().out)["tp"] == 2
    assert invoke("calibrate", *arguments, "--tp", "4") == ProfileExitCode.INVALID
    assert "--tp is 4, that of the server in the log is 2" in capsys.readouterr().err


def test_the_precision_served_is_that_of_the_weights(log: Path, tmp_path: Path) -> None:
    """A log of 8-bit weights corrects the kernels for them, and leaves those of 16 bits alone."""
    arguments = ("--from-vllm", log, "--model", MODEL, "--gpu", GPU, "--weights", "FP8", "--out", tmp_path / "p.json")
    assert invoke("calibrate", *arguments, "-q") == ProfileExitCode.OK
    shipped = shipped_profile(GPU)
    assert shipped is not None
    dense = [
        [one for one in profile_to_data(profile)["fits"] if one["op"] == "dense" and "scope" not in one]
        for profile in (shipped, load_profile(tmp_path / "p.json"))
    ]
    assert dense[0] == dense[1]


def test_a_correction_that_no_gpu_reaches_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Kernels of a tenth of the profile's time would be beyond the peaks."""
    fast = write_log(tmp_path / "fast.log", Truth(kernels=0.1, step_s=2e-3, sequence_s=12e-6, noise=0.02))
    arguments = ("--from-vllm", fast, "--model", MODEL, "--gpu", GPU, "--out", tmp_path / "p.json")
    assert invoke("calibrate", *arguments, "-o", "json") == ProfileExitCode.MISSED
    report = json.loads(capsys.readouterr().out)
    assert report["out"] is None
    assert "no GPU is like the corrected profile (dense" in report["refusal"]
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("settings", "arguments", "refused", "said"),
    [
        ("quantization=None, ", ("--weights", "fp8"), True, "Meta-Llama-3.1-8B are fp8, the server in the log has"),
        ("quantization=None, kv_cache_dtype=auto, ", (), False, ""),
        ("quantization=fp8, ", (), False, "has quantization=fp8, meta-llama/Meta-Llama-3.1-8B has none: see --weights"),
        ("quantization=fp8, ", ("--weights", "fp8"), False, ""),
        ("kv_cache_dtype=fp8_e4m3, ", (), True, "the server in the log has kv_cache_dtype=fp8_e4m3: give --kv fp8"),
        ("kv_cache_dtype=fp8_e4m3, ", ("--kv", "fp8"), False, ""),
        ("kv_cache_dtype=auto, ", ("--kv", "fp8"), False, "has kv_cache_dtype=auto, meta-llama/Meta-Llama-3.1-8B has"),
        ("model='/models/Qwen3-8B/', ", (), False, "a server of /models/Qwen3-8B/, --model is meta-llama/Meta-Llama"),
        ("model='meta-llama/Llama-3.1-8B', ", (), False, ""),
    ],
)
def test_the_log_and_the_options_are_of_one_server(
    settings: str, arguments: tuple[str, ...], refused: bool, said: str, log: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "said.log"
    path.write_text(log.read_text().replace("model='m', ", settings, 1))
    options = ("--from-vllm", path, "--model", MODEL, "--gpu", GPU, "--out", tmp_path / "p.json", *arguments)
    code = invoke("calibrate", *options)
    err = " ".join(capsys.readouterr().err.split())
    assert (code == ProfileExitCode.INVALID) == refused
    if said:
        assert said in err
    else:
        assert "server" not in err.partition("was not written")[0].partition("check that")[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--from-vllm", "none.log", "--gpu", GPU), 2, "none.log: no such file"),
        (("--from-vllm", "empty.log", "--gpu", GPU), 2, "--enable-logging-iteration-details"),
        (("--from-vllm", "few.log", "--gpu", GPU), 2, "2 iterations are of use, 40 are needed (left out: 1 computed"),
        (("--from-vllm", "few.log"), 2, "give --gpu, the type that the server runs on, or --profile"),
        (("--from-vllm", "few.log", "--gpu", "H100X"), 2, "unknown GPU"),
        (("--from-vllm", "few.log", "--gpu", "A40", "--tp", "3"), 2, "--tp is 3, that of the server in the log is 1"),
        (("--from-vllm", "http://h", "--gpu", "A40", "--tp", "3"), 2, "--tp is 3, must divide the 32 query heads"),
        (("--from-vllm", "few.log", "--gpu", "A40", "--weights", "fp9"), 2, "precision: 'fp9' is not one of"),
        (("--from-vllm", "few.log", "--gpu", "A40", "--profile", "l4.json"), 2, "is the profile of L4, --gpu is A40"),
        (("--from-vllm", "few.log", "--profile", "l4.json", "--cluster", "none.yaml"), 2, "none.yaml: no such file"),
        (("--from-vllm", "few.log", "--gpu", "A40", "-m", "Llama-2-70B"), 2, "of weights on each of 1 A40"),
        (("--from-vllm", "ftp://host", "--gpu", "A40"), 2, "is no URL of a server"),
        (("--from-vllm", "http://127.0.0.1:1", "--gpu", "A40"), 6, "http://127.0.0.1:1/metrics: no answer: "),
        (("--from-vllm", "http://h", "--gpu", "A40", "--for", "1s"), 2, "is 1s, must be 10s to 24h"),
        (("--from-vllm", "http://h", "--gpu", "A40", "-m", "Llama-2-70B"), 2, "check that --tp and --weights match"),
        (("--from-vllm", "few.log", "--gpu", "A40", "--out", "no/p.json"), 2, "no folder no"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.log").write_text("INFO: nothing\n")
    Path("few.log").write_text(text_of([line(20, 0.01, decoding=1), line(21, 0.01, decoding=1), line(22, 0.01)]))
    assert invoke("model", "L4", "--out", "l4.json", "-q") == ProfileExitCode.OK
    capsys.readouterr()
    defaults = [] if "-m" in arguments else ["-m", MODEL]
    defaults += [] if "--out" in arguments else ["--out", "p.json"]
    assert invoke("calibrate", *defaults, *arguments) == code
    printed = capsys.readouterr()
    assert said in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert not printed.out
    assert not Path("p.json").exists()
