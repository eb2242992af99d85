"""How the command line treats people and pipes: plain on request, whole names, defaults from files, errors as data."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hetis.planner.cli.app import app
from hetis.planner.cli.app import run as run_verb
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.parameters.defaults import OWN_MEANING, default_map
from tests.command_line import environment
from tests.fleets import fleet
from tests.planner.command_line import COMMAND, hetis_plan_here, invoke
from tests.planner.html_pages import ReadPage

ROOT = Path(__file__).parents[3]
GROUP: Any = typer.main.get_command(app)
CLUSTER = fleet("four", "4 rack-with-a-long-name: 1 A100-PCIe-80GB")
INPUTS = ("-c", "cluster.yaml", "-m", "Llama-2-7B", "-w", "500/100", "--time-limit", "5s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four equal replicas on cards and nodes with long names."""
    path = tmp_path_factory.mktemp("manners")
    (path / "cluster.yaml").write_text(CLUSTER)
    done = hetis_plan_here("place", *INPUTS, "--strategy", "uniform", "--no-verify", "--out", "plan.json", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


def piped(*arguments: str, cwd: Path, **variables: str) -> str:
    """Return the output to a pipe of a process whose environment gives no width."""
    given = environment(**variables)
    given.pop("COLUMNS")
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, cwd=cwd, env=given, check=True)
    return done.stdout.decode(variables.get("PYTHONIOENCODING", "utf-8"))


def test_lines_in_a_pipe_are_as_wide_as_on_a_narrow_terminal_and_not_padded(folder: Path) -> None:
    shown = piped("explain", "plan.json", cwd=folder)
    assert "A100-PCIe-80GB" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert not any(line != line.rstrip() for line in shown.splitlines())


def test_a_stream_of_ascii_has_signs_and_no_question_marks(folder: Path) -> None:
    shown = piped("explain", "plan.json", cwd=folder, PYTHONIOENCODING="ascii")
    assert "?" not in shown
    assert "####" in shown, "bars are drawn"


def test_a_locale_of_ascii_has_signs_in_pipes_too(folder: Path) -> None:
    """Python's UTF-8 mode, which such a locale turns on, makes the stream UTF-8."""
    for locale in ({"LC_ALL": "C"}, {"LC_ALL": "", "LC_CTYPE": "", "LANG": "POSIX"}):
        shown = piped("explain", "plan.json", cwd=folder, NO_COLOR="1", **locale)
        assert shown.isascii(), [line for line in shown.splitlines() if not line.isascii()]
        assert "####" in shown
        assert piped("place", "--help", cwd=folder, NO_COLOR="1", **locale).isascii(), "the boxes of help, too"
    shown = piped("explain", "plan.json", cwd=folder, LC_ALL="C.UTF-8", LANG="C")
    assert not shown.isascii(), "the first that is set says it"


def test_no_color_is_plain_even_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FORCE_COLOR, rich treats any stream as a terminal."""
    shown = {
        name: piped("catalog", "gpus", "L4", *options, cwd=folder, FORCE_COLOR="1", NO_COLOR=value)
        for name, options, value in (("asked", (), "1"), ("option", ("--no-color",), ""), ("not", (), ""))
    }
    assert "\x1b" not in shown["asked"]
    assert "\x1b" not in shown["option"]
    assert "\x1b" in shown["not"]


@pytest.mark.parametrize("verb", [*GROUP.commands, "cluster.discover"])
def test_help_cuts_no_word_off_on_a_narrow_terminal(verb: str) -> None:
    """An option whose name ends in an ellipsis cannot be typed."""
    shown = invoke(*verb.split("."), "--help").stdout
    assert "Usage" in shown
    assert not re.findall(r"\S*…", shown)


@pytest.mark.parametrize(("verb", "wide"), [("explain", False), ("place", True)])
def test_every_device_of_equal_replicas_is_named(folder: Path, verb: str, wide: bool) -> None:
    arguments = ("plan.json",) if verb == "explain" else (*INPUTS, "--strategy", "uniform", "--no-verify")
    shown = hetis_plan_here(verb, *arguments, *(("-o", "wide") if wide else ()), cwd=folder).stdout
    assert "4 equal replicas" in shown or "and 3 like it" in shown
    for node in range(4):
        assert f"rack-with-a-long-name-{node}/0" in shown


def test_a_failure_is_data_where_data_is_asked_for(folder: Path) -> None:
    for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        done = hetis_plan_here("explain", "nowhere.json", "-o", form, cwd=folder)
        found = read(done.stdout)
        assert found["kind"] == "Error"
        assert found["exit_code"] == done.returncode == ExitCode.INVALID
        assert "nowhere.json" in found["details"][0]
        assert "nowhere.json" in done.stderr
    assert hetis_plan_here("explain", "nowhere.json", cwd=folder).stdout == ""


# --- defaults


def test_defaults_come_from_project_and_user_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "home/hetis/hetis.toml").write_text('output = "yaml"\n[schema]\noutput = "table"\n')
    assert run_verb(["catalog", "gpus", "L40S"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)
    (home / "project/hetis.toml").write_text('[catalog]\noutput = "json"\n')
    assert run_verb(["catalog", "gpus", "L40S"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run_verb(["catalog", "gpus", "L40S", "-o", "table"]) == 0
    assert "USD/h" in capsys.readouterr().out.splitlines()[0]


def test_defaults_may_be_inputs_numbers_lists_and_no(home: Path, folder: Path) -> None:
    (home / "project/hetis.toml").write_text(
        f"""model = "Llama-2-7B"
