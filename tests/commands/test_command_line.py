"""Options of every verb, output files and exit codes that all commands share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Annotated

import pytest
import typer

from hetis.commands.process import INTERRUPTED, command_process, ctrl_c_raises
from hetis.commands.terminal import Terminal
from hetis.commands.verb import BROKEN_PIPE, OK, run_application, verb, version_option
from hetis.planner.cli.exit_codes import ExitCode as PlannerCode
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.profiler.cli.exit_codes import ProfileExitCode as ProfilerCode
from tests.docs.sessions import MAINS
from tests.test_architecture import EXTRAS


def application() -> typer.Typer:
    """Return a command with two verbs: one prints data, the other fails as requested."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    @verb()
    def show(terminal: Terminal, name: str, twice: bool = False) -> int:
        terminal.say("showing")
        terminal.detail("in detail")
        terminal.emit(lambda: {"name": name, "twice": twice}, lambda: f"[name] {name}")
        return 0

    @app.command()
    @verb(prints_data=False)
    def fail(terminal: Terminal, how: str) -> int:
        if how == "code":
            terminal.error("went wrong", ["here", "there"])
            return 5
        if how == "socket":
            ours, theirs = socket.socketpair()
            theirs.close()
            with ours:
                ours.sendall(b"x")
        raise {"interrupt": KeyboardInterrupt, "value": ValueError}[how](how)

    @app.callback()
    def command(
        _version: Annotated[bool, version_option("hetis-test")] = False,
    ) -> None: ...

    return app


def run(*arguments: str) -> int:
    return run_application(application(), "hetis-test", arguments, lambda error: 1 if str(error) == "value" else 99)


def test_every_verb_takes_the_shared_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "a", "--twice", "-o", "json", "-v") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"name": "a", "twice": True}
    assert captured.err.split("\n") == ["showing", "in detail", ""]
    assert run("show", "a", "-q", "--no-color") == 0
    assert capsys.readouterr() == ("[name] a\n", "")


def test_a_verb_without_data_has_no_form_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "code", "-o", "json") == 2
    assert "No such option: -o" in capsys.readouterr().err


def test_every_way_to_end_is_an_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETIS_DEBUG", raising=False)
    assert run("fail", "code") == 5
    assert capsys.readouterr().err == "error: went wrong\n  here\n  there\n"
    assert run("fail", "interrupt") == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    assert run("fail", "value") == 1
    monkeypatch.setenv("HETIS_DEBUG", "1")
    with pytest.raises(ValueError, match="value"):
        run("fail", "value")


def test_a_socket_that_breaks_is_a_failure_that_is_told() -> None:
    """Otherwise a daemon would end without a message, as if the reader of its output had gone away."""
    program = (
        "import sys; from hetis.commands.verb import run_application;"
        "from tests.commands.test_command_line import application;"
        "told = lambda error: print(type(error).__name__, file=sys.stderr) or 1;"
        "sys.exit(run_application(application(), 'hetis-test', ['fail', 'socket'], told))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "BrokenPipeError\n")


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("hetis-test ")


@pytest.mark.parametrize(
    "codes", [PlannerCode, ProfilerCode, ServiceExitCode], ids=["hetis-plan", "hetis-profile", "hetis-planner"]
)
def test_commands_call_the_shared_ends_by_the_same_codes(
    codes: type[PlannerCode | ProfilerCode | ServiceExitCode],
) -> None:
    assert (codes.OK, codes.INTERRUPTED, codes.BROKEN_PIPE) == (OK, INTERRUPTED, BROKEN_PIPE)
    assert {code.name: code.value for code in ProfilerCode}.items() <= {c.name: c.value for c in PlannerCode}.items()


def test_a_reader_that_goes_away_is_no_failure() -> None:
    program = (
        "import os, sys; from tests.commands.test_command_line import command_process, run;"
        "os.write(1, b'x' * 60_000)\n"
        "with command_process('hetis-test', extra='test'): sys.exit(run('show', '-q', 'y' * 100_000))"
    )
    shell = f'set -o pipefail; "{sys.executable}" -c "{program}" | head -c 1'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == BROKEN_PIPE
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["hetis-plan", "hetis-planner", "hetis-agent", "hetis-launch", "hetis-profile"])
def test_every_command_ends_alike_when_its_reader_goes_away(command: str) -> None:
    (script,) = entry_points(group="console_scripts", name=command)
    reader, writer = os.pipe()
    os.close(reader)
    program = f"import sys; from {script.module} import main; sys.argv = [{command!r}, '--help']; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, b"")


