"""Which assumption the Hetis paper's lead over HexGen depends on: both heuristics planned under different ones.

    python -m benchmarks.paper_assumptions [--quick] [--json] [--only TEXT]

The cases are those of `benchmarks.paper`: the paper's cluster, models and traces. The rates are saturated ones of the
cost model; that benchmark simulates those of the first assumption. A row changes one thing:

- `NVLink in nodes`, `all-reduces for free`, `network 10 times as fast`: for both;
- `HexGen takes S ms more per stage`: the host of its engine is slower than that of Hetis, in every iteration;
- `HexGen runs N requests at most`, in each replica;
- `HexGen reserves T tokens per request`: its KV is not paged, so that a request holds T tokens whatever its length, or
  the mean that paged ones hold if that is more; `the context` is that of the model.

`over_hexgen` is `hetis-paper` over `hexgen-paper`, and `hetis_over_hexgen` our own search over it, both under the
row's assumption. The paper reports up to 1.33. `attention_over` is the decode attention of a token on its way through
all layers: HexGen's time over that of `hetis-paper`, with `REQUESTS` requests in flight in the whole plan (transfers
to and from attention workers included); the paper reports up to 1.49. `clipped` is the share of requests that the
model's context cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import example, problem
from benchmarks.measuring.rows import Row
from benchmarks.paper import MODELS, OBJECTIVES, TIME_LIMIT_S, TRACES, planned
from hetis.simulator.metrics import prediction_of
from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost, PoolCost, intra_link, rank_shape
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.solver.problem import EngineSettings, PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile, Provenance, Source

NVLINK = Link(bytes_per_s=300e9, latency_s=3e-6)  # of A100-SXM, in one direction
FASTER = 10.0  # times as fast a network
HOST_S = (0.01, 0.02, 0.04)
AT_MOST = (256, 128, 64, 32)
RESERVED = (512, 1024, 2048)
REQUESTS = 64
ADDED = Provenance(source=Source.MODELLED, origin="assumed by benchmarks.paper_assumptions")

Change = Callable[[PlacementProblem], PlacementProblem]


def _unchanged(posed: PlacementProblem) -> PlacementProblem:
    return posed


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """A change of the problem for both systems, and one for HexGen alone."""

    name: str
    both: Change = _unchanged
    hexgen: Change = _unchanged


def main() -> None:
    """Print one row per case and assumption."""
    arguments = rows.parser("benchmarks.paper_assumptions", __doc__).parse_args()
    rows.show(cases(quick=arguments.quick, only=arguments.only), arguments, name="paper_assumptions")


def cases(*, quick: bool, only: str) -> Iterator[Row]:
    """Yield the rows of every model and trace; with ``quick``, of one case, as modelled."""
    for model in MODELS[-1:] if quick else MODELS:
        for trace, workload in list(TRACES.items())[: 1 if quick else None]:
            posed = problem(example("paper"), model=model, workload=workload, objective=OBJECTIVES["throughput"])
            plans = dict[Change, tuple[Plan | None, Plan | None]]()  # of hetis-paper and hetis
            for assumption in assumptions()[: 1 if quick else None]:
                if only in (name := f"{model}, {trace}: {assumption.name}"):
                    both = assumption.both(posed)
                    if assumption.both not in plans:
                        plans[assumption.both] = _plan(both, "hetis-paper"), _plan(both, "hetis")
                    yield row(name, both, assumption, *plans[assumption.both])


def assumptions() -> Sequence[Assumption]:
    """Return all assumptions, the present one first."""
    slower = (Assumption(name=f"HexGen takes {s * 1e3:g} ms more per stage", hexgen=_with_host(s)) for s in HOST_S)
    capped = (Assumption(name=f"HexGen runs {n} requests at most", hexgen=_at_most(n)) for n in AT_MOST)
    reserving = (Assumption(name=f"HexGen reserves {n:,} tokens per request", hexgen=_reserving(n)) for n in RESERVED)
    return (
        Assumption(name="as modelled"),
        Assumption(name="NVLink in nodes", both=_with_nvlink),
        Assumption(name="all-reduces for free", both=_with_free_reduces),
        Assumption(name="network 10 times as fast", both=_with_faster_network),
        *slower,
        *capped,
        *reserving,
        Assumption(name="HexGen reserves the context", hexgen=_reserving(math.inf)),
    )


def row(
    name: str, posed: PlacementProblem, assumption: Assumption, paper: Plan | None, ours: Plan | None
) -> Row:  # fmt: skip
    """Plan HexGen under an assumption, and compare the plans of `hetis-paper` and of our own search with its plan."""
    theirs = _plan(assumption.hexgen(posed), "hexgen-paper")
    of_paper, of_hexgen, of_ours = map(_rate, (paper, theirs, ours))
    return {
        "name": name,
        "hetis_paper_rps": of_paper,
        "hexgen_paper_rps": of_hexgen,
        "hetis_rps": of_ours,
        "over_hexgen": _ratio(of_paper, of_hexgen),
        "hetis_over_hexgen": _ratio(of_ours, of_hexgen),
        "attention_over": _ratio(attention_s(theirs, posed), attention_s(paper, posed)),
        "hexgen_requests": None if theirs is None else sum(r.micro_batch * r.in_flight for r in theirs.replicas),
        "clipped": posed.workload.clipped_ratio,
    }


def _plan(posed: PlacementProblem, strategy: str) -> Plan | None:
    return planned(posed, strategy, TIME_LIMIT_S).plan


def attention_s(plan: Plan | None, posed: PlacementProblem) -> float | None:
    """Return the seconds of a token's decode attention in all layers, the mean of the replicas by their rates."""
    if plan is None:
        return None
    rate = sum(replica.rate for replica in plan.replicas)
    return sum(one.rate / rate * _attention_of(one, posed, REQUESTS * one.rate / rate) for one in plan.replicas)


