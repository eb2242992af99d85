"""Plans from CreatePlan to DeletePlan, with the solver in a separate process, on the cluster of the paper."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from hetis.formats import catalogue
from hetis.formats.documents import dump, from_data, to_data
from hetis.planner.convert.documents import document_of
from hetis.planner.fleet import stored_plans
from hetis.planner.store import ProfileRecord
from hetis.planner.use_cases.saved_plans import problem_of_plan
from hetis.profiler.roofline import modelled_profile
from hetis.solver.check import check_plan
from hetis.solver.plan import Plan
from hetis.v1 import cluster_pb2, document_pb2, plan_pb2, profile_pb2
from hetis.v1 import plan_service_pb2 as pb2
from tests.planner.resources.planned import PAPER, SEARCHING, WAIT, Planner, create_request, make_cluster, planner_in
from tests.planner.resources.served import live_node, refused

READY, INFEASIBLE = plan_pb2.PLAN_STATE_READY, plan_pb2.PLAN_STATE_INFEASIBLE


async def test_a_plan_is_put_together_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of 10,000 GPUs takes long enough to block all other callers."""
    threads = list[tuple[str, bool]]()

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            threads.append((name, threading.current_thread() is threading.main_thread()))
            return work(*arguments)

        return note

    monkeypatch.setattr(stored_plans, "complete", noted("complete", stored_plans.complete))

    async with planner_in(tmp_path) as planner:
        await planner.create("night")
        await planner.solved("plans/night")
        await planner.get("plans/night")
        assert threads == [("complete", False)]


async def read_document(planner: Planner, name: str, offset: int = 0) -> bytes:
    pieces = planner.stub.ReadPlanDocument(pb2.ReadPlanDocumentRequest(name=name, offset=offset))
    return b"".join([piece.content async for piece in pieces])