workload = "500/100"
[place]
cluster = "{folder / "cluster.yaml"}"
strategy = "uniform"
gap = 0.01
verify = false
forbid = ["tp=4", "tp=8"]
output = "json"
"""
    )
    done = hetis_plan_here("place", cwd=home / "project" / "below")
    assert done.returncode == 0, done.stderr
    inputs = json.loads(done.stdout)["inputs"]
    assert inputs["gap_target"] == 0.01
    assert "verification" not in inputs
    assert inputs["constraints"] == ["--forbid tp=4", "--forbid tp=8"]


def test_a_single_default_of_a_repeatable_option_needs_no_list(
    home: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "project/hetis.toml").write_text("[place]\nforbid = 'tp=9'\n")
    assert run_verb(["place", "-c", str(folder / "cluster.yaml"), *INPUTS[2:6], "--dry-run"]) == ExitCode.INVALID
    assert "--forbid tp=9: TP sizes are" in capsys.readouterr().err


def test_a_default_gives_way_to_an_option_that_contradicts_it(
    home: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of one kind of simulation, in another; two defaults that contradict each other are a mistake."""
    defaults, plan = home / "project/hetis.toml", str(folder / "plan.json")
    defaults.write_text('attainment = "99%"\n[simulate]\nrate = 1\nrequests = 50\nno-dispatch = true\n')
    for option, said in (("--saturate", "saturated"), ("--sweep", "goodput_rps")):
        assert run_verb(["simulate", plan, option, "-o", "json"]) == ExitCode.OK, capsys.readouterr().err
        assert said in capsys.readouterr().out
    assert run_verb(["simulate", plan, "--sweep", "--rate", "1"]) == ExitCode.INVALID
    assert "--sweep and --rate cannot be combined" in capsys.readouterr().err
    defaults.write_text("[simulate]\nsaturate = true\nsweep = true\n")
    assert run_verb(["simulate", plan]) == ExitCode.INVALID
    assert "--saturate and --sweep cannot be combined" in capsys.readouterr().err
    assert run_verb(["simulate", plan, "--sweep", "--requests", "50", "--no-dispatch"]) == ExitCode.OK


# Options whose help differs from that in `place`, or in the first verb, although they mean the same.
SAME_IN_OTHER_WORDS = {
    "dry-run": {"apply", "delete", "rollback"},
    "engine": {"compare"},
    "force": {"init", "cluster.discover"},
    "gpu-memory-utilization": {"fits"},
    "kv-blocks": {"simulate"},
    "max-num-seqs": {"simulate"},
    "out": {"apply"},
    "output": {"get"},
    "prefix-hit-rate": {"simulate"},
    "seed": {"simulate"},
    "theta": {"redispatch"},
    "workload": {"replan"},
}