def _attention_of(replica: ReplicaPlan, posed: PlacementProblem, requests: float) -> float:
    micro_batch, pools = requests / replica.in_flight, {pool.stage: pool for pool in replica.attention_workers}
    total = 0.0
    for number, stage in enumerate(replica.stages):
        cost, link = _cost(posed, stage.gpu, stage.tp), posed.cluster.network.default
        seconds = float(cost.decode_attention_s(micro_batch * stage.kv_head_groups_kept, cost.shape.queries_per_group))
        if pool := pools.get(number):
            of_pool = PoolCost(cost, _cost(posed, pool.gpu, 1), link)
            cards = len(pool.devices) / stage.copies
            seconds = max(seconds, float(of_pool.attention_s(micro_batch, pool.kv_head_groups, cards)))
        total += stage.num_layers * seconds
    return total


def _cost(posed: PlacementProblem, gpu: str, tp: int) -> DeviceCost:
    shape = rank_shape(posed.model, tp)
    assert shape is not None, "the plan has it"
    moments = posed.workload.moments(block_tokens=posed.assumptions.block_tokens)
    link = intra_link(posed.cluster.gpu_types[gpu], None)
    return DeviceCost(posed.model, posed.profiles[gpu], moments, shape, link)


# --- assumptions


def _with_nvlink(posed: PlacementProblem) -> PlacementProblem:
    groups = tuple(replace(group, intra_link=NVLINK) for group in posed.cluster.node_groups)
    return replace(posed, cluster=replace(posed.cluster, node_groups=groups))


def _with_faster_network(posed: PlacementProblem) -> PlacementProblem:
    network = posed.cluster.network
    link = Link(bytes_per_s=FASTER * network.default.bytes_per_s, latency_s=network.default.latency_s / FASTER)
    return replace(posed, cluster=replace(posed.cluster, network=replace(network, default=link)))


def _with_free_reduces(posed: PlacementProblem) -> PlacementProblem:
    def free(fit: Fit) -> Fit:
        return replace(fit, pieces=(Piece(),)) if fit.op is Op.ALL_REDUCE else fit

    return _with_profiles(posed, lambda profile: replace(profile, fits=tuple(map(free, profile.fits))))


def _with_host(more_s: float) -> Change:
    def slower(profile: Profile) -> Profile:
        free = Fit(op=Op.STEP, pieces=(Piece(),), provenance=ADDED)
        step = next((fit for fit in profile.fits if fit.op is Op.STEP), free)
        pieces = tuple(replace(piece, fixed_s=piece.fixed_s + more_s) for piece in step.pieces)
        others = tuple(fit for fit in profile.fits if fit is not step)
        return replace(profile, fits=(*others, replace(step, pieces=pieces, provenance=ADDED)))

    return lambda posed: _with_profiles(posed, slower)


def _at_most(requests: int) -> Change:
    settings = EngineSettings(max_num_seqs=requests)
    return lambda posed: replace(posed, family=replace(posed.family, engine_settings=settings))


def _reserving(tokens: float) -> Change:
    """Return the change by which a request's KV takes the room of so many tokens, and is read as fast as before.

    What is reserved does not vary, so no headroom is needed.
    """

    def change(posed: PlacementProblem) -> PlacementProblem:
        held = posed.workload.moments(block_tokens=posed.assumptions.block_tokens).resident_context
        times = max(1.0, min(tokens, posed.model.max_position) / held)

        def as_fast(fit: Fit) -> Fit:
            pieces = tuple(replace(piece, byte_s=piece.byte_s / times) for piece in fit.pieces)
            return replace(fit, pieces=pieces) if fit.op in (Op.DECODE_ATTENTION, Op.PREFILL_ATTENTION) else fit

        if times == 1.0:
            return posed
        larger = replace(
            posed,
            model=replace(posed.model, kv_bytes=posed.model.kv_bytes * times),
            assumptions=replace(posed.assumptions, kv_headroom_z=0.0),
        )
        return _with_profiles(larger, lambda profile: replace(profile, fits=tuple(map(as_fast, profile.fits))))

    return change


def _with_profiles(posed: PlacementProblem, change: Callable[[Profile], Profile]) -> PlacementProblem:
    return replace(posed, profiles={gpu: change(profile) for gpu, profile in posed.profiles.items()})


def _rate(plan: Plan | None) -> float | None:
    return None if plan is None else prediction_of(plan).rate_rps


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


if __name__ == "__main__":
    main()
