"""Every command on every page is run here or by another test named in the tables below, or not, for the reason given.

Every run checks commands that search with `--dry-run`; the soak test runs them to the end.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGINT

import pytest

from hetis.planner.cli.exit_codes import ExitCode
from tests.docs.pages import PAGES, ROOT, CommandLine, command_lines, outputs
from tests.docs.sessions import Session
from tests.formats.traces.test_trace_forms import AIPERF
from tests.planner.cli.test_command_line_manners import tour
from tests.planner.command_line import hetis_plan_here

LINES = list(command_lines(is_with_runbook=False))  # test_runbook.py runs the runbook
NUMBERS = re.compile(r"\d[\d.,]*")

# Prefixes of lines that no test runs, with the reason.
NOT_RUN = {
    r"pip install ": "it installs from a registry; tests/test_packaging.py installs what we build",
    r"make |\.ci/run|(python -m )?pytest |HETIS_\w+=\d+ .*pytest ": "it runs tests, or is run by them below",
    r"python -m tests\.faults\.run ": "50 kills take a quarter of an hour; tests/faults has one of each",
    r"python -m benchmarks[. ]": "minutes to hours; tests/benchmarks runs the quick form of every one",
    r"python -m tools\.efficiency ": "its tables are not in the repository; tests/profiler/test_efficiency.py",
    r"grpcurl ": "a program of others; tests/planner/client calls the same method",
    r"kubectl |helm ": "a Kubernetes cluster; tests/deploy renders the chart",
    r"srun ": "a cluster of Slurm",
    r"cat > workers\.yaml|export HETIS_VLLM_|vllm serve ": "vLLM on a GPU; tests/runtime/vllm has it on a CPU",
    r"hetis-worker |hetis-profile run --device cuda": "a GPU; tests/runtime/worker and tests/profiler have a CPU",
    r"bash exported/|curl http://10\.": "the machines of the tutorial; tests/planner/export reads the scripts",
    r"hetis-launch (show|processes) --plan plan.json --model /models/": "a model of 70B; those of docs/vllm.md are run",
    r"\(umask 077; openssl rand ": "a folder of the machine; tests/runtime/launch has keys of its own",
}
# Prefixes of lines that another test runs.
RUN_ELSEWHERE = {
    r"hetis-launch show .*models/tiny": "tests/runtime/launch/test_command.py",
    r"hetis-launch processes .*--all-here": "tests/runtime/launch/test_command.py",
    r"hetis-profile (run --device cpu|fit|check) ": "tests/profiler/cli/test_end_to_end.py",
    r"hetis-profile import ": "tests/profiler/cli/test_cli.py",
    r"hetis-profile calibrate ": "tests/profiler/cli/test_calibrate.py",
    r"hetis-plan upstreams ": "tests/planner/cli_server/test_upstreams.py",
}
# The tests below run these on a planner, or with the authority and the nodes that the page creates.
WITH_A_PLANNER = (
    r"hetis-planner\b|hetis-agent |openssl |curl -s http://127|hetis-plan (apply|agents|get|watch|rollback)\b"
)
# These run offline to the end in the soak test, and some in every run (`tests/docs/test_commands.py`).
OFFLINE = r"hetis-plan |sed "
PROFILES = r"--profile profile\.json"  # profile of a GPU measured just before, like `hetis-profile` above

# Files of a page in addition to those of `init`, the examples and `plan.json`, a plan of the paper's cluster.
PAPER = "hetis-plan place -c examples/paper.yaml -m Llama-2-70B -w azure_conv_2023 --ttft 10s --tpot 200ms --no-verify"
FILES = {
    "replanning.md": [
        f"{PAPER} --out running.json",
        "sed '/r3090/s/, count: 2//' examples/paper.yaml > fleet-now.yaml",
    ],
    "report.md": [f"{PAPER} --out today.json", f"{PAPER} --strategy uniform --out next-quarter.json"],
    "simulator.md": ["printf 'arrival_s,prompt_tokens,output_tokens\\n0,500,20\\n1,300,30\\n2,400,25\\n' > mine.csv"],
    "tutorial.md": [
        "printf 'apiVersion: hetis/v1\\nkind: Cluster\\nname: my-fleet\\nnodes:\\n"
        "  - {name: h100, gpus: [{type: H100-SXM-80GB, count: 2}]}\\n"
        "  - {name: l4, count: 2, gpus: [{type: L4, count: 4}]}\\n"
        "network: {bandwidth: 100Gbps, latency: 20us}\\n' > fleet.yaml",
    ],
}
# Lines whose exit code is part of the page's statement.
CODES = {
    r"--tpot 20ms|two-cards": (ExitCode.INFEASIBLE,),
    r"--strict": (ExitCode.OK, ExitCode.MISSED),  # a slow machine proves less in the same time
}


def is_tour(line: CommandLine) -> bool:
    """Return whether `test_the_tour_runs_verbatim` runs it."""
    return line.page == "README.md" and line.line.partition("  #")[0].strip() in tour()


def begins(line: CommandLine, patterns: object) -> bool:
    return any(re.match(pattern, line.line) for pattern in patterns)  # type: ignore[attr-defined]


def codes_of(line: CommandLine) -> tuple[int, ...]:
    (codes,) = [codes for pattern, codes in CODES.items() if re.search(pattern, line.line)] or [(ExitCode.OK,)]
    return codes


def offline_lines(page: str) -> list[CommandLine]:
    """Return the lines of a page that need no other process, in order."""
    return [
        line
        for line in LINES
        if line.page == page
        and not is_tour(line)
        and not begins(line, [*NOT_RUN, *RUN_ELSEWHERE, WITH_A_PLANNER])
        and not re.search(PROFILES, line.line)
    ]


def test_every_command_is_run_or_is_in_a_table_with_the_reason() -> None:
    unknown = [str(line) for page in PAGES for line in offline_lines(page.name) if not re.match(OFFLINE, line.line)]
    assert not unknown, "no test runs these:\n" + "\n".join(unknown)
    for pattern in [*NOT_RUN, *RUN_ELSEWHERE]:
        assert any(begins(line, [pattern]) for line in LINES), f"no page has a line like {pattern}"
    for test in [*RUN_ELSEWHERE.values(), *re.findall(r"tests/[\w/.]+\w", " ".join(NOT_RUN.values()))]:
        assert (ROOT / test).exists(), test


def prepared(folder: Path, page: str) -> Session:
    """Return the folder of a reader of that page, with the files that it assumes."""
    session = Session(folder)
    (folder / "profile_export.jsonl").write_text(AIPERF)
    for line in FILES.get(page, ()):
        session.run(line)
    return session


SEARCHING = [
    line
    for page in PAGES
    for line in offline_lines(page.name)
    if re.search(r"hetis-plan (place|compare|what-if|share|replan) ", line.line)
]


def test_commands_that_search_are_whole(tmp_path: Path) -> None:
    """Every name, file and option exists, and results could be written."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert hetis_plan_here("init", cwd=tmp_path).returncode == 0
    (tmp_path / "plans").mkdir()
    made = hetis_plan_here(*PAPER.split()[1:], "--strategy", "uniform", "--out", "running.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "fleet-now.yaml").write_text((ROOT / "examples/paper.yaml").read_text(encoding="utf-8"))
    assert len(SEARCHING) > 15
    for line in SEARCHING:
        (words, *_) = line.programs()
        done = hetis_plan_here(*words[1:], "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.soak
@pytest.mark.parametrize("page", [page.name for page in PAGES if offline_lines(page.name)])
def test_offline_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    """The commands run verbatim and in order, with searches of 20 s."""
    session = prepared(tmp_path, page)
    (tmp_path / "hetis.toml").write_text('time-limit = "20s"\n')
    lines = offline_lines(page)
    if not any("hetis-plan init" in line.line for line in lines):
        session.run("hetis-plan init")
    if page == "tutorial.md":
        session.replaced["--cluster cluster.yaml"] = "--cluster fleet.yaml"  # the reader has edited it by then
    elif any(" plan.json" in line.line for line in lines):
        session.run(f"{PAPER} --out plan.json")
    for line in lines:
        session.run(line.line, codes=codes_of(line))
    if page == "tutorial.md":
        assert_tutorial_starts_what_it_exported(tmp_path / "exported")


def assert_tutorial_starts_what_it_exported(exported: Path) -> None:
    """The tutorial runs the script of every node with a folder, and sends its request to a replica's address."""
    started = [line.split()[1] for line in lines_like("tutorial.md", "bash exported/")]
    assert sorted(started) == sorted(str(it.relative_to(exported.parent)) for it in exported.glob("*/start.sh"))
    reached = re.findall(r"\| (\S+:\d+) \|", (exported / "README.md").read_text(encoding="utf-8"))
    for line in lines_like("tutorial.md", r"curl http://10\."):
        assert re.search(r"http://([^/]+)/", line)[1] in reached  # type: ignore[index]


def soaked(line: CommandLine) -> object:
    """Return a case that only the soak test has, unless the command takes no more than seconds."""
    return line if "two-cards" in line.line else pytest.param(line, marks=pytest.mark.soak)


@pytest.mark.parametrize("line", [soaked(line) for line in outputs()], ids=str)
def test_figures_in_shown_outputs_are_what_the_command_says(line: CommandLine, tmp_path: Path) -> None:
    """A page may shorten and wrap an output: its numbers are among those of the command, in the same order."""
    codes = codes_of(line)
    told = "" if ExitCode.OK in codes else " 2>&1"  # the reason why stdout is empty
    printed = Session(tmp_path).run(line.line + told, codes=codes)
    for shown in outputs()[line]:
        said = iter(NUMBERS.findall(printed))
        for number in NUMBERS.findall(shown):
            assert number in said, f"{line.page} shows {number}, which {line.line} does not say there:\n{printed}"


# --- with a planner


NODES = {"a100": "A100-PCIe-80GB:4", "r3090-0": "RTX-3090:2", "r3090-1": "RTX-3090:2", "p100": "P100-PCIe-12GB:4"}


@contextmanager
def serving(session: Session, line: str) -> Iterator[str]:
    """Start a planner by a line of a page, on free ports, and yield its address until it is stopped.

    The status page replaces its usual one.
    """
    here = {"HETIS_LISTEN": "127.0.0.1:0", "HETIS_STATUS_PAGE__ADDRESS": "127.0.0.1:0", "HETIS_LOG__FORMAT": "text"}
    session.environment.update(here)
    with session.running(line, r"listens on .*\n") as printed:
        for name in here:
            del session.environment[name]
        addresses = re.search(r"listens on (\S+) .*status page (http://\S+/)", printed)
        assert addresses, printed
        session.replaced["http://127.0.0.1:8471/"] = addresses[2]
        session.environment |= {"HETIS_SERVER": addresses[1], "HETIS_AGENT_SERVER": addresses[1]}
        yield addresses[1]


def lines_like(page: str, pattern: str) -> list[str]:
    found = [line.line for line in LINES if line.page == page and re.match(pattern, line.line)]
    assert found, f"{page} has no line like {pattern}"
    return found


def test_a_fleet_is_served_by_the_commands_of_the_pages(tmp_path: Path) -> None:
    """With a planner, an engine and four agents, plans are activated, inspected and rolled back."""
    # Both pages plan the same; the README's plan is also simulated, which takes longer than all other lines.
    unverified = {"--name night --activate": "--name night --no-verify --activate"}
    session = Session(tmp_path, replaced={"/run/hetis/": f"{tmp_path}/", **unverified})
    with serving(session, *lines_like("README.md", "hetis-planner ")) as server, ExitStack() as nodes:
        session.run("hetis-plan apply examples/paper.yaml")
        for node, cards in NODES.items():
            session.environment |= {
                "HETIS_AGENT_STATE_DIR": str(tmp_path / node),
                "HETIS_AGENT_SIMULATED_DEVICES": cards,
            }
            start = f"{sys.executable} -m examples.simulated_engine --node clusters/paper/nodes/{node}"
            start += f" --simulated-devices {cards}"
            if node == "a100":
                nodes.enter_context(session.running(f"{start} --socket {tmp_path}/engine.sock", "other engines on"))
                (start,) = lines_like("README.md", "hetis-agent ")
            else:
                start += f" --server {server} --state-dir {tmp_path}/{node}"
            nodes.enter_context(session.running(start, "connected: epoch"))
        session.run(*lines_like("README.md", "hetis-plan apply ")).index("ACTIVE")
        for line in lines_like("cli.md", r"hetis-plan (apply|agents|get)\b"):
            session.run(line)
        with session.running(
            *lines_like("cli.md", "hetis-plan watch "), "night", end=SIGINT, code=ExitCode.INTERRUPTED
        ):
            pass
        for line in lines_like("cli.md", r"hetis-plan rollback\b"):
            session.run(line)
        for line in lines_like("operations.md", r"curl "):
            session.run(line)
    own = r"hetis-planner (audit|token|--config planner.yaml --check)|hetis-agent devices"
    store = session.folder / "state/hetis/planner.db"
    settings = {"apiVersion": "hetis/v1", "kind": "PlannerConfig", "store": f"sqlite:///{store}"}
    (tmp_path / "planner.yaml").write_text(json.dumps(settings), encoding="utf-8")
    for line in [*lines_like("operations.md", own), *lines_like("operations.md", "hetis-planner migrate ")]:
        session.run(line)
