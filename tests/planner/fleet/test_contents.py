"""A plan's document becomes messages with the numbers that `hetis-plan dispatch` uses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from hetis.planner.convert import documents
from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.convert.stages import stage_from_proto
from hetis.planner.fleet import stored_plans
from hetis.planner.fleet.reading_ahead import ReadAhead
from hetis.planner.fleet.replica import Contents
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.use_cases.dispatch.stages import load_stage_of_plan
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.solver.plan import Plan
from hetis.v1 import plan_pb2
from hetis.v1.replica_pb2 import KvPartner
from tests.planner.command_line import invoke
from tests.planner.fleet.memory_store import MemoryStore
from tests.planner.fleet.samples import PLAN, cluster_document, cluster_record, plan_record

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small plan with attention workers, solved once."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    inputs = ["--cluster", str(EXAMPLES / "h100-l4.yaml"), "--model", "Llama-3.1-70B", "--workload", "8000/300"]
    goal = ["--tpot", "50ms", "--ttft", "none", "--gap", "20%", "--no-verify", "--out", str(path), "-q"]
    assert invoke("place", *inputs, *goal).exit_code == 0
    return str(path)


def plans_with(document: bytes) -> StoredPlans:
    """Return the plans of a store that has one, with this document."""
    store = MemoryStore()
    store.tables.plans.rows[PLAN], store.tables.plan_documents[PLAN] = plan_record(), document
    return StoredPlans(store)  # type: ignore[arg-type]


def test_stages_are_those_that_dispatch_starts_from(plan_file: str) -> None:
    (contents,) = asyncio.run(plans_with(Path(plan_file).read_bytes()).contents(PLAN, [0]))
    assert contents is not None
    assert b"Llama-3.1-70B" in contents.model.content
    replica = load_plan_and_problem(plan_file).plan.replicas[0]
    assert len(contents.stages) == sum(stage.copies for stage in replica.stages)
    gpus = [gpu for stage in contents.stages for device in stage.devices for gpu in device.gpus]
    assert sorted(gpus) == sorted(replica.devices())
    first, expected = stage_from_proto(contents.stages[0]), load_stage_of_plan(plan_file, replica=0, stage=1)
    stage = expected.snapshot.stage
    assert first.stage.heads == stage.heads
    assert first.stage.primary == stage.primary
    assert all(device.name == device.gpus[0] and device.total_blocks > 0 for device in contents.stages[0].devices)
    heads = np.full(stage.num_devices, 7.0)[:, None]
    for one, other in ((first.stage.head_s, stage.head_s), (first.stage.kv_byte_s, stage.kv_byte_s)):
        np.testing.assert_array_equal((one * heads).max(axis=1), (other * heads).max(axis=1))
    np.testing.assert_array_equal(first.stage.transfer_byte_s, stage.transfer_byte_s)
    np.testing.assert_array_equal(first.link_byte_s, expected.saved.move_byte_s())


async def test_what_all_replicas_of_a_plan_share_is_derived_once(
    plan_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived, derive = list[Plan](), stored_plans.kv_partners_to_proto

    def counted(plan: Plan) -> list[list[KvPartner]]:
        derived.append(plan)
        return derive(plan)

    monkeypatch.setattr(stored_plans, "kv_partners_to_proto", counted)
    plans = plans_with(Path(plan_file).read_bytes())
    first, again = [await plans.contents(PLAN, [0]) for _ in range(2)]
    assert first == again
    assert len(derived) == 1


async def test_a_plan_is_converted_for_its_first_reader_and_each_gets_what_its_message_has_room_for(
    plan_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, convert = list[Plan](), stored_plans.complete

    def counted(message: plan_pb2.Plan, plan: Plan, document: bytes) -> None:
        converted.append(plan)
        convert(message, plan, document)

    monkeypatch.setattr(stored_plans, "complete", counted)
    document = Path(plan_file).read_bytes()
    plans, record, num_converted = plans_with(document), plan_record(), []
    for filled in (0, 0, stored_plans.MOST_PLAN_BYTES - len(document), stored_plans.MOST_PLAN_BYTES):
        found = plan_pb2.Plan(name="x" * filled)
        expected = plan_pb2.Plan()
        expected.CopyFrom(found)
        convert(expected, load_plan_and_problem(plan_file).plan, document)
        await plans.complete(found, record)
        assert found == expected
        assert found.result.document.content == (b"" if filled else document)
        num_converted.append(len(converted))
    assert num_converted == [1, 1, 2, 3]


async def test_a_plan_that_is_deleted_and_made_again_under_its_name_has_its_own_contents(plan_file: str) -> None:
    store = MemoryStore()
    plans = StoredPlans(store)  # type: ignore[arg-type]

    async def contents_of(document: bytes, digest: str) -> Contents | None:
        made = plan_record()
        made.body.result.document.digest = digest
        store.tables.plans.rows[PLAN], store.tables.plan_documents[PLAN] = made, document
        return (await plans.contents(PLAN, [0]))[0]

    assert await contents_of(Path(plan_file).read_bytes(), "one") is not None
    assert await contents_of(b"{}", "two") is None
    assert await contents_of(Path(plan_file).read_bytes(), "one") is not None


async def test_a_term_parses_nothing_that_its_standby_has_read_ahead(
    plan_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past a takeover parsed the documents of all clusters and plans, 1 s of CPU for 3,000 nodes."""
    store, declared = MemoryStore(), DeclaredFleets()
    plans, answered = StoredPlans(store), plan_record()  # type: ignore[arg-type]
    answered.body.result.document.digest = "one"
    store.tables.plans.rows[PLAN], store.tables.plan_documents[PLAN] = answered, Path(plan_file).read_bytes()
    record = cluster_record(document=cluster_document())
    store.tables.clusters.rows[record.name] = record
    ahead = ReadAhead(store, declared, plans)  # type: ignore[arg-type]
    await ahead.step()
    monkeypatch.setattr(stored_plans, "_parsed", None)
    monkeypatch.setattr(stored_plans, "stages_of_replica", None)
    monkeypatch.setattr(documents, "_read", None)
    assert (await plans.contents(PLAN, [0]))[0] is not None
    assert (await declared.of(record)).nodes
    await ahead.step()  # nothing is new


