"""Every command on every page exists: the real parsers read its options, verbs and values.

`test_commands_run.py` runs the commands, or states why not.
"""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.docs.pages import PAGES, ROOT, CommandLine, command_lines, fences
from tests.planner.command_line import hetis_plan_here

OURS = {"hetis-plan", "hetis-planner", "hetis-agent", "hetis-launch", "hetis-worker", "hetis-profile"}
# Commands that need no planner, engine or long search, on the files in `folder`.
QUICK = {
    "catalog",
    "check",
    "dispatch",
    "explain",
    "export",
    "init",
    "redispatch",
    "schema",
    "validate",
    "version",
}


@cache
def group(program: str) -> Any:
    """Return the command of one of our programs."""
    if program == "hetis-plan":
        from hetis.planner.cli.app import app
    elif program == "hetis-planner":
        from hetis.planner.service.command import app
    elif program == "hetis-agent":
        from hetis.runtime.agent.main import app
    elif program == "hetis-launch":
        from hetis.runtime.launch.main import app
    else:
        from hetis.profiler.cli.app import app
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Parse a command line as its program would. Raises if the program would refuse it."""
    program, *arguments = words
    if program == "hetis-worker":
        from hetis.runtime.worker.main import make_parser

        make_parser().parse_args(arguments)
        return
    command = group(program)
    while verbs := getattr(command, "commands", None):
        if arguments and not arguments[0].startswith("-"):
            name, *arguments = arguments
            assert name in verbs, f"{program} has no verb {name}"
            command = verbs[name]
        else:
            assert command.invoke_without_command or arguments == ["--help"], f"{program} needs a verb"
            break
    command.make_context(program, list(arguments))


LINES = list(command_lines())


def test_there_are_commands_on_the_pages() -> None:
    found = {words[0] for line in LINES for words in line.programs()}
    assert found >= OURS | {"make", "python"}


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_our_programs_take_what_pages_tell_people_to_type(page: str) -> None:
    wrong = []
    for line in LINES:
        for words in line.programs() if line.page == page else ():
            try:
                if words[0] in OURS:
                    parse(words)
                elif words[0] == "make":
                    _make(words)
                elif words[:2] == ["python", "-m"]:
                    _module(words)
            except typer.Exit:
                continue  # --help, --version
            except (Exception, SystemExit) as error:
                wrong.append(f"{line.line}: {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)


def test_commands_stand_in_blocks_of_bash() -> None:
    """Elsewhere commands would not be checked. A usage line with its brackets is not a command."""
    for page in PAGES:
        for kind, text in fences(page.read_text(encoding="utf-8")):
            if kind != "bash":
                first = re.search(r"^ *(hetis-\w+|make|python -m) .*$", text, re.MULTILINE)
                assert first is None, f"{page.name}: {first and first[0]}"


def test_the_readme_shows_the_plan_that_make_demo_makes(tmp_path: Path) -> None:
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    (command,) = re.findall(r"<!-- output of hetis-plan (place .+) -->", readme)
    (demo,) = re.findall(r"^demo:.*\n\t\S+/hetis-plan (place .+)$", makefile, re.MULTILINE)
    short = {"--cluster": "-c", "--model": "-m", "--workload": "-w"}
    assert " ".join(short.get(word, word) for word in demo.split()) == command
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    made = hetis_plan_here(*command.split(), "--no-verify", "--out", "plan.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["result"]["status"] == "optimal"
    assert re.findall(r"^Goodput +([\d.]+) requests/s  proven optimal", readme, re.MULTILINE) == [
        f"{plan['result']['value']:.4g}"
    ]


def test_what_needs_no_planner_runs(tmp_path: Path) -> None:
    """The commands run on a small plan, the samples of `init`, and the examples."""
    folder = tmp_path
    (folder / "examples").symlink_to(ROOT / "examples")
    assert hetis_plan_here("init", cwd=folder).returncode == 0
    inputs = "-c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --tpot 200ms --ttft 10s"
    made = hetis_plan_here("place", *inputs.split(), "--no-verify", "--out", "plan.json", cwd=folder)
    assert made.returncode == 0, made.stderr
    ran: set[str] = set()
    done: set[tuple[str, ...]] = set()
    for line in LINES:
        for words in line.programs():
            if tuple(words) in done or words[0] != "hetis-plan" or words[1:2] == [] or words[1] not in QUICK:
                continue
            done.add(tuple(words))
            if _has_files(words, folder):
                if words[1] == "init":
                    words = [*words, "--force"]
                result = hetis_plan_here(*words[1:], cwd=folder)
                assert result.returncode == 0, f"{line}\n{result.stderr}"
                ran.add(words[1])
    assert ran >= {"catalog", "check", "dispatch", "explain", "export", "redispatch", "validate"}


def _has_files(words: list[str], folder: Path) -> bool:
    """Return whether every file that a line reads exists, and the nodes that it names are the plan's."""
    read = [word for before, word in pairwise(words) if before not in ("--out", "--html")]
    fleet = (folder / "examples" / "paper.yaml").read_text(encoding="utf-8")  # the plan's fleet
    nodes = [re.sub(r"(-\d+)?=.*", "", word) for before, word in pairwise(words) if before == "--node-address"]
    return all((folder / word).exists() for word in read if re.search(r"\.(ya?ml|json)$", word)) and all(
        f"name: {node}," in fleet for node in nodes
    )


def _make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
    assert wanted <= targets, f"make has no {wanted - targets}"


def _module(words: list[str]) -> None:
    """Check a module of ours, whose text names every option."""
    path = ROOT / (words[2].replace(".", "/") + ".py")
    package = ROOT / words[2].replace(".", "/") / "__init__.py"
    if words[2].split(".")[0] not in {"benchmarks", "tools", "tests", "examples"}:
        return
    assert path.is_file() or package.is_file(), f"there is no module {words[2]}"
    shared = (ROOT / "benchmarks").glob("*/*.py") if words[2].startswith("benchmarks") else ()
    text = "".join(file.read_text(encoding="utf-8") for file in [path, *shared] if file.is_file())
    for word in words[3:]:
        option = word.partition("=")[0]
        assert not option.startswith("--") or f'"{option}"' in text, f"{words[2]} has no option {option}"


def test_a_mistake_on_a_page_is_found() -> None:
    for wrong in ("hetis-plan plaice", "hetis-plan place --modell x", "hetis-plan explain", "hetis-launch shows"):
        (words,) = CommandLine("page.md", wrong).programs()
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever the parser of that program raises
            parse(words)
