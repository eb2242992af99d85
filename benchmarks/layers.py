"""Placements of layers: seconds, gap, and whether a small queueing model of the chain agrees with the objective.

    python -m benchmarks.layers [--quick] [--json] [--markdown]

The fleets are two examples (`examples/layers-24.yaml`, `layers-42.yaml`) and two to which nothing was fitted. Each is
placed by the plan, by maximum flow, and by others (short searches from several seeds, random chains). ``rate`` is the
objective, ``flow`` the static flow, and ``queued`` what the queue serves, all in requests per second. The last row of
a fleet has the rank correlations (Spearman) of ``rate`` and of ``flow`` with ``queued``.

The queue has individual requests, batches and hops, and is written independently of `hetis.solver.layers.plan`,
without its round trips, clumps of batches and mean lengths:

- Requests always wait (a closed queue at the entrance). Lengths are exponential around the means, in whole tokens, at
  least one.
- A request chooses its path once. At every node it goes to the one of the next nodes with KV room that is furthest
  behind its share (weighted round robin). It holds room for its prompt and output, times the layers it has computed
  there, until it ends. If no path has room, it waits, and so does everything behind it.
- A node works on one batch at a time. When it becomes free, it takes all waiting sequences and up to `BATCH_TOKENS`
  tokens of whole prompts in order (a longer prompt alone). A batch takes, layer by layer, the prompt time of its prompt
  tokens and the decode time of its sequences that need the layer.
- At the start all requests are in the middle of their outputs, with lengths distributed as found in flight.
- A node's network card then sends the batch on, one message per request and token, in order. The last node sends only
  tokens.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from examples.layers_fleets import fleet
from hetis.formats.documents import from_data, load_layers_problem
from hetis.solver.budget import Budget
from hetis.solver.layers import solve
from hetis.solver.layers.plan import LayersPlan, LinkShare, PlacedNode
from hetis.solver.layers.problem import LayersProblem, NodeType
from hetis.solver.layers.solve import solve_layers, solve_max_flow

BATCH_TOKENS = 2048  # prompt tokens per batch, a usual limit in engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The queue's measurements after its warm-up."""

    rate_rps: float
    in_flight: float
    round_trip_s: float


@dataclass(slots=True)
class _Request:
    prompt: int
    left: int
    tokens: int
    path: list[tuple[str, int]]  # nodes, each with its first layer
    hop: int = 0
    prefilling: bool = True


@dataclass(slots=True)
class _Node:
    place: PlacedNode
    kind: NodeType
    room: float
    waiting: deque[_Request] = field(default_factory=deque)
    working: bool = False
    card_free_s: float = 0.0


