"""What is wrong with a command line is said in our words, before anything is solved."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hetis.planner.cli.app import run as run_verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.service.main import main as serve
from hetis.profiler.cli.main import main as profile
from hetis.runtime.launch.__main__ import main as launch
from tests.planner.command_line import unfolded

SAMPLE = ("-c", "cluster.yaml", "-m", "Llama-2-7B", "-w", "500/100")


@pytest.mark.parametrize("call", [("place",), ("compare",), ("what-if", "--add", "1xL4")])
def test_requests_that_the_context_cuts_are_told_before_the_search(
    call: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-2-7B has a context of 4,096 tokens: the figures are not those of the requests that were asked for."""
    assert run_verb(["init", "-q"]) == ExitCode.OK
    given = ("-c", "cluster.yaml", "-m", "Llama-2-7B", "--dry-run")
    for lengths, is_told in (("8000/300", True), ("3000/300", False)):
        capsys.readouterr()
        assert run_verb([*call, *given, "-w", lengths]) == ExitCode.OK
        said = " ".join(capsys.readouterr().err.split())
        words = f"warning: 100% of the requests of {lengths} are longer than the context of meta-llama/Llama-2-7b-hf"
        assert (words in said) == is_told


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            ("place", *SAMPLE, "--out", "p.json"),
            "solved: 1 search by hetis for vllm-hetis, up to 60.0 s each",
        ),
        (
            ("compare", *SAMPLE, "--strategies", "hetis,uniform"),
            "2 searches by hetis, uniform, up to 60.0 s each",
        ),
        (("compare", *SAMPLE, "--strategies", "hetis", "--no-verify"), "1 search by hetis, up to 60.0 s each"),
        (("what-if", *SAMPLE, "--add", "1xL4"), "2 searches by hetis for vllm-hetis, up to 60.0 s"),
        (("share", "tenants.yaml", "-c", "cluster.yaml"), "1 search by hetis, up to 300 s each"),
    ],
)
def test_a_whole_call_can_be_checked_without_solving(
    call: tuple[str, ...], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(["init", "-q"]) == ExitCode.OK
    Path("tenants.yaml").write_text(
        "apiVersion: hetis/v1\nkind: Tenants\ntenants: [{name: a, model: Llama-2-7B, workload: 500/100}]\n"
    )
    capsys.readouterr()
    assert run_verb([*call, "--dry-run"]) == ExitCode.OK
    table = capsys.readouterr().out
    assert "Llama-2-7b-hf on my-fleet (10 GPUs) for 500/100" in table
    assert said in " ".join(table.split())
    assert run_verb([*call, "--dry-run", "-o", "json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["kind"] == "DryRun"
    assert not Path("p.json").exists()


def test_what_is_wrong_with_a_call_is_found_without_solving(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file, name and option, and where the results would go."""
    assert run_verb(["init", "-q"]) == ExitCode.OK
    sample = SAMPLE[: SAMPLE.index("-w")]
    wrong = {
        ("-w", "500/100", "--pin", "type=L5:as=worker"): "L5",
        ("-w", "500/100", "--out", "nowhere/plan.json"): "nowhere",
        ("-w", "azure_conv"): "did you mean azure_conv_2023",
        ("-w", "500/100", "--objective", "cost"): "rate",
    }
    for options, words in wrong.items():
        assert run_verb(["place", *sample, *options, "--dry-run"]) == ExitCode.INVALID, options
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "place --objective thruput",
            "'--objective': 'thruput' is not one of goodput, throughput, cost, gpus, did you mean throughput?",
        ),
        ("place --survive nodes", "'--survive': 'nodes' is not one of node, zone, did you mean node?"),
        ("explain - -o nonsense", "'--output' / '-o': 'nonsense' is not one of table, wide, json, yaml"),
        ("catalog gpu", "'gpu' is not one of gpus, models, workloads, strategies, add, did you mean gpus?"),
        (
            "cluster discover --from nvm",
            "auto, kubectl, nvidia-smi, amd-smi, slurm, nvml, ray, agents, file, did you mean",
        ),
        ("place --seed x", "'--seed': 'x' is not a whole number"),
        ("place --max-stages 99", "'--max-stages': 99 is out of range, must be at least 1 and at most 16"),
        ("place --gap 5", "'--gap': '5' means 500% of the best, did you mean 5%?"),
        ("place --gap 200%", "'--gap': '200%' is out of range, must be below 100%"),
    ],
)
def test_a_wrong_value_is_answered_in_our_words(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(arguments.split()) == ExitCode.INVALID
    error = unfolded(capsys.readouterr().err)
    assert said in error
    assert "Value error" not in error
    assert "Input should" not in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "place -c a.yaml -m x -w 1/1 --cluster=b.yaml",
            "'--cluster' / '-c': takes one value, and has 2: a.yaml, b.yaml",
        ),
        ("place -c a.yaml -m x -w 1/1 --rate 1 --rate 2 --rate 1", "'--rate': takes one value, and has 3: 1, 2, 1"),
        ("explain plan.json -o json -ojson", "'--output' / '-o': takes one value, and has 2: json, json"),
        ("cluster discover --out a --out b", "'--out': takes one value, and has 2: a, b"),
        ("place -c a.yaml -m x -w 1/1 --profile a --profile b --verify --no-verify", "a: no such file b: no such file"),
    ],
)
def test_a_second_value_of_one_option_is_refused(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last one would be used without a word. Repeatable options and flags are not concerned."""
    assert run_verb(arguments.split()) == ExitCode.INVALID
    assert said in unfolded(capsys.readouterr().err)
    assert run_verb([*arguments.split(), "--help"]) == ExitCode.OK


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (serve, "--config a --config b", "takes one value, and has 2: a, b"),
        (launch, "show plan.json --dtype auto --dtype float16", "'--dtype': takes one value, and has 2: auto, float16"),
        (launch, "show --dtype float8", "is not one of auto, bfloat16, float16, float32, did you mean float32?"),
        (profile, "import --format vidu", "'vidu' is not one of aiconfigurator"),
        (serve, "token create --file t --role agnt", "'agnt' is not one of viewer, orchestrator, admin, agent"),
    ],
)
def test_other_commands_answer_a_wrong_word_alike(
    main: Callable[[], None],
    arguments: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["hetis", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.INVALID
    assert said in unfolded(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("place -c - -m - -w 500/100", "--cluster and --model"),
        ("apply - --plan -", "FILE|PLAN and --plan"),
        ("replan --from - --cluster -", "--from and --cluster"),
        ("diff - -", "A and B"),
        ("validate - a.yaml -", "FILE..."),
    ],
)
def test_standard_input_is_one_input(arguments: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(arguments.split()) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert f"standard input (-) can be read only once, not 2 times for {names}" in unfolded(captured.err)
    assert captured.out == ""