def test_contents_name_the_gpu_types_and_no_replica_that_cannot_be_worked_out_stops_the_others(plan_file: str) -> None:
    document = json.loads(Path(plan_file).read_text())
    replica = load_plan_and_problem(plan_file).plan.replicas[0]
    contents, none = asyncio.run(plans_with(json.dumps(document).encode()).contents(PLAN, [0, 9]))
    assert contents is not None
    assert none is None
    types = {part.gpu for part in (*replica.stages, *replica.attention_workers)}
    assert {kind.gpu_type: (kind.vendor, kind.compute_capability) for kind in contents.gpu_kinds} == {
        name: ("NVIDIA", {"H100-SXM-80GB": 9.0, "L4": 8.9}[name]) for name in types
    }
    document["kv_routes"] = [{"prefill": 0, "decode": 9, "rate": 1.0}]
    assert asyncio.run(plans_with(json.dumps(document).encode()).contents(PLAN, [0])) == [None]


def test_a_plan_of_another_version_is_logged_with_the_reason_and_without_a_traceback(
    plan_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads(Path(plan_file).read_text())
    document["apiVersion"] = "hetis/v99"
    assert asyncio.run(plans_with(json.dumps(document).encode()).contents(PLAN, [0])) == [None]
    (record,) = caplog.records
    assert record.exc_info is None
    assert "hetis/v99" in vars(record)["why"]


async def test_a_plan_that_cannot_be_read_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    plans = plans_with(b"{}")
    for _ in range(2):
        assert await plans.contents(PLAN, [0, 1]) == [None, None]
    assert len(caplog.records) == 1


def test_a_plan_that_is_gone_or_cannot_be_read_has_no_contents() -> None:
    store = MemoryStore()
    assert asyncio.run(StoredPlans(store).contents(PLAN, [0, 1])) == [None, None]  # type: ignore[arg-type]
    assert asyncio.run(plans_with(b"{}").contents(PLAN, [0])) == [None]