class ChainQueue:
    """The queueing model of one placement."""

    def __init__(self, problem: LayersProblem, plan: LayersPlan, *, seed: int = 0) -> None:
        self._problem = problem
        self._random = random.Random(seed)
        kinds = {kind.name: kind for kind in problem.node_types}
        self._nodes = {
            place.name: _Node(place, kinds[place.kind], kinds[place.kind].kv_token_layers[place.num_layers - 1])
            for place in plan.nodes
        }
        self._next: dict[str | None, list[LinkShare]] = defaultdict(list)
        for link in plan.links:
            self._next[link.source].append(link)
        self._sent: dict[tuple[str | None, str | None], int] = defaultdict(int)
        self._events: list[tuple[float, int, str, object]] = []
        self._count = 0
        self._now_s = 0.0
        self._in_flight = 0
        self._tokens = 0
        self._upcoming = self._new_request()

    def run(self, *, warm_up_s: float, measured_s: float) -> Served:
        """Serve for this time; everything before the end of the warm-up is discarded."""
        self._fill()
        area, last_s, tokens = 0.0, warm_up_s, 0
        warm = False
        while self._events and self._events[0][0] <= warm_up_s + measured_s:
            time_s, _, what, thing = heapq.heappop(self._events)
            if not warm and time_s >= warm_up_s:
                warm, tokens = True, self._tokens
            if warm:
                area += self._in_flight * (time_s - last_s)
                last_s = time_s
            self._now_s = time_s
            if what == "arrive":
                self._arrive(thing)  # type: ignore[arg-type]
            else:
                self._finish(*thing)  # type: ignore[misc]
        served = (self._tokens - tokens) / measured_s
        in_flight = area / measured_s
        return Served(
            rate_rps=served / self._problem.mean_output_tokens,
            in_flight=in_flight,
            round_trip_s=in_flight / served if served else float("inf"),
        )

    def _later(self, delay_s: float, what: str, thing: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (self._now_s + delay_s, self._count, what, thing))

    def _new_request(self) -> tuple[int, int]:
        means = (self._problem.mean_prompt_tokens, self._problem.mean_output_tokens)
        prompt, output = (max(1, round(self._random.expovariate(1 / mean))) for mean in means)
        return prompt, output

    def _fill(self) -> None:
        """Add the requests in flight at a random moment.

        Their outputs are twice as long as average (length-biased), and some share of them is already generated.
        """
        mean = self._problem.mean_output_tokens
        while True:
            prompt, output = self._new_request()[0], max(1, round(self._random.gammavariate(2, mean)))
            request = self._enter(prompt, output)
            if request is None:
                return
            request.left, request.prefilling = self._random.randint(1, output), False
            self._later(self._random.random(), "arrive", request)

    def _admit(self) -> None:
        while (request := self._enter(*self._upcoming)) is not None:
            self._upcoming = self._new_request()
            self._later(self._problem.links.latency_s, "arrive", request)

    def _enter(self, prompt: int, output: int) -> _Request | None:
        """Return the request on its path with room reserved for it, or None if there is no room."""
        path = self._path(prompt + output)
        if path is None:
            return None
        request = _Request(prompt, output, prompt + output, path)
        for name, begin in path:
            self._nodes[name].room -= self._entries(name, begin, request.tokens)
        self._in_flight += 1
        return request

    def _entries(self, name: str, begin: int, tokens: int) -> int:
        return tokens * (self._nodes[name].place.end_layer - begin)

    def _path(self, tokens: int) -> list[tuple[str, int]] | None:
        """Return a path with room, counting the use of its links, or None if there is none."""
        path: list[tuple[str, int]] = []
        links: list[tuple[str | None, str | None]] = []
        at: str | None = None
        layer = 0
        while layer < self._problem.num_layers:
            open_ = [
                link
                for link in self._next[at]
                if link.target is not None
                and self._nodes[link.target].room >= self._entries(link.target, layer, tokens)
            ]
            if not open_:
                return None
            link = min(open_, key=lambda one: (self._sent[one.source, one.target] + 1) / one.share)
            assert link.target is not None
            path.append((link.target, layer))
            links.append((at, link.target))
            at, layer = link.target, self._nodes[link.target].place.end_layer
        for pair in links:
            self._sent[pair] += 1
        return path

    def _arrive(self, request: _Request) -> None:
        if request.hop == len(request.path):
            self._token_made(request)
            return
        node = self._nodes[request.path[request.hop][0]]
        node.waiting.append(request)
        self._start(node)

    def _start(self, node: _Node) -> None:
        if node.working or not node.waiting:
            return
        batch = [request for request in node.waiting if not request.prefilling]
        prompts = [request for request in node.waiting if request.prefilling]
        taken = 0
        while prompts and (taken == 0 or taken + prompts[0].prompt <= BATCH_TOKENS):
            taken += prompts[0].prompt
            batch.append(prompts.pop(0))
        node.waiting = deque(prompts)
        node.working = True
        self._later(self._batch_s(node, batch), "finish", (node, batch))

    def _batch_s(self, node: _Node, batch: list[_Request]) -> float:
        held = node.place.num_layers
        prompts = node.kind.prompt_table(held)
        decodes = node.kind.decode_table(held)
        begins = sorted({request.path[request.hop][1] for request in batch})
        total_s = 0.0
        for begin, end in zip(begins, [*begins[1:], node.place.end_layer], strict=True):
            here = [request for request in batch if request.path[request.hop][1] <= begin]
            prompt = sum(request.prompt for request in here if request.prefilling)
            decoding = sum(not request.prefilling for request in here)
            layer_s = (prompts.at(prompt) if prompt else 0.0) + (decodes.at(decoding) if decoding else 0.0)
            total_s += (end - begin) * layer_s
        return total_s

    def _finish(self, node: _Node, batch: list[_Request]) -> None:
        node.working = False
        links = self._problem.links
        for request in batch:
            request.hop += 1
            if request.hop < len(request.path):
                tokens = request.prompt if request.prefilling else 1
                node.card_free_s = max(node.card_free_s, self._now_s) + tokens * links.token_s
                self._later(node.card_free_s - self._now_s + links.latency_s, "arrive", request)
            else:
                self._later(links.latency_s, "arrive", request)
        self._start(node)

    def _token_made(self, request: _Request) -> None:
        self._tokens += 1
        request.left -= 1
        request.prefilling = False
        if request.left > 0:
            request.hop = 0
            self._later(self._problem.links.latency_s, "arrive", request)
            return
        self._in_flight -= 1
        for name, begin in request.path:
            self._nodes[name].room += self._entries(name, begin, request.tokens)
        self._admit()


