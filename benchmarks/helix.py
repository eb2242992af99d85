"""Placements of `layers` and of Helix (ASPLOS'25) on Helix's clusters, judged by Helix's own simulator.

    git clone https://github.com/Thesys-lab/Helix-ASPLOS25
    python -m benchmarks.helix --helix Helix-ASPLOS25 [--seconds 660] [--quick] [--only TEXT] [--json | --markdown]

Clusters, machine profiles, traces and Helix's placements (MILP) come from its artifact evaluation; nothing of it is
copied here. Each cluster is posed to `layers` with Helix's tokens per second, KV room and times per batch. Its
simulator runs offline as in the artifact: requests arrive as long as KV room is expected to suffice. Routing is Helix's
max-flow scheduler with flows of its own, or with shares of requests from the plan for its flows.

``decode`` and ``prompt`` are tokens per second after the first minute, ``_late`` in the second half of that;
``vs_helix`` is the ratio of decode to the first row of the cluster. Helix's simulator takes minutes to an hour per row.
It needs networkx and matplotlib; Gurobi is not needed. Only its logs are omitted here.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from hetis.solver.layers.plan import LayersPlan
from hetis.solver.layers.problem import LayersProblem, Links, NodeType, TimeTable
from hetis.solver.layers.solve import solve_layers

PROMPT, OUTPUT = 763.1, 232.4  # mean tokens of the trace, as Helix states them
WARM_UP_S, SECONDS, SECONDS_QUICK = 60.0, 660.0, 120.0
UNITS = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9, "MB": 1e6, "GB": 1e9, "MilliSec": 1e-3, "Sec": 1.0}
SOURCE, SINK = "source", "sink"

Place = tuple[int, int]  # first layer and number of layers
Link = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cluster of Helix's artifact with the layout that Helix found for it."""

    name: str
    cluster: str
    layout: str
    model: str


SINGLE, MANY = "single_cluster/", "high_heterogeneity/"
CASES = (
    Case(
        name="24 nodes, 70B",
        cluster=SINGLE + "config/cluster24.ini",
        layout=SINGLE + "layout_llama70b/ilp",
        model="70B",
    ),
    Case(name="42 nodes, 70B", cluster=MANY + "config/cluster42.ini", layout=MANY + "layout_llama70b/ilp", model="70B"),
    *(
        Case(
            name=name,
            cluster=f"{SINGLE}config/{kind}.ini",
            layout=f"{SINGLE}layout_llama30b/ilp/{kind}",
            model="30B",
        )
        for name, kind in (("4 A100, 30B", "a100"), ("8 L4, 30B", "l4"), ("12 T4, 30B", "t4"))
    ),
)


def main() -> None:
    """Print all rows."""
    parser = rows.parser("benchmarks.helix", __doc__)
    parser.add_argument("--helix", type=Path, required=True, metavar="DIR", help="a checkout of Helix's repository")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of the cluster's time, {SECONDS:.0f} by default")
    arguments = parser.parse_args()
    sys.path.append(str(arguments.helix))  # Helix is not installed as a package, as that would need Gurobi
    seconds = arguments.seconds or (SECONDS_QUICK if arguments.quick else SECONDS)
    found = all_rows(arguments.helix, seconds=seconds, only=arguments.only)
    rows.show(found, arguments, name="helix")


def all_rows(helix: Path, *, seconds: float, only: str = "") -> Iterator[Row]:
    """Yield the rows of every cluster."""
    for case in CASES:
        if only in case.name:
            yield from case_rows(helix / "artifact_evaluation", case, seconds=seconds)