def options_of_verbs(group: Any = GROUP, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the verb, the name and the help of every option."""
    for verb, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from options_of_verbs(command, f"{verb}.")
            continue
        for parameter in command.params:
            for name in (opt.removeprefix("--") for opt in parameter.opts if opt.startswith("--")):
                yield prefix + verb, name, (parameter.help, parameter.metavar, parameter.multiple)


def test_options_of_one_name_mean_the_same_or_are_set_in_the_table_of_their_verb() -> None:
    """Whoever gives an option a name that another verb has finds it here, and decides whether they mean the same."""
    helps = defaultdict[str, dict[str, Any]](dict)
    for verb, name, words in options_of_verbs():
        helps[name][verb] = words
    for name, by_verb in helps.items():
        own = OWN_MEANING.get(name, frozenset())
        assert own <= by_verb.keys(), name
        reached = {verb: words for verb, words in by_verb.items() if verb not in own}
        alike = {verb for verb, words in reached.items() if words == next(iter(reached.values()))}
        assert reached.keys() - alike == SAME_IN_OTHER_WORDS.get(name, set()), name
    assert OWN_MEANING.keys() <= helps.keys()


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('model = "Llama-2-70B"', ("export", "plan.json", "--to", "vllm")),
        ("rate = 20", ("convert", "trace.csv")),
        ('engine = "sglang"', ("export", "plan.json", "--to", "vllm")),
        ('out = "new"', ("convert", "trace.csv")),
        ('chunk-tokens = "256,512"', ("simulate", "plan.json", "--requests", "20", "--no-dispatch")),
    ],
)
def test_a_setting_for_all_verbs_leaves_options_of_another_meaning_alone(
    home: Path, folder: Path, text: str, call: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.json").write_bytes((folder / "plan.json").read_bytes())
    Path("trace.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n")
    assert run_verb([*call]) == ExitCode.OK
    expected = capsys.readouterr().out
    (home / "project/hetis.toml").write_text(f"{text}\n")
    assert run_verb([*call]) == ExitCode.OK
    assert capsys.readouterr().out == expected
    assert not Path("new").exists()


def test_a_cluster_for_all_verbs_is_no_name_of_a_cluster_on_a_planner(home: Path) -> None:
    """`agents` would ask for clusters/fleet.yaml; its own table reaches it."""
    (option,) = (one for one in GROUP.commands["place"].params if "--cluster" in one.opts)
    options = {verb: {"cluster": option} for verb in ("place", "agents", "apply")}
    (home / "project/hetis.toml").write_text('cluster = "fleet.yaml"\n[agents]\ncluster = "night"\n')
    assert default_map(options, Path.cwd()) == {"place": {"cluster": "fleet.yaml"}, "agents": {"cluster": "night"}}


@pytest.mark.parametrize("cannot_be_read", ["home", "project", "nobody"])
def test_files_of_defaults_that_nobody_can_see_do_not_exist(
    cannot_be_read: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those in folders without permission, nor those of a user without a home."""
    stat = os.stat

    def guarded(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("hetis.toml") and cannot_be_read in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    def unknown(_user: int) -> None:
        raise KeyError

    if cannot_be_read == "nobody":
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "stat", guarded)
    assert run_verb(["version"]) == ExitCode.OK


def test_a_file_of_defaults_may_start_with_a_byte_order_mark(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "project/hetis.toml").write_text('\ufeffoutput = "json"\n', encoding="utf-8")
    assert run_verb(["catalog", "gpus", "L40S"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modell = 'x'", "no command has an option --modell, did you mean model"),
        (
            "name = 'x'",
            "--name means something else in each command: set it in the table of one of them: [export], [apply], "
            "[cluster.discover]",
        ),
        ("[plaice]\nseed = 1", "no command 'plaice', did you mean place"),
        ("[place]\nsede = 1", "place has no option --sede, did you mean seed"),
        ("model = ", "is not valid TOML: "),
        ("[place]\ntpot = true", "--tpot takes one text or number, not true"),
        ("[place]\ntpot = ['50ms']", "--tpot takes one text or number, not a list"),
        ("cluster = ['a.yaml', 'b.yaml']", "error: 1 problem in the input"),
        ("[place]\nttft = {p95 = '2s'}", "--ttft takes one text or number, not a table"),
        ("[place]\nforbid = [['tp=4']]", "--forbid takes text, a number, or a list of them, not a list"),
        ("[place]\nverify = 'never'", "--verify takes true or false, not 'never'"),
    ],
)
def test_a_wrong_file_of_defaults_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (home / "project/hetis.toml").write_text(text)
    assert run_verb(["catalog", "gpus", "L40S"]) == ExitCode.INVALID
    said = capsys.readouterr().err
    assert words in said
    assert "hetis.toml" in said


@pytest.mark.parametrize("call", [("place", "--help"), ("-h",), ("--version",), ("version",)])
def test_a_wrong_file_of_defaults_does_not_stand_in_the_way_of_help(
    home: Path, capsys: pytest.CaptureFixture[str], call: tuple[str, ...]
) -> None:
    (home / "project/hetis.toml").write_text("x = [")
    assert run_verb([*call]) == ExitCode.OK
    printed = capsys.readouterr()
    assert "hetis" in printed.out
    assert re.match(r"warning: \S+hetis.toml: is not valid TOML: .*; defaults from files are ignored\n$", printed.err)


# --- what people read first


def test_the_sample_is_planned(tmp_path: Path) -> None:
    assert hetis_plan_here("init", cwd=tmp_path).returncode == 0
    inputs = ("-c", "cluster.yaml", "-m", "Llama-2-70B", "-w", "workload.yaml")
    done = hetis_plan_here("place", *inputs, "--no-verify", "-q", "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["replicas"]


def tour() -> list[str]:
    """Return the commands of the README's tour, verbatim."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## A tour\n\n```bash\n(.*?)```", text, re.DOTALL)
    return [line.partition("  #")[0].strip() for line in block[1].splitlines() if line.strip()]


def test_the_tour_is_made_of_commands_that_there_are() -> None:
    """Every verb, option and value of an option; the soak test below runs them."""
    verbs = []
    for command in tour():
        program, *arguments = shlex.split(command, comments=True)
        if program == "hetis-plan":
            verb, *rest = arguments
            GROUP.commands[verb].make_context(verb, rest)
            verbs.append(verb)
    assert {"init", "place", "report", "simulate", "compare", "what-if", "replan"} <= set(verbs)


@pytest.mark.soak
def test_the_tour_runs_verbatim(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "hetis-plan").write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    (tmp_path / "hetis-plan").chmod(0o755)
    variables = environment()
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    for command in tour():
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert "Under simulated traffic" in ReadPage((tmp_path / "report.html").read_text()).text