EXAMPLES = Path(__file__).parents[1] / "examples"
FLEETS = ("layers-24", "layers-42")
UNSEEN = {  # fleets to which no constant of the model was fitted: nodes of each GPU type, prompt and output tokens
    "unseen, 16 of 3 types": ({"H100-PCIe-80GB": 2, "RTX-3090": 6, "P100-PCIe-16GB": 8}, (900.0, 250.0)),
    "unseen, 16 A10": ({"A10": 16}, (500.0, 400.0)),
}
EFFORTS = (0, 3, 30, 300)  # moves per node of the short searches: from random chains to good plans
SEEDS, SEEDS_QUICK = 3, 1
WARM_UP_S, MEASURED_S = 60.0, 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A placement with the queue's result."""

    name: str
    plan: LayersPlan
    queued_rps: float


def main() -> None:
    """Print all rows."""
    arguments = rows.parser("benchmarks.layers", __doc__).parse_args()
    rows.show(all_rows(quick=arguments.quick, only=arguments.only), arguments, name="layers")


def all_rows(*, quick: bool, only: str = "") -> Iterator[Row]:
    """Yield the rows of every fleet."""
    for name, problem in problems():
        if only in name:
            yield from fleet_rows(name, problem, seeds=SEEDS_QUICK if quick else SEEDS)


def problems() -> Iterator[tuple[str, LayersProblem]]:
    """Yield the examples' problems, and fleets of the same roofline to which the model was not fitted."""
    for name in FLEETS:
        yield name, load_layers_problem(EXAMPLES / f"{name}.yaml")
    for name, (counts, (prompt, output)) in UNSEEN.items():
        problem = from_data(fleet(name, counts))
        assert isinstance(problem, LayersProblem)
        yield name, replace(problem, mean_prompt_tokens=prompt, mean_output_tokens=output)


def fleet_rows(title: str, problem: LayersProblem, *, seeds: int) -> Iterator[Row]:
    """Yield a row per placement, then one with rank correlations."""
    judged = []
    for name, plan in placements(problem, seeds=seeds):
        served = ChainQueue(problem, plan).run(warm_up_s=WARM_UP_S, measured_s=MEASURED_S)
        judged.append(Judged(name=name, plan=plan, queued_rps=served.rate_rps))
        yield {
            "name": f"{title}, {name}",
            "rate": plan.rate_rps,
            "flow": plan.flow_rps,
            "queued": served.rate_rps,
            "queued_over_rate": served.rate_rps / plan.rate_rps,
            "bound": plan.bound_rps,
            "gap": plan.gap,
            "cpu_s": plan.solver_s,
        }
    queued = [one.queued_rps for one in judged]
    yield {
        "name": f"{title}, rank correlation over {len(judged)}",
        "rate": spearman([one.plan.rate_rps for one in judged], queued),
        "flow": spearman([one.plan.flow_rps for one in judged], queued),
        "queued": None,
        "queued_over_rate": None,
        "bound": None,
        "gap": None,
        "cpu_s": None,
    }


def placements(problem: LayersProblem, *, seeds: int) -> Iterator[tuple[str, LayersPlan]]:
    """Yield the plan, the placement of maximum flow, and worse ones."""
    solve_layers(problem, budget=Budget(time_limit_s=0.0, clock=time.process_time))  # compile first
    yield "plan", solve_layers(problem, budget=Budget(clock=time.process_time))
    yield "most flow", solve_max_flow(problem, budget=Budget(clock=time.process_time))
    for effort in EFFORTS:
        few = mock.patch.multiple(solve, MOVES_PER_NODE=effort, FINAL_MOVES_PER_NODE=0, STARTS=1, FINALISTS=0)
        for seed in range(seeds):
            with few:
                yield f"{effort} moves per node, seed {seed}", solve_layers(problem, seed=seed)
                yield f"{effort} moves per node for flow, seed {seed}", solve_max_flow(problem, seed=seed)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of two sequences without ties."""
    first, second = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


if __name__ == "__main__":
    main()