async def test_a_plan_is_solved_watched_read_and_forgotten(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        made = await planner.create("night")
        assert (made.name, made.state) == ("plans/night", plan_pb2.PLAN_STATE_QUEUED)
        seen = await planner.until("plans/night", lambda plan: plan.state == READY)
        assert seen[0].state in (plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING)
        assert any(plan.progress.phase for plan in seen)
        ready = seen[-1]
        assert ready.result.status in (plan_pb2.SOLVE_STATUS_OPTIMAL, plan_pb2.SOLVE_STATUS_FEASIBLE)
        assert 0 < ready.result.value <= ready.result.bound
        assert ready.result.gap == pytest.approx(ready.result.bound / ready.result.value - 1)
        assert (ready.result.unit, ready.result.num_gpus) == ("requests/s", 4)  # the A100s: the other GPUs idle
        assert not ready.result.replicas
        assert not ready.result.document.content
        assert not ready.spec.model_document.content

        full = await planner.get("plans/night")
        content = full.result.document.content
        assert full.result.document.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert full.result.document_bytes == len(content)
        assert len(full.result.replicas) == full.result.num_replicas
        assert full.result.prices
        plan = from_data(json.loads(content))
        assert isinstance(plan, Plan)
        assert check_plan(plan, problem_of_plan(plan, "plan").problem) == ()
        assert plan.inputs["origins"]["cluster"] == "clusters/paper v1"
        assert await read_document(planner, "plans/night") == content
        assert await read_document(planner, "plans/night", 10) == content[10:]

        listed = await planner.call("ListPlans", pb2.ListPlansRequest(cluster="clusters/paper", states=[READY]))
        assert [plan.name for plan in listed.plans] == ["plans/night"]
        await planner.call("DeletePlan", pb2.DeletePlanRequest(name="plans/night", etag=full.etag))
        gone = await refused(planner.call("GetPlan", pb2.GetPlanRequest(name="plans/night")))
        assert gone.reason == "NOT_FOUND"
        assert await planner.store.read(lambda reader: reader.plan_documents.get("plans/night")) is None


async def test_a_plan_of_another_version_is_said_to_be_one(tmp_path: Path) -> None:
    """Its document may have fields that this version does not know. In the past the call was said to be invalid."""
    async with planner_in(tmp_path) as planner:
        await planner.create("night")
        await planner.solved("plans/night")
        document = json.loads(await read_document(planner, "plans/night"))
        document["replicas"][0]["colour"] = "red"
        newer = json.dumps(document).encode()
        await planner.store.write(lambda tx: tx.plan_documents.put("plans/night", newer))
        failure = await refused(planner.call("ActivatePlan", pb2.ActivatePlanRequest(name="plans/night")))
        assert failure.reason == "PLAN_STATE"
        assert failure.message.startswith("plans/night is READY and was made by another version of hetis")
        assert "replicas[0].colour: unknown field" in failure.message


async def test_plans_are_listed_by_known_states_however_often_each_is_named(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        await planner.create("night", seed=WAIT)
        many = pb2.ListPlansRequest(states=[*SEARCHING] * 100_000)
        assert [plan.name for plan in (await planner.call("ListPlans", many)).plans] == ["plans/night"]
        for states in (range(-70_000, 70_000), [READY, 99]):
            wrong = await refused(planner.call("ListPlans", pb2.ListPlansRequest(states=states)))
            assert (wrong.code, wrong.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
            assert [*wrong.fields] == ["states"]
        assert planner.store.health.errors == 0


async def test_plans_keep_to_the_engine_that_is_asked_for(tmp_path: Path) -> None:
    """The default engine is that of `hetis-plan place`."""

    async with planner_in(tmp_path) as planner:
        values, kept = dict[str, float](), dict[str, object]()
        for name, spec in (
            ("default", {}),
            ("stock", {"engine": "vllm"}),
            ("small", {"engine": "vllm", "max_gpus": 2, "max_stages": 2, "min_layers": 2, "max_nodes": 1}),
            ("free", {"strategy": "hexgen-paper"}),
            ("set", {"engine": "vllm", "max_num_seqs": 8, "chunk_tokens": [512], "kv_blocks": 900}),
            ("fp8", {"engine": "vllm", "weights": "fp8"}),
            ("each", {"engine": "vllm", "weights": "bf16,RTX-3090=fp8"}),
            ("drafts", {"engine": "vllm", "mtp": "1:0.8"}),
        ):
            await planner.create(name, model_name="Llama-2-13B", **spec)  # type: ignore[arg-type]
            solved = await planner.solved(f"plans/{name}")
            assert solved.state == READY, solved
            values[name] = solved.result.value
            plan = from_data(json.loads((await planner.get(f"plans/{name}")).result.document.content))
            assert isinstance(plan, Plan)
            assert check_plan(plan, problem_of_plan(plan, "plan").problem) == ()
            kept[name] = plan.inputs.get("engine")
            if name == "fp8":  # the P100s are of no use to this plan, the RTX 3090s and A100s are
                assert plan.inputs["documents"]["model"]["weights"] == "fp8"
                assert plan.inputs["constraints"] == ["--forbid type=P100-PCIe-12GB"]
                assert any(note.startswith("P100-PCIe-12GB left out: vllm 0.32.0 needs") for note in plan.notes)
            if name == "each":
                assert plan.inputs["documents"]["model"]["precisions"].keys() == {"RTX-3090"}
                assert all(len({stage.gpu for stage in replica.stages}) == 1 for replica in plan.replicas)
            if name == "drafts":
                assert plan.inputs["documents"]["model"]["draft"] == {"tokens": 1, "acceptance": 0.8}
            if name == "set":
                assert plan.inputs["engine_settings"] == {"max_num_seqs": 8, "chunk_tokens": [512], "kv_blocks": 900}
                assert all(max(1, one.micro_batch) * one.in_flight <= 8 for one in plan.replicas)
            if name == "small":
                assert all(len(replica.devices()) <= 2 for replica in plan.replicas)
        assert values["drafts"] > values["stock"]
        assert values["small"] <= values["stock"] <= values["default"] * (1 + 1e-6)
        assert {name: engine and engine["name"] for name, engine in kept.items()} == {  # type: ignore[index]
            "default": "vllm-hetis", "stock": "vllm", "small": "vllm", "free": None, "set": "vllm", "fp8": "vllm",
            "each": "vllm", "drafts": "vllm",
        }  # fmt: skip


async def test_what_cannot_be_is_infeasible_with_reasons_and_has_no_document(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        await planner.create("no", objective=plan_pb2.Objective(tpot_limit_s=1e-6))
        plan = await planner.solved("plans/no")
        assert plan.state == INFEASIBLE
        assert plan.infeasible_reasons
        assert not plan.HasField("result")
        refusal = await refused(planner.call("ActivatePlan", pb2.ActivatePlanRequest(name="plans/no")))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PLAN_STATE")
        assert refusal.metadata == {"name": "plans/no", "state": "INFEASIBLE"}


async def test_nodes_that_drain_or_are_lost_are_left_out(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        planner.fleet.nodes["clusters/paper/nodes/p100"] = live_node(state=cluster_pb2.NODE_STATE_LOST)
        await planner.create("less")
        plan = await planner.solved("plans/less")
        assert plan.state == READY
        full = await planner.get("plans/less")
        devices = [d for replica in full.result.replicas for stage in replica.stages for d in stage.devices]
        assert not [device for device in devices if device.startswith("p100")]
        found = json.loads(full.result.document.content)
        assert found["inputs"]["origins"]["cluster"] == "clusters/paper v1 without p100"


async def test_a_plan_made_elsewhere_is_checked_and_ready_at_once(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        await planner.create("first")
        await planner.solved("plans/first")
        document = await read_document(planner, "plans/first")
        plan = from_data(json.loads(document))
        text = dump(plan, "yaml").encode()
        imported = plan_pb2.Plan(
            cluster="clusters/paper", imported=document_pb2.Document(content=text, source_name="plan.yaml")
        )
        made = (await planner.call("CreatePlan", pb2.CreatePlanRequest(plan_id="second", plan=imported))).plan
        assert made.state == READY
        assert made.imported.source_name == "plan.yaml"
        assert await read_document(planner, "plans/second") == document
        assert [r async for r in planner.stub.WatchPlan(pb2.WatchPlanRequest(name="plans/second"))][-1].plan == made

        data = json.loads(document)
        data["replicas"][0]["rate"] *= 2
        imported.imported.content = json.dumps(data).encode()
        wrong = await refused(planner.call("CreatePlan", pb2.CreatePlanRequest(plan=imported)))
        assert (wrong.code, wrong.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PLAN_CHECK_FAILED")
        assert int(wrong.metadata["violations"]) >= 1

        llama_4 = catalogue.find_model("Llama-4-Scout-17B-16E-Instruct").model
        data = json.loads(document)
        data["inputs"]["documents"]["model"] = to_data(llama_4)
        pool = {"stage": 0, "gpu": "P100-PCIe-12GB", "devices": ["p100/0"], "kv_head_groups": 1}
        data["replicas"][0]["attention_workers"] = [pool]
        imported.imported.content = json.dumps(data).encode()
        refusal = await refused(planner.call("CreatePlan", pb2.CreatePlanRequest(plan=imported)))
        assert refusal.reason == "INVALID_DOCUMENT"
        assert "cannot have with vllm-hetis: the model attends to chunks" in refusal.fields["plan.imported#replicas"]

        await make_cluster(
            planner.clusters, "small", PAPER.replace(b"A100-PCIe-80GB, count: 4", b"A100-PCIe-80GB, count: 2")
        )
        imported.cluster, imported.imported.content = "clusters/small", text
        missing = await refused(planner.call("CreatePlan", pb2.CreatePlanRequest(plan=imported)))
        assert missing.reason == "INVENTORY_MISMATCH"
        assert missing.metadata == {"cluster": "clusters/small", "missing_gpus": "2"}

        imported.imported.content = b"kind: Plan\napiVersion: hetis/v1\nreplicas: 7\n"
        broken = await refused(planner.call("CreatePlan", pb2.CreatePlanRequest(plan=imported)))
        assert broken.reason == "INVALID_DOCUMENT"
        assert "plan.imported#replicas" in broken.fields


async def test_every_wrong_field_of_a_spec_is_named(tmp_path: Path) -> None:
    async with planner_in(tmp_path, scripted=True) as planner:
        request = create_request(
            "Night!",
            request_id="7",
            model_name="/etc/passwd",
            workload_name="azure_conv_2032",
            strategy="hexgenn",
            gap_target=2.0,
            profiles=["profile"],
            roles=[1, 0, 9, 1],
            objective=plan_pb2.Objective(kind=plan_pb2.OBJECTIVE_KIND_COST, ttft_limit_s=-1.0, tpot_unlimited=False),
        )
        request.plan.spec.time_limit.FromSeconds(0)
        request.plan.labels["UPPER"] = "x"
        wrong = await refused(planner.call("CreatePlan", request))
        assert (wrong.code, wrong.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert set(wrong.fields) == {
            "plan_id",
            "request_id",
            'plan.labels["UPPER"]',
            "plan.spec.model_name",
            "plan.spec.workload_name",
            "plan.spec.strategy",
            "plan.spec.gap_target",
            "plan.spec.profiles[0]",
            "plan.spec.roles",
            "plan.spec.roles[1]",
            "plan.spec.roles[2]",
            "plan.spec.time_limit",
            "plan.spec.objective.demand_rps",
            "plan.spec.objective.ttft_limit_s",
            "plan.spec.objective.tpot_unlimited",
        }
        assert "did you mean azure_conv_2023?" in wrong.fields["plan.spec.workload_name"]
        assert wrong.fields["plan.spec.roles[1]"] == "is UNSPECIFIED, must be one of UNIFIED, PREFILL, DECODE"
        assert wrong.fields["plan.spec.roles[2]"] == "is 9, must be one of UNIFIED, PREFILL, DECODE"
        assert wrong.fields["plan.spec.roles"] == "has 4 entries of 3 roles, each may appear once"

        for strategy, roles, says in (
            ("uniform", [2, 3], "strategy uniform has unified replicas only, prefill, decode are asked for"),
            ("hetis", [2], "roles are prefill, must be unified, or prefill and decode, or all three"),
        ):
            split = await refused(planner.call("CreatePlan", create_request(strategy=strategy, roles=roles)))
            assert split.fields == {"plan.spec.roles": says}

        for asked, says in (
            ({"engine": "vlm"}, "is 'vlm', must be one of vllm-hetis, vllm, sglang, did you mean vllm?"),
            (
                {"engine": "vllm", "strategy": "hexgen-paper"},
                "strategy hexgen-paper is a published heuristic, which does not support vllm",
            ),
        ):
            refusal = await refused(planner.call("CreatePlan", create_request(**asked)))  # type: ignore[arg-type]
            assert refusal.fields == {"plan.spec.engine": says}
        precise = await refused(planner.call("CreatePlan", create_request(weights="fp9", kv="int4", mtp="2")))
        assert precise.fields.keys() == {"plan.spec.weights", "plan.spec.kv", "plan.spec.mtp"}
        assert precise.fields["plan.spec.mtp"].startswith("'2' is not TOKENS:ACCEPTANCE, 1 to 16 tokens")
        assert precise.fields["plan.spec.weights"].endswith("did you mean fp8?")
        for field, words in (("weights", "fp8,Z=bf16"), ("kv", "fp8,Z=bf16")):  # a type that the cluster lacks
            strange_type = await refused(planner.call("CreatePlan", create_request(**{field: words})))
            assert strange_type.fields.keys() == {f"plan.spec.{field}"}
            assert "has no GPU type 'Z'" in strange_type.fields[f"plan.spec.{field}"]
        deep = await refused(planner.call("CreatePlan", create_request(max_stages=17)))
        assert deep.fields == {"plan.spec.max_stages": "is 17, must be 16 at most"}
        strange = await refused(planner.call("CreatePlan", create_request(max_num_seqs=2**31, chunk_tokens=[9, 9])))
        assert strange.fields == {
            "plan.spec.max_num_seqs": "max_num_seqs is 2147483648, must be 1 to 1000000000",
            "plan.spec.chunk_tokens": "chunk_tokens are 9, 9, must be ascending, each once",
        }
        no_tpot = plan_pb2.Objective(tpot_unlimited=True)
        for level, says in (
            ({"ttft_statistic": "p96"}, "is 'p96', must be one of mean, p50, p90, p95, p99"),
            (
                {"tpot_statistic": "p99", "ttft_statistic": "p99", "objective": no_tpot},
                "--tpot-statistic is given, but TPOT",
            ),
            ({"attainment": 90.0}, "attainment is 90, must be above 0 and at most 1 (100%)"),
            ({"attainment": 0.9, "tpot_statistic": "p50"}, "no statistic is taken: leave out --tpot-statistic"),
            (
                {"attainment": 0.9, "skip_verification": True},
                "can only be checked in the simulation",
            ),
        ):
            unheld = await refused(planner.call("CreatePlan", create_request(**{"skip_verification": False, **level})))
            assert list(unheld.fields) == [f"plan.spec.{next(iter(level))}"]
            assert says in unheld.fields.popitem()[1]

        workload = b"apiVersion: hetis/v1\nkind: Workload\nname: w\ntrace: /etc/passwd\n"
        request = create_request(workload_document=document_pb2.Document(content=workload))
        trace = await refused(planner.call("CreatePlan", request))
        assert trace.fields.keys() == {"plan.spec.workload_document#trace"}

        nowhere = create_request()
        nowhere.plan.cluster = "clusters/nowhere"
        assert (await refused(planner.call("CreatePlan", nowhere))).reason == "NOT_FOUND"
        priceless = create_request(objective=plan_pb2.Objective(kind=plan_pb2.OBJECTIVE_KIND_COST, demand_rps=1.0))
        contradiction = await refused(planner.call("CreatePlan", priceless))
        assert contradiction.reason == "INVALID_PROBLEM"


async def test_a_stored_profile_that_no_gpu_of_the_cluster_can_have_is_refused(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        profile = replace(modelled_profile(catalogue.find_gpu("RTX-3090").gpu), usable_bytes=10**15)
        record = ProfileRecord(
            name="profiles/large",
            gpu_type=profile.gpu,
            body=profile_pb2.Profile(document=document_of(profile)),
            create_time_s=1.0,
            update_time_s=1.0,
        )
        await planner.store.write(lambda tx: tx.profiles.insert(record))
        refusal = await refused(planner.call("CreatePlan", create_request()))
        assert refusal.reason == "INVALID_PROBLEM"
        assert refusal.message == "profiles/large: usable_bytes is 1PB, more than the 24GiB of a RTX-3090"


async def test_stored_profiles_are_used_the_newest_first_unless_they_are_named(tmp_path: Path) -> None:
    async with planner_in(tmp_path) as planner:
        gpu = catalogue.find_gpu("RTX-3090").gpu
        for number in (1, 2):
            profile = replace(modelled_profile(gpu), usable_bytes=20 * 2**30 + number)
            body = profile_pb2.Profile(document=document_of(profile))
            record = ProfileRecord(
                name=f"profiles/p{number}",
                gpu_type=gpu.name,
                body=body,
                create_time_s=float(number),
                update_time_s=float(number),
            )
            await planner.store.write(lambda tx, record=record: tx.profiles.insert(record))  # type: ignore[misc]
        for plan_id, profiles in (("newest", []), ("named", ["profiles/p1"])):
            await planner.create(plan_id, profiles=profiles)
            await planner.solved(f"plans/{plan_id}")
        for plan_id, used in (("newest", "profiles/p2"), ("named", "profiles/p1")):
            origins = json.loads(await read_document(planner, f"plans/{plan_id}"))["inputs"]["origins"]["profiles"]
            assert origins == {"A100-PCIe-80GB": "fitted", "RTX-3090": used, "P100-PCIe-12GB": "modelled"}
        twice = await refused(planner.call("CreatePlan", create_request(profiles=["profiles/p1", "profiles/p2"])))
        assert twice.fields.keys() == {"plan.spec.profiles[1]"}
        unknown = await refused(planner.call("CreatePlan", create_request(profiles=["profiles/p3"])))
        assert (unknown.reason, unknown.metadata) == ("NOT_FOUND", {"name": "profiles/p3"})