@pytest.mark.parametrize("command", ["hetis-plan", "hetis-planner", "hetis-agent", "hetis-launch", "hetis-profile"])
def test_a_closed_stdout_fails_no_command(command: str) -> None:
    (script,) = entry_points(group="console_scripts", name=command)
    program = f"import sys; from {script.module} import main; sys.argv = [{command!r}, '--help']; sys.exit(main())"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (OK, "")


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """Otherwise native libraries would print into the file, and children would have it as their stdout."""
    program = (
        "import os, sys; from hetis.commands.process import open_closed_streams; open_closed_streams();"
        "file = os.open('/', os.O_RDONLY);"
        "os._exit(file > 2 and all(os.get_inheritable(n) for n in range(3)) and None not in (sys.stdin, sys.stdout))"
    )
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(closing, check=False).returncode == 1


IMPORTING = """
import os, signal, sys
class CtrlC:
    def find_spec(self, name, path, target=None):
        if name in ("typer", "hetis.runtime.worker.main"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                pass  # as libraries do that try an import
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, CtrlC())
"""
RUNNING = """
import signal, sys
from hetis.commands.process import INTERRUPTED, command_process, ctrl_c_raises
signal.signal(signal.SIGINT, signal.default_int_handler)
class Gone:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
with command_process("hetis-plan", extra="planner"), ctrl_c_raises():
    Gone()
print("went on")
"""


BARE = f"""
import sys
sys.modules |= dict.fromkeys({sorted(EXTRAS)!r})  # as in the base install
"""
EXTRA_OF = {
    "hetis-plan": "planner",
    "hetis-planner": "planner",
    "hetis-profile": "profiler",
    "hetis-agent": "agent",
    "hetis-launch": "launch",
}


@pytest.mark.parametrize("command", MAINS)
def test_ctrl_c_ends_a_command_that_is_still_importing(command: str) -> None:
    """This holds even if code in between drops the error."""
    program = f"{IMPORTING}from {MAINS[command]} import main; sys.argv = [{command!r}, '--help']; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "interrupted\n")


def test_a_command_says_what_to_install_if_only_the_base_is_there() -> None:
    with pytest.raises(SystemExit) as ended, command_process("hetis-plan", extra="planner"):
        raise ModuleNotFoundError("No module named 'typer'", name="typer")
    assert ended.value.code == "hetis-plan needs typer: pip install 'hetis[planner]'"
    with pytest.raises(SystemExit) as ended, command_process("hetis-worker", extra="worker"):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    assert ended.value.code == "hetis-worker needs torch: pip install 'hetis[worker]'"
    for name in ("torch", "nothing"):  # nothing that this command needs: a bug, whose traceback is wanted
        with pytest.raises(ModuleNotFoundError), command_process("hetis-plan", extra="planner"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("command", sorted(EXTRA_OF))
def test_a_command_in_the_base_install_is_one_line(command: str) -> None:
    """A defect in the past: hetis-agent and hetis-launch ended with a traceback."""
    program = f"from {MAINS[command]} import main; sys.argv = [{command!r}, '--help']; main()"
    assert_says_what_to_install(program, command)


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("hetis.runtime.agent", "hetis-agent"),
        ("hetis.runtime.launch", "hetis-launch"),
        ("hetis.planner.cli", "hetis-plan"),
        ("hetis.planner.service.main", "hetis-planner"),
        ("hetis.profiler.cli", "hetis-profile"),
    ],
)
def test_so_is_a_module_that_is_run(module: str, command: str) -> None:
    program = f"import runpy; sys.argv = ['', '--help']; runpy.run_module({module!r}, run_name='__main__')"
    assert_says_what_to_install(program, command)


def assert_says_what_to_install(program: str, command: str) -> None:
    done = subprocess.run([sys.executable, "-c", BARE + program], capture_output=True, text=True, check=False)
    line = f"{command} needs typer: pip install 'hetis[{EXTRA_OF[command]}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (PlannerCode.INTERNAL, "", line)


def test_ctrl_c_in_a_callback_whose_errors_python_drops_ends_the_command() -> None:
    done = subprocess.run([sys.executable, "-c", RUNNING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "interrupted\n")


def test_ctrl_c_is_as_before_after_a_command() -> None:
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with command_process("hetis-plan", extra="planner"):
        for _ in range(2):
            with ctrl_c_raises():
                assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, before[0])
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
