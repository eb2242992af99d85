"""A worker's settings come from options or from the environment, and all errors are reported at once."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from hetis.runtime.transport.keys import InvalidKeyError, key_of, read_key
from hetis.runtime.worker.main import VARIABLES, WorkerOptionError, WorkerOptions, read_options
from tests.command_line import command_of, run_command

SECRET = "nobody knows this sentence"
REQUIRED = ["--name", "w1", "--kv-memory", "2GiB"]
WITH_KEY = {"HETIS_WORKER_KEY": SECRET}


def secret_file(folder: Path, text: str = f"  {SECRET}\n", *, mode: int = 0o600) -> Path:
    path = folder / "worker.key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_what_is_not_said_has_its_default_and_listens_on_the_loopback() -> None:
    assert read_options(REQUIRED, WITH_KEY) == WorkerOptions(
        name="w1",
        kv_bytes=2 << 30,
        listen=("127.0.0.1", 0),
        device="cpu",
        threads=1,
        timeout_s=10.0,
        log_level="INFO",
        key=key_of(SECRET),
        port_file=None,
    )


def test_the_environment_says_it_as_well_and_an_option_counts_before_it(tmp_path: Path) -> None:
    variables = {
        "HETIS_WORKER_NAME": "gpu2/0",
        "HETIS_WORKER_KV_MEMORY": "774144B",
        "HETIS_WORKER_LISTEN": "[fd00::1]:8600",
        "HETIS_WORKER_DEVICE": "cuda:1",
        "HETIS_WORKER_THREADS": "4",
        "HETIS_WORKER_TIMEOUT": "2.5",
        "HETIS_WORKER_LOG_LEVEL": "debug",
        "HETIS_WORKER_KEY_FILE": str(secret_file(tmp_path)),
        "HETIS_WORKER_PORT_FILE": "/run/hetis/w1",
    }
    assert sorted(variables) == sorted(VARIABLES.values())
    wanted = WorkerOptions(
        name="gpu2/0",
        kv_bytes=774_144,
        listen=("fd00::1", 8600),
        device="cuda:1",
        threads=4,
        timeout_s=2.5,
        log_level="DEBUG",
        key=key_of(SECRET),
        port_file=Path("/run/hetis/w1"),
    )
    assert read_options([], variables) == wanted
    assert read_options(["--name", "other"], variables).name == "other"
    assert read_options([], variables | {"HETIS_WORKER_THREADS": ""}).threads == 1  # set, but empty


def test_all_that_is_wrong_is_said_with_its_source() -> None:
    variables = {
        "HETIS_WORKER_KV_MEMORY": "much",
        "HETIS_WORKER_DEVICE": "tpu",
        "HETIS_WORKER_THREADS": "0",
        "HETIS_WORKER_LISTEN": "0.0.0.0:70000",
    }
    with pytest.raises(WorkerOptionError) as caught:
        read_options(["--timeout", "nan", "--log-level", "loud"], variables)
    messages = caught.value.messages
    assert messages[:2] == (
        "--name is missing, and so is HETIS_WORKER_NAME",
        "HETIS_WORKER_LISTEN is '0.0.0.0:70000', must be HOST:PORT with a port >= 0 and <= 65535",
    )
    assert messages[2].startswith("HETIS_WORKER_KV_MEMORY: 'much' ")
    assert messages[3:] == (
        "HETIS_WORKER_DEVICE is 'tpu', must be cpu, cuda or cuda:N",
        "HETIS_WORKER_THREADS is '0', must be a whole number >= 1 and <= 1024",
        "--timeout is 'nan', must be seconds >= 0.1 and <= 1000000",
        "--log-level is 'loud', must be debug, info, warning, error",
        "--key-file is missing, and so is HETIS_WORKER_KEY",
    )


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_is_read_from_its_file_or_from_the_environment(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    assert read_key(path, {"HETIS_WORKER_KEY": "another sentence, not this one"}) == key_of(SECRET)
    assert read_key(None, {"HETIS_WORKER_KEY": SECRET}) == key_of(SECRET)
    assert read_key(None, {"HETIS_WORKER_KEY": ""}) is None
    options = read_options(
        ["--name", "w", "--kv-memory", "1MiB", "--listen", "0.0.0.0:7070"], {"HETIS_WORKER_KEY": SECRET}
    )
    assert options.key == key_of(SECRET)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    says = f"{path}: its mode is {mode:04o}: others may use it, must be 0600 or 0400"
    with pytest.raises(InvalidKeyError, match=re.escape(says)):
        read_key(path, {})
    with pytest.raises(WorkerOptionError, match=re.escape(says)):
        read_options([*REQUIRED, "--key-file", str(path)], {})


def test_what_is_no_key_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, says in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "it is not a file"),
        (secret_file(tmp_path, "too short\n"), "the key has 9 letters, must have >= 16"),
    ):
        with pytest.raises(InvalidKeyError, match=re.escape(f"{path}: {says}")):
            read_key(path, {})
    path.write_bytes(bytes([0xFF] * 20))
    with pytest.raises(InvalidKeyError, match="it is not UTF-8"):
        read_key(path, {})
    with pytest.raises(InvalidKeyError, match="HETIS_WORKER_KEY: the key has 3 letters, must have >= 16"):
        read_key(None, {"HETIS_WORKER_KEY": "abc"})


def test_nothing_at_all_is_an_error_of_three_lines() -> None:
    done = run_command(command_of("hetis.runtime.worker"))
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            "hetis-worker: --name is missing, and so is HETIS_WORKER_NAME",
            "hetis-worker: --kv-memory is missing, and so is HETIS_WORKER_KV_MEMORY",
            "hetis-worker: --key-file is missing, and so is HETIS_WORKER_KEY",
        ],
    )


def test_more_memory_than_is_free_is_refused_before_anybody_may_come(tmp_path: Path) -> None:
    asked = ["--name", "w1", "--kv-memory", "4PiB", "--key-file", str(secret_file(tmp_path))]
    done = run_command([*command_of("hetis.runtime.worker"), *asked])
    assert done.returncode == 2
    assert re.fullmatch(r"hetis-worker \S+: --kv-memory is 4PiB, cpu has \d+MiB free\n", done.stderr)


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_options(["--version"], {})
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hetis-worker {version('hetis')}\n"
