"""Plans as messages keep what programs need, whatever the plan; and fit into a message, however large it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.documents import digest
from hetis.formats.files import content_digest
from hetis.planner.convert.plans import (
    complete,
    objective_from_proto,
    progress_to_proto,
    replica_from_proto,
    replica_to_proto,
    result_to_proto,
    without_contents,
)
from hetis.planner.jobs.messages import progress_from_frame, progress_to_frame
from hetis.planner.jobs.searching import document_bytes
from hetis.solver.budget import Progress
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Objective, ObjectiveKind, ReplicaPlan, Role, StagePlan
from hetis.v1 import document_pb2, plan_pb2
from tests.planner import plans

COUNTS = st.integers(0, 2**31)
NUMBERS = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
DEVICES = st.lists(st.text(min_size=1), max_size=3).map(tuple)
STAGES = st.builds(
    StagePlan,
    gpu=st.text(),
    tp=COUNTS,
    copies=COUNTS,
    first_layer=COUNTS,
    num_layers=COUNTS,
    devices=DEVICES,
    kv_head_groups_kept=COUNTS,
)
POOLS = st.builds(
    AttentionWorkerPool, stage=COUNTS, gpu=st.text(), devices=DEVICES, kv_head_groups=COUNTS, shared=st.booleans()
)
MADE = plans.plan(plans.paper_replica())
REPLICAS = st.builds(
    ReplicaPlan,
    rate=NUMBERS,
    ttft_s=NUMBERS,
    tpot_s=NUMBERS,
    micro_batch=COUNTS,
    in_flight=COUNTS,
    chunk_tokens=COUNTS,
    kv_tokens=st.integers(0, 2**63),
    stages=st.lists(STAGES, max_size=3).map(tuple),
    attention_workers=st.lists(POOLS, max_size=2).map(tuple),
    role=st.sampled_from(Role),
    expert_parallel=st.booleans(),
    kv_zones=st.lists(st.text(), max_size=2).map(tuple),
)
ROUTES = st.builds(KvRoute, prefill=COUNTS, decode=COUNTS, rate=NUMBERS)


@given(REPLICAS)
def test_a_replica_is_the_same_after_the_way_there_and_back(replica: ReplicaPlan) -> None:
    assert replica_from_proto(replica_to_proto(replica, MADE)) == replica


def test_a_replica_of_a_sender_that_knows_no_roles_is_unified() -> None:
    message = replica_to_proto(MADE.replicas[0], MADE)
    message.ClearField("role")
    assert replica_from_proto(message) == MADE.replicas[0]


@pytest.mark.parametrize(
    ("role", "max_num_seqs", "limit"),
    [
        (Role.PREFILL, 31, 31),
        (Role.PREFILL, 32, 0),
        (Role.PREFILL, None, 0),
        (Role.DECODE, 31, 0),
        (Role.UNIFIED, 31, 0),
    ],
)
def test_only_prefill_replicas_whose_chunks_hold_more_prompts_are_limited_by_a_setting(
    role: Role, max_num_seqs: int | None, limit: int
) -> None:
    """Others are the same under any setting, so that they are kept where a plan at another one is activated."""
    settings = {} if max_num_seqs is None else {"engine_settings": {"max_num_seqs": max_num_seqs}}
    replica = replace(MADE.replicas[0], role=role, in_flight=1, chunk_tokens=32 * 64)
    assert replica_to_proto(replica, replace(MADE, inputs={**MADE.inputs, **settings})).seats_limit == limit


@pytest.mark.parametrize(
    ("name", "value", "is_started_anew"),
    [
        ("max_num_seqs", 32, False),
        ("max_num_seqs", 8, True),
        ("gpu_memory_utilization", 0.85, True),
        ("kv_blocks", 62, True),
    ],
)
def test_a_setting_that_starts_an_engine_otherwise_changes_the_message_of_a_prefill_replica(
    name: str, value: float, is_started_anew: bool
) -> None:
    """Its engine is started anew where the other plan is activated."""
    prefill = replace(MADE.replicas[0], role=Role.PREFILL, in_flight=1, chunk_tokens=2048)
    free = replace(MADE, replicas=(prefill,))
    kept = replace(free, inputs={**free.inputs, "engine_settings": {name: value}})
    assert (replica_to_proto(prefill, free) != replica_to_proto(prefill, kept)) == is_started_anew


@given(st.lists(ROUTES, max_size=4).map(tuple))
def test_routes_are_the_same_after_the_way_there_and_back(routes: tuple[KvRoute, ...]) -> None:
    plan = replace(MADE, kv_routes=routes)
    message = plan_pb2.Plan(result=result_to_proto(plan, b"{}"))
    complete(message, plan, b"{}")
    assert routes_of(message.result) == routes


def routes_of(result: plan_pb2.PlanResult) -> tuple[KvRoute, ...]:
    return tuple(KvRoute(prefill=one.prefill, decode=one.decode, rate=one.rate_rps) for one in result.kv_routes)


def test_cards_that_several_stages_share_count_once() -> None:
    one = MADE.replicas[0]
    pool = AttentionWorkerPool(stage=0, gpu="L4", devices=("x/0", "x/1"), kv_head_groups=1, shared=True)
    sharing = replace(one, attention_workers=(pool, replace(pool, stage=1)))
    message = result_to_proto(replace(MADE, replicas=(sharing,)), b"")
    assert message.num_attention_workers == 2
    assert message.num_gpus == sum(len(stage.devices) for stage in one.stages) + 2


@given(st.lists(REPLICAS, max_size=4).map(tuple), NUMBERS, st.floats(allow_nan=False), st.text())
def test_a_result_counts_and_says_what_was_proved(
    replicas: tuple[ReplicaPlan, ...], value: float, bound: float, note: str
) -> None:
    gap = math.inf if math.isinf(bound) else 0.5
    plan = replace(
        MADE, replicas=replicas, result=replace(MADE.result, value=value, bound=bound, gap=gap), notes=(note,)
    )
    message = result_to_proto(plan, b"document")
    assert message.num_replicas == len(replicas)
    assert message.num_gpus == sum(len(replica.devices()) for replica in replicas)
    assert message.num_attention_workers == sum(len(r.worker_devices()) for r in replicas)
    assert message.HasField("bound") == message.HasField("gap") == math.isfinite(bound)
    assert (message.value, list(message.notes)) == (value, [note])
    assert (message.document_bytes, message.document.digest) == (8, content_digest(b"document"))


def test_the_digest_of_a_plan_is_that_of_its_canonical_document() -> None:
    assert content_digest(document_bytes(MADE)) == digest(MADE)


def test_the_full_view_has_everything_where_there_is_room() -> None:
    plan = MADE
    message = plan_pb2.Plan(result=result_to_proto(plan, b"{}"))
    complete(message, plan, b"{}")
    assert tuple(map(replica_from_proto, message.result.replicas)) == plan.replicas
    assert message.result.document.content == b"{}"
    assert len(message.result.prices) == len(plan.prices)
    assert not message.result.replicas_truncated


def test_routes_are_all_there_or_said_to_be_missing() -> None:
    route = KvRoute(prefill=1, decode=2, rate=0.5)
    for count, fits in ((3, True), (400_000, False)):
        plan = replace(MADE, kv_routes=(route,) * count)
        message = plan_pb2.Plan(result=result_to_proto(plan, b"{}"))
        complete(message, plan, b"{}")
        assert routes_of(message.result) == (plan.kv_routes if fits else ())
        assert message.result.replicas_truncated == (not fits)
        assert message.ByteSize() <= 4 << 20


@given(st.integers(0, 1500), st.integers(0, 4 << 20), st.integers(1, 5_000))
def test_the_full_view_is_never_larger_than_a_message(num_replicas: int, document_bytes: int, name_bytes: int) -> None:
    stage = replace(MADE.replicas[0].stages[0], devices=("n" * name_bytes,))
    plan = replace(MADE, replicas=(replace(MADE.replicas[0], stages=(stage,)),) * num_replicas)
    document = bytes(document_bytes)
    message = plan_pb2.Plan(result=result_to_proto(plan, document))
    complete(message, plan, document)
    assert message.ByteSize() <= 4 << 20
    assert message.result.replicas_truncated == (len(message.result.replicas) < num_replicas)
    assert len(message.result.replicas) <= 1000
    assert message.result.document.content in (b"", document)


def test_the_basic_view_leaves_contents_out_and_nothing_else() -> None:
    document = document_pb2.Document(content=b"x", source_name="model.yaml")
    plan = plan_pb2.Plan(spec=plan_pb2.PlanSpec(model_document=document, workload_name="w", seed=3))
    basic = without_contents(plan)
    assert (basic.spec.model_document.source_name, basic.spec.workload_name, basic.spec.seed) == ("model.yaml", "w", 3)
    assert not basic.spec.model_document.content
    assert plan.spec.model_document.content == b"x"
    assert without_contents(plan_pb2.Plan()) == plan_pb2.Plan()


@given(
    st.text(min_size=1),
    NUMBERS,
    st.none() | NUMBERS,
    st.none() | st.just(math.inf) | NUMBERS,
    st.none() | st.just(math.inf) | NUMBERS,
)
def test_progress_says_only_what_is_known(
    phase: str, elapsed_s: float, incumbent: float | None, bound: float | None, gap: float | None
) -> None:
    progress = Progress(phase=phase, elapsed_s=elapsed_s, incumbent=incumbent, bound=bound, gap=gap)
    message = progress_to_proto(progress_from_frame(progress_to_frame(progress)), "USD/h")
    assert (message.phase, message.elapsed_s, message.unit) == (phase, elapsed_s, "USD/h")
    for name, value in (("incumbent", incumbent), ("bound", bound), ("gap", gap)):
        is_known = value is not None and math.isfinite(value)
        assert message.HasField(name) == is_known  # type: ignore[arg-type]
        assert not is_known or getattr(message, name) == value


def read(message: plan_pb2.Objective) -> tuple[Objective, dict[str, str]]:
    wrong: dict[str, str] = {}
    return objective_from_proto(message, "o", wrong.__setitem__), wrong


def test_an_objective_that_says_nothing_is_goodput_with_its_default_limits() -> None:
    assert read(plan_pb2.Objective()) == (Objective(), {})


def test_throughput_has_no_limits_unless_they_are_given() -> None:
    throughput = plan_pb2.Objective(kind=plan_pb2.OBJECTIVE_KIND_THROUGHPUT)
    assert read(throughput)[0] == Objective(
        kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None, demand_rps=None
    )
    throughput.ttft_limit_s = 3.0
    assert read(throughput)[0].ttft_limit_s == 3.0


def test_limits_can_be_lifted_and_a_demand_is_asked_for_where_it_is_needed() -> None:
    lifted = plan_pb2.Objective(kind=plan_pb2.OBJECTIVE_KIND_GPUS, ttft_unlimited=True, tpot_unlimited=True)
    found, wrong = read(lifted)
    assert (found.ttft_limit_s, found.tpot_limit_s) == (None, None)
    assert wrong == {"o.demand_rps": "is missing: the objective GPUS needs a demanded rate"}
    lifted.demand_rps = 2.0
    assert read(lifted) == (replace(found, demand_rps=2.0), {})


def test_a_kind_that_does_not_exist_is_a_wrong_field() -> None:
    """In the past it was goodput."""
    _, wrong = read(plan_pb2.Objective(kind=88))  # type: ignore[arg-type]
    assert wrong == {"o.kind": "is 88, must be one of GOODPUT, THROUGHPUT, COST, GPUS"}


@pytest.mark.parametrize("rate", [-1.0, float("inf"), float("nan")])
def test_a_demand_that_is_no_rate_is_a_wrong_field(rate: float) -> None:
    _, wrong = read(plan_pb2.Objective(kind=plan_pb2.OBJECTIVE_KIND_GPUS, demand_rps=rate))
    assert wrong == {"o.demand_rps": f"is {rate:g}, must be above 0 and finite"}


def test_a_demand_below_what_a_search_can_tell_from_none_is_a_wrong_field() -> None:
    _, wrong = read(plan_pb2.Objective(kind=plan_pb2.OBJECTIVE_KIND_GPUS, demand_rps=1e-9))
    assert wrong == {"o.demand_rps": "is 1e-09, must be at least 0.001"}
