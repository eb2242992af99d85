"""Machines of the runbook, each a folder, with stand-ins for what only the root of a machine may do.

Run as a program, this module is one of the stand-ins: systemctl, useradd, chown, scp, hostname, python3 and pip.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_INS = ("systemctl", "useradd", "chown", "scp", "hostname", "python3")
# Folders of a machine, which are below its own folder here.
FOLDERS = ("/opt/hetis", "/etc/hetis", "/etc/systemd/system", "/var/lib/", "/var/cache/", "/run/hetis")
KILLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)  # which count as a clean end


class Machine:
    """A folder in which blocks of the runbook run as on a machine of that name.

    Args:
        replaced: text of the runbook and what stands for it here, in order.
        installed: the programs of the version that pip installs here, by whether it upgrades.
        services: additional environment of the services.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        replaced: Mapping[str, str],
        installed: Mapping[bool, Path],
        services: Mapping[str, str],
    ) -> None:
        self.name, self.root = name, folder / name
        self._replaced = {**{path: f"{self.root}{path}" for path in FOLDERS}, **replaced}
        self._exported = list[str]()  # lines that later blocks of the same shell see
        programs = self.root / "programs"
        for path in ("programs", "home", *(found.lstrip("/") for found in FOLDERS[2:])):
            (self.root / path).mkdir(parents=True)
        for stand_in in STAND_INS:
            _write_program(programs / stand_in, stand_in)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HETIS_")}
        self._environment = kept | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "COLUMNS": "80",
            "NO_COLOR": "1",
            "MACHINE": str(self.root),
            "INSTALLED": json.dumps([str(installed[False]), str(installed[True])]),
            "SERVICES": json.dumps(dict(services)),
        }

    def run(self, block: str) -> str:
        """Run a block to its end and return its output. Raises AssertionError if one of its commands fails."""
        done = self._started(block)
        assert done.returncode == 0, (
            f"on {self.name}:\n{block}\nends with {done.returncode}\n{done.stdout}{self.logs()}"
        )
        self._exported += re.findall(
            r"^export [^\n]*$|^\w+\(\) \{.*?^\}$", self._written(block), re.MULTILINE | re.DOTALL
        )
        return done.stdout

    def failing(self, block: str) -> str:
        """Run a block that has to fail and return its output."""
        done = self._started(block)
        assert done.returncode, f"on {self.name}:\n{block}\ndoes not fail\n{done.stdout}"
        return done.stdout

    def code_of(self, line: str) -> int:
        """Return the exit code of a line."""
        return self._started(line).returncode

    def _started(self, block: str) -> subprocess.CompletedProcess[str]:
        script = "\n".join(
            [*self._exported, self._written(block).replace("deploy/systemd/", f"{ROOT}/deploy/systemd/")]
        )
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.root / "home",
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    def _written(self, block: str) -> str:
        for there, here in self._replaced.items():
            block = block.replace(there, here)
        return block

    def logs(self) -> str:
        """Return the ends of the logs of all services."""
        found = sorted((self.root / "run").glob("*.log"))
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in found)

    def stop(self) -> None:
        """End all services."""
        for unit in (self.root / "run").glob("*.supervisor"):
            _stop(self.root, unit.stem)


# --- the stand-ins