def case_rows(artifact: Path, case: Case, *, seconds: float) -> Iterator[Row]:
    """Yield Helix's placement, then that of `layers` with either routing."""
    cluster = Cluster.read(artifact / case.cluster, case.model)
    problem = cluster.problem()
    plan = solve_layers(problem)
    ours, shares = cluster.assigned(plan)
    flow = {link: share * plan.rate_rps * problem.tokens_per_request for link, share in shares.items()}
    helix = read_layout(artifact / case.layout / "ilp_sol.ini")
    first = 0.0
    for name, places, flows in (
        ("Helix", helix, None),
        ("layers, max-flow routing", ours, None),
        ("layers, shares", ours, flow),
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            served = Simulation(cluster, places, flows, partial=places is ours).run(seconds)
        first = first or served["decode"]
        yield {"name": f"{case.name}: {name}", **served, "vs_helix": served["decode"] / first}


def read_layout(path: Path) -> dict[str, Place]:
    """Return the layers of every node that holds any; nodes are numbered as in the cluster's file."""
    parser = ConfigParser()
    parser.read(path)
    offset = int(parser["Settings"]["offset"])
    places = {}
    for name, text in parser["Solution"].items():
        layers = [int(layer) for layer in text.strip("[] ").split(",") if layer.strip()]
        if layers:
            places[str(int(name.rsplit("_", 1)[1]) - offset)] = (min(layers), len(layers))
    return places


def quantity(text: str) -> float:
    """Return ``1000.0 * mbps`` and the like as a number in Helix's units (its bits per second are bytes)."""
    number, _, unit = text.partition("*")
    return float(number) * UNITS[unit.strip()] if unit else float(number)


def rising(measured: Mapping[int, float]) -> TimeTable:
    """Return measured seconds as a table that never falls; empty batches are left out."""
    sizes = sorted(size for size in measured if size > 0)
    return TimeTable(
        sizes=tuple(float(size) for size in sizes),
        seconds=tuple(accumulate((measured[size] for size in sizes), max)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A Helix cluster: the type of every node, and bandwidth and latency between any two."""

    kinds: dict[str, str]  # type of every node
    links: dict[Link, tuple[float, float]]
    model: Any  # Helix's model object
    manager: Any  # Helix's profiles of the model on these machines

    @classmethod
    def read(cls, path: Path, model: str) -> Cluster:
        parser = ConfigParser()
        if not parser.read(path):
            raise SystemExit(f"{path} is not there: is --helix a checkout of Helix's repository?")
        names = [name.partition("-")[2] for name in parser.sections() if name.startswith("ComputeNode-")]
        kinds = {name: parser[f"ComputeNode-{name}"]["type"] for name in names}
        links = {}
        for section in parser.sections():
            if section.startswith("Link-"):
                _, begin, end = section.split("-")
                found = (quantity(parser[section]["bandwidth"]), quantity(parser[section]["latency"]))
                links[begin, end] = found
                if begin != SOURCE and end != SINK:
                    links.setdefault((end, begin), found)
        profiles = import_module("simulator.model_manager.model_manager")
        helix_model = profiles.ModelName[f"LLaMa{model}"]
        counts = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
        return cls(kinds=kinds, links=links, model=helix_model, manager=profiles.ModelManager(helix_model, counts))

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.manager.machine_num_dict)

    def problem(self) -> LayersProblem:
        """Return the cluster as `layers` takes it, with the links of two of its nodes for all."""
        bandwidth, latency_s = next(value for (a, b), value in self.links.items() if a != SOURCE and b != SINK)
        return LayersProblem(
            name="Helix",
            num_layers=self.manager.get_num_layers(),
            node_types=tuple(self._node_type(kind, count) for kind, count in self.counts.items()),
            mean_prompt_tokens=PROMPT,
            mean_output_tokens=OUTPUT,
            links=Links(
                bandwidth=bandwidth,
                latency_s=latency_s,
                activation_bytes=int(self.manager.get_model_activation_size()),
            ),
        )

    def _node_type(self, kind: str, count: int) -> NodeType:
        profile, most = self.manager.get_profiling_results(kind), self.manager.get_max_num_layers(kind)
        return NodeType(
            name=kind,
            count=count,
            tokens_per_s=tuple(self.manager.get_typical_token_throughput(kind, k) for k in range(1, most + 1)),
            kv_token_layers=tuple(float(self.manager.get_kv_cache_capacity(kind, k)) for k in range(1, most + 1)),
            prompt=rising(profile.prompt_bs2time),
            decode=rising(profile.decode_bs2time),
        )

    def assigned(self, plan: LayersPlan) -> tuple[dict[str, Place], dict[Link, float]]:
        """Return a plan's places and shares with the nodes of the cluster, in order, for those of each type."""
        own = {kind: [name for name, other in self.kinds.items() if other == kind] for kind in self.counts}
        names: dict[str | None, str] = {
            node.name: own[node.kind][int(node.name.rsplit("-", 1)[1])] for node in plan.nodes
        }
        places = {names[node.name]: (node.first_layer, node.num_layers) for node in plan.nodes}
        shares = {(names.get(link.source, SOURCE), names.get(link.target, SINK)): link.share for link in plan.links}
        return places, shares


def usable_links(places: Mapping[str, Place], num_layers: int, *, partial: bool) -> Iterator[Link]:
    """Yield the links that requests can take: to nodes that begin with the next layer, or with ``partial`` hold it."""
    for name, (first, held) in places.items():
        end = first + held
        if first == 0:
            yield SOURCE, name
        if end == num_layers:
            yield name, SINK
        for other, (begin, more) in places.items():
            if begin == end or (partial and begin < end < begin + more):
                yield name, other


class Simulation:
    """One run of Helix's simulator."""

    def __init__(
        self, cluster: Cluster, places: Mapping[str, Place], flow: Mapping[Link, float] | None, *, partial: bool
    ) -> None:
        simulators = import_module("simulator.event_simulator.cluster_simulator")
        scheduling = import_module("simulator.scheduler.global_maxflow.global_maxflow_scheduler")
        manager = cluster.manager
        sim = simulators.ClusterSimulator(model_name=cluster.model, machine_num_dict=cluster.counts)
        self._simulator, self._finished = sim, _Finished()
        sim.finished_requests = self._finished
        source, sink = sim.initialize(
            10e9,
            10e9,
            import_module("simulator.event_simulator.model").create_model(manager.get_model_params()),
            list(cluster.counts),
        )
        uids = {SOURCE: source.node_uid, SINK: sink.node_uid}
        for name in sorted(places, key=int):
            kind, held = cluster.kinds[name], places[name][1]
            room = manager.get_kv_cache_capacity(kind, held)
            uids[name] = sim.add_compute_node(1e12, 10e9, 10e9, 1e9, kind, room, 0).node_uid
        for begin, end in usable_links(places, manager.get_num_layers(), partial=partial):
            bandwidth, latency_s = cluster.links[begin, end]
            sim.add_network_link(uids[begin], uids[end], latency_s, bandwidth)
        sim.init_scheduler(
            simulators.SchedulingMethod.MaxFlow,
            {
                "kv_param": scheduling.KVParameters(expected_kv_hwm=0.85, expected_output_length_ratio=1),
                "scheduling_mode": scheduling.SchedulingMode.Offline,
            },
        )
        sim.init_query_manager()
        _forget(sim)
        sim.mark_as_ready()
        for name, (first, held) in places.items():
            sim.issue_command_load_model(0, uids[name], list(range(first, first + held)), [])
        sizes = manager.get_model_params()
        self._start_s = math.ceil(max(held * max(sizes) / 1e9 for _, held in places.values())) + 1
        sim.simulate(until=self._start_s)
        if flow is not None:
            _route(sim.scheduler.flow_graph, {(uids[a], uids[b]): tokens for (a, b), tokens in flow.items()})
        sim.update_scheduler()

    def run(self, seconds: float) -> dict[str, float]:
        """Serve for this time and return tokens per second."""
        feeders = import_module("simulator.trace_generator.simulator_query_feeder")
        feeder = feeders.OfflineRequestFeeder(
            initial_query_count=20,
            start_time=self._start_s,
            duration=seconds,
            stop_at_duration=True,
            feed_hwm=0.8,
            seed=0,
        )
        gc.disable()  # it would traverse millions of token records again and again
        try:
            feeder.auto_simulate(simulator=self._simulator)
        finally:
            gc.freeze()  # every later collection would traverse them, too
            gc.enable()
        warm, end = self._start_s + WARM_UP_S, self._start_s + seconds
        late = (warm + end) / 2
        return {
            "decode": self._finished.rate("Increment", warm, end),
            "decode_late": self._finished.rate("Increment", late, end),
            "prompt": self._finished.rate("Initialization", warm, end),
            "prompt_late": self._finished.rate("Initialization", late, end),
        }


class _Finished(dict[int, Any]):
    """A log of finished passes (time, phase, number of tokens) in place of their histories."""

    def __init__(self) -> None:
        super().__init__()
        self._passes: list[tuple[float, str, int]] = []

    def __setitem__(self, uid: int, finished: tuple[float, Any]) -> None:
        time_s, request = finished
        self._passes.append((time_s, request.phase.name, request.token_seq_length))

    def rate(self, phase: str, begin_s: float, end_s: float) -> float:
        """Return tokens per second of a phase."""
        tokens = sum(n for time_s, of, n in self._passes if of == phase and begin_s <= time_s <= end_s)
        return tokens / (end_s - begin_s)


class _Nothing(dict[Any, Any]):
    """A log that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


def _forget(simulator: Any) -> None:
    """Make a simulator keep no logs: they take gigabytes, and nothing that is simulated depends on them."""
    simulator.previous_events_list = simulator.previous_events_dict = _Nothing()
    simulator.logger.add_log = lambda **_: None
    analyzer = simulator.query_manager.latency_analyzer
    analyzer.add_request = analyzer.add_query = lambda **_: None


def _route(graph: Any, flow: Mapping[tuple[int, int], float]) -> None:
    """Make Helix's scheduler weight links by ``flow``, in tokens per second, instead of by its maximum flow."""
    solve = graph.update_flow

    def update_flow(time_stamp: float) -> tuple[float, dict[str, dict[str, float]]]:
        solve(time_stamp=time_stamp)
        graph.flow_dict = flow_dict(graph.flow_dict, flow)
        return graph.flow_value, graph.flow_dict

    graph.update_flow = update_flow


def flow_dict(
    edges: Mapping[str, Sequence[str] | Mapping[str, float]], flow: Mapping[tuple[int, int], float]
) -> dict[str, dict[str, float]]:
    """Return a flow over links as one over Helix's graph, which cuts every node at its cards and its GPU."""
    entering: dict[str, float] = {}
    leaving: dict[str, float] = {}
    for (begin, end), tokens in flow.items():
        leaving[str(begin)] = leaving.get(str(begin), 0.0) + tokens
        entering[str(end)] = entering.get(str(end), 0.0) + tokens

    def carried(tail: str, head: str) -> float:
        begin, _, part = tail.partition("_")
        end, _, _ = head.partition("_")
        if tail == SOURCE:
            return leaving.get(end, 0.0)
        if head == SINK or begin == end:
            return entering.get(begin, 0.0)
        assert part == "out", f"{tail} -> {head} is no edge between nodes"
        return flow.get((int(begin), int(end)), 0.0)

    return {tail: {head: carried(tail, head) for head in heads} for tail, heads in edges.items()}


if __name__ == "__main__":
    main()
