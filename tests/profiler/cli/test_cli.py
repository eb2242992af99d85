"""`hetis-profile` as its users see it: verbs, messages, exit codes, 80 columns."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hetis.formats.catalogue import find_gpu, find_model
from hetis.formats.measurements import save_measurements
from hetis.formats.profile import load_profile, profile_to_data
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.defaults import default_profile
from hetis.solver.profile import Op
from tests.profiler.cli.measured_files import GPU, with_mixed_batches, write_files
from tests.profiler.command_line import hetis_profile, invoke
from tests.profiler.typical_times import typical_times

DATA = Path(__file__).parents[4] / "shared" / "data" / "profiles"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write measurements, the cluster of their GPU, and a profile fitted to them."""
    where = tmp_path_factory.mktemp("profiles")
    raw, cluster = write_files(where)
    assert invoke("fit", raw, "--out", where / "profile.json", "--cluster", cluster, "-q") == ProfileExitCode.OK
    return where


def test_help_answers_without_numpy_or_torch() -> None:
    program = (
        "import sys; from hetis.profiler.cli.app import run; run(['--help']);"
        "print(sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_fit_reports_held_out_errors_by_operator_and_region(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (folder / "raw.json", "--out", folder / "again.json", "--cluster", folder / "cluster.yaml")
    assert invoke("fit", *arguments, "-o", "json") == ProfileExitCode.OK
    report = json.loads(capsys.readouterr().out)
    assert report["held_out_mape"]["decode_attention"] < 0.02
    assert report["held_out_mape"]["dense"] < 0.08
    assert report["by_region"]["decode_attention"]
    assert (folder / "again.json").read_bytes() == (folder / "profile.json").read_bytes()
    assert load_profile(folder / "again.json").gpu == GPU


def test_fit_and_show_tell_how_much_longer_decode_attention_takes_beside_a_chunk(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    raw, out, cluster = folder / "mixed.json", folder / "mixed-profile.json", folder / "cluster.yaml"
    save_measurements(raw, with_mixed_batches(2.5))
    assert invoke("fit", raw, "--out", out, "--cluster", cluster) == ProfileExitCode.OK
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    line = (
        r"decode \(head 128, 4 q/group\): 2\.5 times as long beside a chunk, from \d+ points: 0\.0% off on \d+ "
        r"held-out ones, and \d+\.\d% with the sum of both"
    )
    assert re.search(line, " ".join(text.split()))
    assert invoke("fit", raw, "--out", out, "--cluster", cluster, "-o", "json") == ProfileExitCode.OK
    (mixed,) = json.loads(capsys.readouterr().out)["mixed"]
    assert mixed["scope"] == {"head_dim": 128, "queries_per_group": 4}
    assert (mixed["factor"], mixed["origin"]) == (2.5, "a test, law, law")
    assert mixed["summed"]["mape"] > 0.1 > mixed["held_out"]["mape"]
    assert invoke("show", out) == ProfileExitCode.OK
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("x 2.5 beside a chunk") == 1


def test_a_file_that_is_given_twice_is_not_another_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = folder / "raw.json"
    again = folder / ".." / folder.name / "raw.json"
    code = invoke("fit", raw, again, "--out", folder / "none.json", "--cluster", folder / "cluster.yaml")
    assert code == ProfileExitCode.INVALID
    assert f"{again}: is given twice" in " ".join(capsys.readouterr().err.split())


def test_all_broken_files_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"kind": "Plan"}')
    code = invoke("fit", tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json", "--out", tmp_path / "p.json")
    assert code == ProfileExitCode.INVALID
    said = capsys.readouterr().err
    assert all(f"{name}.json" in said for name in "abc")
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table.parquet"])
def test_tables_of_other_tools_are_told_from_measurements(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / name
    table.write_bytes(gzip.compress(b"a,b\n1,2\n") if name.endswith(".gz") else b"a,b\n1,2\n")
    assert invoke("fit", table, "--out", tmp_path / "p.json") == ProfileExitCode.INVALID
    said = f"{table}: is a table, expected measurements: convert it with `hetis-profile import`"
    assert said in capsys.readouterr().err


def test_measurements_of_two_gpus_are_not_one_profile(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other.json"
    other.write_text((folder / "raw.json").read_text().replace(GPU, "L4"))
    assert invoke("fit", folder / "raw.json", other, "--out", folder / "p.json") == ProfileExitCode.INVALID
    assert f"is L4, that of {folder / 'raw.json'} is {GPU}" in capsys.readouterr().err


def test_show_is_readable_in_80_columns_and_complete_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert invoke("show", folder / "profile.json") == ProfileExitCode.OK
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "B/1 TB/s" in text or "B/999 GB/s" in text or "TB/s" in text
    assert invoke("show", folder / "profile.json", "-o", "json") == ProfileExitCode.OK
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "profile.json").read_text())


def test_a_gpu_has_the_profile_that_plans_use(capsys: pytest.CaptureFixture[str]) -> None:
    """Its experts, latent attention and host are those of vLLM."""
    assert invoke("show", "H20", "-o", "json") == ProfileExitCode.OK
    assert json.loads(capsys.readouterr().out) == profile_to_data(default_profile(find_gpu("H20").gpu)[1])


def test_compare_counts_the_states_of_linear_attention() -> None:
    """They are read and written in every decode step, as in plans."""
    model, profile = find_model("Qwen3.5-27B").model, default_profile(find_gpu("H20").gpu)[1]
    fit = profile.fit(Op.DECODE_ATTENTION, model, 2)
    times = {(op, point): seconds for op, point, seconds in typical_times(profile, model, 2)}
    features = {
        "flops": model.decode_attention_flops(model.attended_tokens(1024), 1.0) * 32 * 12 + 32 * model.scan_flops(1024),
        "num_bytes": 32 * (2 * model.read_tokens(1024) * model.kv_bytes_per_token_group() + model.state_bytes()),
    }  # of two ranks, each has half of the 24 heads, the 4 groups and the states, which are read and written
    assert times[Op.DECODE_ATTENTION, "batch 32, context 1024"] == pytest.approx(fit.seconds(**features, heads=32 * 12))
    assert model.state_bytes() > 0


def test_check_warns_of_latent_attention_above_the_peaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A profile with it is used: which kernels there may be for it, nobody knows."""
    data = profile_to_data(default_profile(find_gpu("H20").gpu)[1])
    for fit in data["fits"]:
        if fit["op"] == "decode_attention" and fit.get("scope", {}).get("queries_per_group") == 128:
            fit["pieces"] = fit["pieces"][:1]
    file = tmp_path / "h20.json"
    file.write_text(json.dumps(data))
    assert invoke("check", file, "-o", "json") == ProfileExitCode.OK
    doubts = json.loads(capsys.readouterr().out)["doubts"]
    assert any("(128 q/group): 64 requests of 8,192 tokens at 1.7 times the FLOP/s of H20" in one for one in doubts)
    assert "dense: its error on held-out points is 14.2%, the target is 10.0%, plans assume 60%" in doubts
    assert sum(one.startswith("experts (16 fits): ") for one in doubts) == 1
    assert invoke("check", "H20", "-o", "json") == ProfileExitCode.OK
    assert not any("FLOP/s" in one for one in json.loads(capsys.readouterr().out)["doubts"])


def test_model_writes_a_profile_that_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t4.yaml"
    assert invoke("model", "T4", "--out", out, "-o", "json") == ProfileExitCode.OK
    data = json.loads(capsys.readouterr().out)
    assert {fit["provenance"]["source"] for fit in data["fits"]} == {"modelled"}
    assert next(fit for fit in data["fits"] if fit["op"] == "dense")["provenance"]["held_out_mape"] > 0
    assert load_profile(out) == default_profile(find_gpu("T4").gpu)[1]


def test_check_accepts_what_the_card_can_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        invoke("check", folder / "profile.json", "--cluster", folder / "cluster.yaml", "-o", "json")
        == ProfileExitCode.OK
    )
    assert json.loads(capsys.readouterr().out)["broken"] == []


def test_check_refuses_what_no_card_can_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((folder / "profile.json").read_text())
    data["usable_bytes"] = "30GiB"
    for fit in data["fits"]:
        if fit["op"] == "prefill_attention":
            fit["pieces"] = [{"flop_s": 1e-15}]
    broken = folder / "broken.json"
    broken.write_text(json.dumps(data))
    assert invoke("check", broken, "--cluster", folder / "cluster.yaml", "-o", "json") == ProfileExitCode.INVALID
    sentences = json.loads(capsys.readouterr().out)["broken"]
    assert any("usable_bytes is 30GiB, more than the 24GiB" in sentence for sentence in sentences)
    assert any("reaches 1000 TFLOP/s, Test-Card at most 100" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("show", "nonsense-9000"), ProfileExitCode.INVALID, "is neither a file nor a GPU type"),
        (("show", "missing.json"), ProfileExitCode.INVALID, "no such file"),
        (("model", "L40X", "--out", "x.json"), ProfileExitCode.INVALID, "did you mean L40"),
        (
            ("import", "nothing.csv", "--format", "aiconfigurator", "--out", "x.json"),
            ProfileExitCode.INVALID,
            "no such file",
        ),
        (("run", "--model", "no-such-model", "--out", "x.json"), ProfileExitCode.INVALID, "no-such-model"),
        (("run", "--out", "no/such/folder/x.json"), ProfileExitCode.INVALID, "no folder"),
        (("run", "--out", "no/x.json", "--time-limit", "90s"), ProfileExitCode.INVALID, "no folder"),
        (("run", "--out", "no/x.json", "--time-limit", "2"), ProfileExitCode.INVALID, "no folder"),
        (("run", "--out", "x.json", "--time-limit", "500ms"), ProfileExitCode.INVALID, "is 500ms, must be >= 1s"),
        (("run", "--out", "."), ProfileExitCode.INVALID, "is a folder, expected the name of a file"),
        (("fit", "raw.json", "--out", "no/folder.json"), ProfileExitCode.INVALID, "no folder no"),
        (("fit",), ProfileExitCode.INVALID, "Missing"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(arguments: tuple[str, ...], code: int, said: str) -> None:
    done = hetis_profile(*arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_missing_torch_is_said_with_what_installs_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from hetis.profiler.cli.app import run;"
        f"sys.exit(run(['run', '--quick', '--out', {str(tmp_path / 'x.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == ProfileExitCode.INTERNAL
    assert "torch is not installed: pip install 'hetis[profiler]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hetis.profiler.measure import session

    def interrupted(request: session.RunRequest, report: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measure", interrupted)
    assert invoke("run", "--quick", "--out", tmp_path / "x.json") == ProfileExitCode.INTERRUPTED
    assert "interrupted: nothing was saved" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_published_tables_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a100.json.gz"
    table = DATA / "aic_a100_sxm_generation_attention.csv.gz"
    assert invoke("import", table, "--format", "aiconfigurator", "--out", out, "-o", "json") == ProfileExitCode.OK
    (found,) = json.loads(capsys.readouterr().out)
    assert found["gpu"] == "A100-SXM-80GB"
    assert sum(one["points"] for one in found["tables"]) > 5_000
    assert out.is_file()