def _write_program(path: Path, name: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n')
    path.chmod(0o755)


def _stand_in(root: Path, name: str, words: Sequence[str]) -> int:
    options, rest = [word for word in words if word.startswith("-")], [word for word in words if word[0] != "-"]
    match name:
        case "useradd":
            (root / "users").write_text(rest[-1])
        case "chown":
            assert f"{_user(root)}:" == rest[0], f"there is no user {rest[0]}"
        case "hostname":
            print(root.name)
        case "scp":
            *files, target = words
            host, _, path = target.partition(":")
            for file in files:
                shutil.copy(file, root.parent / host / path.removeprefix(f"{root}/"))
        case "python3":
            assert words[:2] == ["-m", "venv"], words
            _make_environment(root, Path(words[2]))
        case "pip":
            assert rest[0] == "install", words
            _install(root, Path(json.loads(os.environ["INSTALLED"])["--upgrade" in options]))
        case "systemctl":
            return _systemctl(root, words)
        case "supervise":
            return _supervise(root, words[0])
    return 0


def _user(root: Path) -> str:
    return (root / "users").read_text()


def _make_environment(root: Path, folder: Path) -> None:
    assert folder == root / "opt/hetis", folder
    (folder / "bin").mkdir(parents=True)
    _write_program(folder / "bin/pip", "pip")


def _install(root: Path, programs: Path) -> None:
    """Link the programs that pip has made, under the names that it gave them."""
    for program in programs.glob("hetis-*"):
        link = root / "opt/hetis/bin" / program.name
        link.unlink(missing_ok=True)
        link.symlink_to(program)


def _settings(root: Path, unit: str) -> dict[str, list[str]]:
    """Return the settings of a unit, with its paths below the machine's folder."""
    text = (root / "etc/systemd/system" / unit).read_text()
    for path in FOLDERS:
        text = text.replace(path.rstrip("/"), f"{root}{path.rstrip('/')}")
    found = dict[str, list[str]]()
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def _systemctl(root: Path, words: Sequence[str]) -> int:
    verb, *units = [word for word in words if not word.startswith("-") and word != "KILL"]
    for unit in units:
        name = unit if "." in unit else f"{unit}.service"
        settings = _settings(root, name)
        if name.endswith(".timer"):
            continue
        assert settings["User"] == [_user(root)], "the unit's user does not exist"
        stem = name.partition(".")[0]
        if verb == "kill":
            os.kill(int((root / f"run/{stem}.pid").read_text()), signal.SIGKILL)
        if verb in ("stop", "restart", "disable"):
            _stop(root, stem)
        if verb in ("start", "restart", "enable"):
            if settings["Type"] == ["oneshot"]:
                for line in (*settings["ExecStart"], *settings.get("ExecStartPost", ())):
                    subprocess.run(
                        _command(line, _environment(root, settings)), env=_environment(root, settings), check=True
                    )
            else:
                _start(root, stem)
    return 0


def _start(root: Path, unit: str) -> None:
    with (root / f"run/{unit}.log").open("ab") as log:
        started = subprocess.Popen(
            [sys.executable, __file__, "supervise", unit], stdout=log, stderr=log, start_new_session=True
        )
    (root / f"run/{unit}.supervisor").write_text(str(started.pid))


def _stop(root: Path, unit: str) -> None:
    path = root / f"run/{unit}.supervisor"
    with contextlib.suppress(OSError):
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.05)
    path.unlink(missing_ok=True)


def _environment(root: Path, settings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **json.loads(os.environ["SERVICES"])}
    for kind, base in (("State", "var/lib"), ("Cache", "var/cache"), ("Runtime", "run")):
        for name in settings.get(f"{kind}Directory", ()):
            (root / base / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            found[f"{kind.upper()}_DIRECTORY"] = str(root / base / name)
    for file in settings.get("EnvironmentFile", ()):
        found |= dict(line.split("=", 1) for line in Path(file).read_text().splitlines())
    return found | dict(one.split("=", 1) for one in settings.get("Environment", ()))


def _command(line: str, environment: Mapping[str, str]) -> list[str]:
    inserted = re.sub(r"\$\{(\w+)\}", lambda name: environment[name[1]], line.replace("%%", "%"))
    return shlex.split(inserted)


def _supervise(root: Path, unit: str) -> int:
    """Run a service until SIGTERM, and start it again as its unit says."""
    settings = _settings(root, f"{unit}.service")
    ended, running = list[int](), list[subprocess.Popen[bytes]]()

    def end(number: int, _: object) -> None:
        ended.append(number)
        for process in running:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, end)

    environment = _environment(root, settings)
    (line,) = settings["ExecStart"]
    while True:
        running[:] = [subprocess.Popen(_command(line, environment), env=environment)]
        (root / f"run/{unit}.pid").write_text(str(running[0].pid))
        code = running[0].wait()
        if ended or code in (0, *(-number for number in KILLED)) or str(code) in settings["RestartPreventExitStatus"]:
            return 0
        time.sleep(float(settings["RestartSec"][0]))


if __name__ == "__main__":
    sys.exit(_stand_in(Path(os.environ["MACHINE"]), sys.argv[1], sys.argv[2:]))
