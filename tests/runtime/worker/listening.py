"""Attention workers that engines find by address and key, as `hetis-worker` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from hetis.runtime.attention.kv import KvShape
from hetis.runtime.transport.channel import ChannelKind
from hetis.runtime.transport.keys import key_of
from hetis.runtime.worker.remote import RemoteDevice, join_at

SECRET = "what only engine and worker know"


@dataclass(frozen=True)
class ListeningWorker:
    """A worker process and its address."""

    process: subprocess.Popen[bytes]
    host: str
    port: int

    def join(
        self,
        shape: KvShape,
        *,
        epoch: int,
        age_s: float = 0.0,
        kind: ChannelKind = ChannelKind.AUTO,
        timeout_s: float = 30.0,
    ) -> RemoteDevice:
        key = key_of(SECRET)
        return join_at("w0", self.host, self.port, key, shape, epoch=epoch, age_s=age_s, kind=kind, timeout_s=timeout_s)


@contextmanager
def listening_worker(folder: Path, *arguments: str, kv_memory: str = "4MiB") -> Iterator[ListeningWorker]:
    """One worker process; it is killed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    key_file, port_file = folder / "worker.key", folder / "port"
    key_file.write_text(SECRET)
    key_file.chmod(0o600)
    command = [sys.executable, "-m", "hetis.runtime.worker", "--name", "w0", "--kv-memory", kv_memory]
    command += ["--key-file", str(key_file), "--port-file", str(port_file), *arguments]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        host, _, port = _read_when_there(port_file, process).rpartition(":")
        yield ListeningWorker(process, host, int(port))
    finally:
        process.kill()
        process.wait(30)


def _read_when_there(path: Path, process: subprocess.Popen[bytes]) -> str:
    until_s = monotonic() + 600  # it may have to compile its kernels, which takes a minute on an idle machine
    while not path.exists():
        assert process.poll() is None, "the worker has ended"
        assert monotonic() < until_s, f"{path} was not written"
        sleep(0.02)
    return path.read_text().strip()
