"""`hetis-planner` as a separate process, with its CPU time, memory and messages.

Run as a module, this is the planner under cProfile, which writes its results to the file named by `PROFILE`.
"""

from __future__ import annotations

import cProfile
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
PROFILE = "HETIS_BENCHMARK_PROFILE"  # not read by the planner
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class PlannerProcess:
    """A planner started in a folder of its own. As a context manager, it stops at the end.

    Attributes:
        address: `host:port` of gRPC.
    """

    def __init__(self, *arguments: str, profile: Path | None = None) -> None:
        """Start the planner. ``profile`` is where to write a cProfile of it, which makes it about twice as slow."""
        self._arguments, self._profile = arguments, profile

    def __enter__(self) -> PlannerProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="hetis-benchmark-")
        store = f"sqlite:///{self._folder.name}/planner.db"
        self._log = open(Path(self._folder.name) / "log", "w+")  # closed with the planner
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HETIS_")}
        if self._profile is not None:
            environment[PROFILE] = str(self._profile.absolute())
        module = "hetis.planner.service.main" if self._profile is None else __name__
        options = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--store", store, "--ready-json")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *options, "--set", "solver.processes=1", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the planner did not start: {self.log()}")
        ready = json.loads(line)
        self.address, self._page = str(ready["listen"][0]), str(ready["status_page"])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.communicate()  # closes its stdout
        self._log.close()
        self._folder.cleanup()

    def log(self) -> str:
        """Return its stderr so far."""
        self._log.flush()
        return Path(self._log.name).read_text(encoding="utf-8")

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process so far, over all threads, without the solver's processes."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def rss_bytes(self) -> int:
        """Return the present memory of the process."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="utf-8").split()[1]
        return int(pages) * resource.getpagesize()

    def messages(self, kind: str) -> float:
        """Return how many agent messages of this kind the planner has taken so far."""
        with urllib.request.urlopen(f"{self._page}metrics", timeout=30) as page:
            text = page.read().decode()
        found = re.search(rf'^hetis_planner_agent_messages_total{{kind="{kind}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0


HOST_WATCH_S, AFTERMATH_S = 0.5, 2.0
MOST_STOLEN_SHARE = 0.05


def stolen_s() -> float:
    """Return the CPU seconds that the host has kept from this machine so far, while processes waited for them."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    return int(fields[8]) / _TICKS_PER_S


class HostWatch:
    """A record of when the host kept processors from this machine, as a context with `undisturbed` at the end."""

    def __enter__(self) -> HostWatch:
        self._ended = threading.Event()
        self._samples = [(time.monotonic(), stolen_s())]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(HOST_WATCH_S):
            self._samples.append((time.monotonic(), stolen_s()))

    def undisturbed(self, began_s: Sequence[float], seconds: Sequence[float]) -> npt.NDArray[np.bool_]:
        """Return which calls ran while and just after the host kept at most `MOST_STOLEN_SHARE` of a processor."""
        return undisturbed(self._samples, began_s, seconds)


def undisturbed(
    samples: Sequence[tuple[float, float]], began_s: Sequence[float], seconds: Sequence[float]
) -> npt.NDArray[np.bool_]:
    """Return which calls met no time in which the host kept more than `MOST_STOLEN_SHARE` of a processor.

    A call waits for those before it, so what the host takes is felt for another `AFTERMATH_S`. What the host took
    before the first sample or after the last is unknown, and is assumed to disturb no call.

    Args:
        samples: moments in order, each with the seconds that the host had kept until then (`stolen_s`).
        began_s, seconds: start and duration of each call.
    """
    at_s, stolen = (np.array(values) for values in zip(*samples, strict=True))
    share = np.diff(stolen) / np.diff(at_s)
    disturbed = np.concatenate([[0.0], np.cumsum(share > MOST_STOLEN_SHARE)])
    began = np.array(began_s)
    first = np.clip(np.searchsorted(at_s, began - AFTERMATH_S) - 1, 0, len(share))
    last = np.clip(np.searchsorted(at_s, began + np.array(seconds)), 0, len(share))
    return np.asarray(disturbed[last] == disturbed[first])


class Watched:
    """CPU time of a planner over a period: ``with watched: ...``, then `cores`, `stolen_cores` and `seconds`."""

    def __init__(self, planner: PlannerProcess) -> None:
        self._planner = planner

    def __enter__(self) -> Watched:
        self._began_s, self._cpu_s, self._stolen_s = time.monotonic(), self._planner.cpu_s(), stolen_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began_s
        self.cpu_s = self._planner.cpu_s() - self._cpu_s
        self.stolen_cores = (stolen_s() - self._stolen_s) / self.seconds

    @property
    def cores(self) -> float:
        return self.cpu_s / self.seconds


def raise_file_limit() -> int:
    """Raise the limit to the most allowed, and return it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def _run_under_profile() -> int:
    from hetis.planner.service.command import run

    profile = cProfile.Profile()
    code = 1
    try:
        code = profile.runcall(run, sys.argv[1:])
    finally:
        profile.dump_stats(os.environ.pop(PROFILE))
    return code


if __name__ == "__main__":
    sys.exit(_run_under_profile())
