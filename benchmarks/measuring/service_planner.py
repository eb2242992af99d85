"""`hetis-planner` as a separate process, with its CPU time, memory and messages.

Its fleet has equal cells, and a plan that gives each cell a replica, built from the proven plan of one cell.
"""

from __future__ import annotations

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
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.measuring.instances import fleet
from hetis.formats.documents import load_model, load_workload
from hetis.planner.convert.documents import document_of
from hetis.planner.use_cases.place import make_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.saved_plans import problem_of
from hetis.planner.use_cases.sources import Inputs, LoadedInputs, engine_rules
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.plan import DEFAULT_STRATEGY, ClassPrice, Objective, Plan, ReplicaPlan
from hetis.v1 import document_pb2

ROOT = Path(__file__).parents[2]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class PlannerProcess:
    """A planner started in a folder of its own. As a context manager, it stops at the end.

    Attributes:
        address: `host:port` of gRPC.
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    def __enter__(self) -> PlannerProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="hetis-benchmark-")
        store = f"sqlite:///{self._folder.name}/planner.db"
        self._log = open(Path(self._folder.name) / "log", "w+")  # closed with the planner
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HETIS_")}
        options = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--store", store, "--ready-json")
        # Writes are timed, not limited: on a fast disk there are more of them per second than one caller may make.
        settings = ("--set", "solver.processes=1", "--set", "writes.per_second=1e6")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hetis.planner.service.main", *options, *settings, *self._arguments],
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
        """Return how many agent messages of this kind the planner has processed so far."""
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
    """Return which calls overlapped no time in which the host kept more than `MOST_STOLEN_SHARE` of a processor.

    A call waits for those before it, so time taken by the host is felt for another `AFTERMATH_S`. What the host took
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
    """Raise the limit on open files to the maximum allowed, and return it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


WORKERS = 8  # per cell
NODES_PER_CELL = 1 + WORKERS
MODEL, WORKLOAD = "Llama-2-70B", "16000/1000"
GPU_MEMORY_UTILIZATION = 0.96  # with vLLM's default, primaries have no room for what is to be moved to them
OBJECTIVE = Objective(ttft_limit_s=None, tpot_limit_s=0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellFleet:
    """A fleet to put under load.

    Attributes:
        cells: node ids of each replica, the primary's first.
        spare: nodes that no replica uses.
    """

    cluster: document_pb2.Document
    plan: document_pb2.Document
    cells: tuple[tuple[str, ...], ...]
    spare: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        return sum(map(len, self.cells)) + len(self.spare)


def cell_fleet(num_nodes: int) -> CellFleet:
    """Return as many cells as fit into ``num_nodes``, each one node with two H100 and eight nodes with a P100."""
    num_cells, num_spare = divmod(num_nodes, NODES_PER_CELL)
    if num_cells < 1:
        raise ValueError(f"{num_nodes} nodes are less than a cell, which has {NODES_PER_CELL}")
    cluster, one = _cluster(num_cells, num_spare), cell_plan()
    inputs = _inputs(cluster)
    plan = replace(
        one,
        result=replace(
            one.result,
            value=one.result.value * num_cells,
            bound=one.result.value * num_cells * (one.result.bound / one.result.value),
        ),
        replicas=tuple(_in_cell(one.replicas[0], cell) for cell in range(num_cells)),
        prices=tuple(_in_fleet(price, num_cells, num_spare) for price in one.prices),
        runners_up=(),
        inputs={**one.inputs, "documents": inputs.documents(), "digests": inputs.digests()},
    )
    if violations := check_plan(plan, problem_of(plan, _settings().problem(inputs, OBJECTIVE))):
        raise ValueError(f"the plan of {num_cells} cells does not hold: {violations[0]}")
    cells = tuple(
        (f"n0-{cell}", *(f"n1-{WORKERS * cell + worker}" for worker in range(WORKERS))) for cell in range(num_cells)
    )
    spare = tuple(f"n1-{WORKERS * num_cells + index}" for index in range(num_spare))
    return CellFleet(cluster=document_of(cluster), plan=document_of(plan), cells=cells, spare=spare)


@cache
def cell_plan() -> Plan:
    """Return the plan of one cell: a replica with the H100 node as primary and all eight P100 as attention workers."""
    inputs = _inputs(_cluster(1, 0))
    settings = _settings()
    loaded = LoadedInputs(inputs=inputs, origins={})
    plan = make_plan(
        loaded,
        settings.problem(inputs, OBJECTIVE),
        settings,
        budget=Budget(time_limit_s=600.0, clock=time.process_time),  # takes 2 s, longer if kernels are compiled first
        report=lambda _: None,
    ).plan
    if len(plan.replicas) != 1 or len(plan.replicas[0].attention_workers) != 1:
        raise ValueError("the plan of a cell is not one replica with one pool of attention workers")
    return plan


def _settings() -> PlacementSettings:
    return PlacementSettings(engine=engine_rules(None, DEFAULT_STRATEGY), rung="workers")


def _cluster(num_cells: int, num_spare: int) -> Cluster:
    return fleet("cells", (num_cells, 2, "H100-SXM-80GB"), (WORKERS * num_cells + num_spare, 1, "P100-PCIe-12GB"))


def _inputs(cluster: Cluster) -> Inputs:
    return Inputs(
        cluster=cluster,
        model=load_model(MODEL),
        workload=load_workload(WORKLOAD),
        profiles={name: modelled_profile(gpu) for name, gpu in cluster.gpu_types.items()},
        engine_settings=EngineSettings(gpu_memory_utilization=GPU_MEMORY_UTILIZATION),
    )


def _in_cell(one: ReplicaPlan, cell: int) -> ReplicaPlan:
    """Return the same replica on the nodes of another cell."""

    def moved(devices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_device_in_cell(device, cell) for device in devices)

    return replace(
        one,
        stages=tuple(replace(stage, devices=moved(stage.devices)) for stage in one.stages),
        attention_workers=tuple(replace(pool, devices=moved(pool.devices)) for pool in one.attention_workers),
    )


def _device_in_cell(device: str, cell: int) -> str:
    node, _, index = device.partition("/")
    group, _, number = node.partition("-")
    each = 1 if group == "n0" else WORKERS
    return f"{group}-{int(number) + each * cell}/{index}"


def _in_fleet(price: ClassPrice, num_cells: int, num_spare: int) -> ClassPrice:
    is_worker = price.gpus_per_node == 1
    return replace(
        price,
        available=price.available * num_cells + (num_spare if is_worker else 0),
        used=price.used * num_cells,
        as_attention_workers=price.as_attention_workers * num_cells,
    )
