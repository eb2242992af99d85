"""A node's part of a replica: the processes are those of the export, and ports of replicas never meet."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.engines.commands import Command
from hetis.engines.kv_room import PROMPT_TOKENS
from hetis.engines.serving import option_groups
from hetis.engines.versions import Engine
from hetis.formats import catalogue
from hetis.formats.documents import to_data
from hetis.formats.models.dtypes import with_precision
from hetis.planner.convert.plans import kv_partners_to_proto, replica_to_proto
from hetis.planner.export.hosts import PLAN_FILE, words
from hetis.planner.export.replicas import NotExportableError, launchable
from hetis.planner.export.settings import ExportSettings
from hetis.runtime.agent.launched.parts import LaunchedPart, part_of, replica_of
from hetis.runtime.launch.main import main
from hetis.runtime.moves.refusals import RefusedError
from hetis.runtime.vllm.settings import load_settings
from hetis.solver.cluster import GpuType
from hetis.solver.plan import KvRoute, Plan, Role
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, EnginePeer, KvPartner, ReplicaRole
from tests.engines.plans import FP8_KV, MODEL, POOL, plan_of, stage_of, write_config, write_plan
from tests.models import replace, shape_of
from tests.planner.export.plans import DECODES, PLANS, PREFILL, apart, made_of, on
from tests.runtime.agent.launched.assigning import assigned, replica_on, settings_of

FOLDER = Path("/run/engines")
# Ports, and files with the replica's name, differ: an export numbers the replicas of a plan, which an agent cannot.
TOLD = {
    "--port",
    "--master-port",
    "--shutdown-timeout",
    "--dist-init-addr",
    "--listen",
    "--key-file",
    "--disaggregation-bootstrap-port",
}
TOLD_VARIABLES = {"VLLM_NIXL_SIDE_CHANNEL_PORT", "HETIS_VLLM_CONFIG"}


def part(replica: object = None, node: str = "a", **settings: object) -> LaunchedPart:
    return part_of(assigned(replica, node=node), settings_of(**settings), node=node, folder=FOLDER)  # type: ignore[arg-type]


def refused(replica: object, node: str = "a", **settings: object) -> str:
    with pytest.raises(RefusedError) as caught:
        part(replica, node, **settings)
    assert caught.value.failure.reason == ErrorReason.ERROR_REASON_ENGINE_CANNOT
    return caught.value.failure.message


def essence(command: Command) -> tuple[str, list[str], dict[str, str]]:
    """Return a process's name, options and variables, without those that differ between export and agent."""
    return essence_of(command.process.name, command.shown, command.environment)


def essence_of(
    name: str, words: Sequence[str], environment: Mapping[str, str]
) -> tuple[str, list[str], dict[str, str]]:
    kept = [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & TOLD]
    return name, kept, {name: text for name, text in environment.items() if name not in TOLD_VARIABLES}


UNLIKE = {  # GPUs of a prefill replica and of a decode replica
    "no bfloat16 on one": ("T4", "H100-SXM-80GB"),
    "another choice of attention": ("H100-SXM-80GB", "B200-SXM-180GB"),
    "alike": ("L4", "L4"),
    "a card of the fleet's own": ("Old card", "H100-SXM-80GB"),
    "another vendor's of the fleet's own": ("AMD card", "MI300X-192GB"),
}
OWN = {"Old card": ("Turing", "NVIDIA"), "AMD card": ("CDNA3", "AMD")}  # architecture and vendor
DOCUMENT = {name: {"architecture": architecture, "vendor": vendor} for name, (architecture, vendor) in OWN.items()}


def types_of(plan: Plan) -> dict[str, GpuType]:
    """Return the GPU types of the plan's fleet."""
    names = {part.gpu for one in plan.replicas for part in (*one.stages, *one.attention_workers)}
    known = {name: catalogue.find_gpu(name).gpu for name in names - OWN.keys()}
    like = catalogue.find_gpu("L4").gpu
    own = {
        name: replace(like, name=name, architecture=architecture, vendor=vendor)
        for name, (architecture, vendor) in OWN.items()
    }
    return known | own


@pytest.mark.parametrize("name", [*PLANS, *UNLIKE])
@pytest.mark.parametrize("engine", Engine)
def test_a_node_runs_what_the_export_of_the_plan_would_run_there(name: str, engine: Engine) -> None:
    plan = PLANS[name] if name in PLANS else apart(*UNLIKE[name], own=DOCUMENT)
    hosts = {node: f"10.0.0.{i}" for i, node in enumerate("abcdefgh", 1)}
    try:
        made = launchable(plan, MODEL, ExportSettings(model="tiny", served_name="tiny", engine=engine, hosts=hosts))
    except NotExportableError:
        made = None
    settings = settings_of(engine=engine.value, addresses=hosts)
    for number, replica in enumerate(made.plan.replicas if made else plan.replicas):
        nodes = {device.rpartition("/")[0] for device in replica.devices()}
        if made is None or number in made.left_out:
            assert refused(replica, nodes.pop(), engine=engine.value)
            continue
        exported = made.replicas[number].commands
        exchange = kv_partners_to_proto(made.plan)[number]
        parts = [
            part_of(
                assigned(replica, node=node, kv_partners=exchange, types=types_of(plan) if name in UNLIKE else None),
                settings,
                node=node,
                folder=FOLDER,
            )
            for node in sorted(nodes)
        ]
        found = [essence(command) for one in parts for command in one.commands]
        assert sorted(found) == sorted(map(essence, exported))
        assert [one.endpoint.rpartition(":")[0] for one in parts if one.endpoint] == [
            made.replicas[number].endpoint.rpartition(":")[0]
        ]
        assert all(one.is_whole == (len(parts) == 1) for one in parts)


LONG_CHUNKS = replace(PREFILL, stages=(on("a/0"),), in_flight=1, chunk_tokens=2048)
APART = made_of(LONG_CHUNKS, DECODES[0], routes=(KvRoute(prefill=0, decode=1, rate=2.0),))
AT_SETTINGS = {
    "unified": (PLANS["unlike replicas"], MODEL),
    "prefill and decode": (APART, MODEL),
    "states": (APART, replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=1000.0))),
}


@pytest.mark.parametrize("name", AT_SETTINGS)
@pytest.mark.parametrize("most", [None, 8])
def test_agent_launcher_and_export_start_the_engines_of_a_plan_at_fixed_settings_alike(
    name: str, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, model = AT_SETTINGS[name]
    settings = {"max_num_seqs": most, "chunk_tokens": [2048], "kv_blocks": 62, "gpu_memory_utilization": 0.85}
    kept = {} if most is None else {"engine_settings": settings}
    plan = replace(plan, inputs={"documents": {"model": to_data(model)}, **kept})
    path = write_plan(tmp_path, plan)
    hosts = {node: f"10.0.0.{i}" for i, node in enumerate("abcd", 1)}
    made = launchable(plan, model, ExportSettings(model="tiny", served_name="tiny", hosts=hosts))
    assert len(made.replicas) == len(plan.replicas)
    seats = []
    for number, one in made.replicas.items():
        assigned_here = assigned(
            plan.replicas[number], plan=plan, model=model, node=one.front_node,
            kv_partners=kv_partners_to_proto(plan)[number],
        )  # fmt: skip
        # As it comes over the wire.
        assignment = Assignment.FromString(assigned_here.SerializeToString())
        by_agent = part_of(assignment, settings_of(addresses=hosts), node=one.front_node, folder=FOLDER).commands
        by_script = words(made, number, one, one.front_node)
        by_script[by_script.index(PLAN_FILE)] = str(path)
        node = by_script.index("--node")
        end = by_script.index("--")
        told = [*by_script[2:node], *by_script[node + 2 : end], "--form", "json", *by_script[end:]]
        monkeypatch.setattr(sys, "argv", ["hetis-launch", "show", *told])
        assert main() == 0
        rows = json.loads(capsys.readouterr().out)
        [(_, options, variables)] = map(essence, one.commands)
        assert [(options, variables)] == [essence(command)[1:] for command in by_agent]
        [(_, shown, variables_shown)] = [essence_of(row["name"], row["command"], row["environment"]) for row in rows]
        # The launcher passes on the served name, which it does not decide, at the end.
        assert (sorted(option_groups(shown)), variables_shown) == (sorted(option_groups(options)), variables)
        seats.append(one.layout.seats)
    if plan.replicas[0].role is Role.PREFILL:
        assert seats[0] == (most or 2048 // PROMPT_TOKENS)


@pytest.mark.parametrize(("role", "told"), [(Role.UNIFIED, False), (Role.PREFILL, True), (Role.DECODE, True)])
def test_replicas_that_exchange_kv_are_told_the_attention_backend_of_the_settings(role: Role, *, told: bool) -> None:
    [command] = part(replace(replica_on("a/0"), role=role), engine="vllm", attention_backend="TRITON_ATTN").commands
    assert ("--attention-backend TRITON_ATTN" in command.line) == told


def test_the_other_side_of_an_exchange_decides_dtype_and_attention_backend() -> None:
    plan = apart("T4", "H100-SXM-80GB")
    receiver, exchange = plan.replicas[1], kv_partners_to_proto(plan)[1]
    alone, told, chosen = (
        part_of(assigned(receiver, node="d", kv_partners=partners), settings, node="d", folder=FOLDER).commands[0].line
        for partners, settings in (
            ((), settings_of()),
            (exchange, settings_of()),
            (exchange, settings_of(attention_backend="FLASHINFER")),
        )
    )
    assert ("--dtype float16" in alone, "--attention-backend" in alone) == (False, False)
    assert ("--dtype float16" in told, "--attention-backend TRITON_ATTN" in told) == (True, True)
    assert "--attention-backend FLASHINFER" in chosen


def test_a_replica_whose_prompts_its_engine_would_refuse_is_not_started() -> None:
    """`tests/engines/test_refusals.py` tests the reasons."""
    sender = KvPartner(role=ReplicaRole.REPLICA_ROLE_PREFILL, gpu_types=["L4"], tp=16)
    with pytest.raises(RefusedError, match="it decodes in TP1, and prompts come from TP16"):
        part_of(assigned(DECODES[0], node="d", kv_partners=[sender]), settings_of(), node="d", folder=FOLDER)


@pytest.mark.parametrize("name", PLANS)
def test_the_message_of_a_replica_is_read_back_as_it_was(name: str) -> None:
    for replica in PLANS[name].replicas:
        assert replica_of(replica_to_proto(replica, PLANS[name])) == replica


def ports_of(found: LaunchedPart) -> set[int]:
    lines = " ".join(command.line for command in found.commands)
    named = re.findall(r"--(?:port|master-port|disaggregation-bootstrap-port) (\d+)|_PORT=(\d+)", lines)
    return {int(first or second) for first, second in named}


@given(st.permutations(range(16)), st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4))
def test_ports_of_replicas_on_different_gpus_never_meet(gpus: Sequence[int], sizes: Sequence[int]) -> None:
    taken = iter(gpus)
    parts = [part(replica_on(*(f"a/{gpu}" for gpu in itertools.islice(taken, size)))) for size in sizes]
    for one, other in itertools.combinations(parts, 2):
        assert ports_of(one).isdisjoint(ports_of(other))
        assert one.gpus.isdisjoint(other.gpus)
    assert all(one.ranks for one in parts)


def test_every_node_knows_the_ports_of_a_replica_on_several_without_asking() -> None:
    plan = two_nodes()
    peers = [EnginePeer(node="a", address="10.0.0.7:8000"), EnginePeer(node="c", address="[fd00::8]:8000")]
    found = [
        part_of(assigned(plan.replicas[0], node=node, peers=peers), settings_of(), node=node, folder=FOLDER)
        for node in ("a", "c")
    ]
    lines = [command.line for one in found for command in one.commands]
    assert len(lines) == 2
    assert all("--master-addr 10.0.0.7 --master-port 29561" in line for line in lines), lines  # 20 for each of 3 GPUs
    assert [one.endpoint for one in found] == ["10.0.0.7:8003", ""]
    assert not any(one.is_whole for one in found)


def two_nodes() -> Plan:
    return plan_of(
        stage_of(num_layers=3, devices=("a/3",), kv_head_groups_kept=8),
        stage_of(first_layer=3, num_layers=1, devices=("c/0",), kv_head_groups_kept=8),
    )


def test_stages_on_several_nodes_are_started_by_whatever_serves() -> None:
    asked = assigned(two_nodes().replicas[0], node="a")
    [command] = part_of(asked, settings_of(program="env A=b vllm serve"), node="a", folder=FOLDER).commands
    assert command.shown[:4] == ("env", "A=b", "vllm", "serve")


@pytest.mark.parametrize(
    ("settings", "policy", "encrypts"),
    [({}, "solver", False), ({"dispatch": "local"}, "local", False), ({"encrypt": True}, "solver", True)],
)
def test_the_plugin_is_steered_at_a_socket_and_dispatches_and_encrypts_as_the_settings_say(
    settings: dict[str, str], policy: str, encrypts: bool, tmp_path: Path
) -> None:
    replica = plan_of(stage_of(devices=("a/0",)), pools=(replace(POOL, devices=("a/1", "a/2")),)).replicas[0]
    found = part(replica, engine="vllm-hetis", **settings)
    (text,) = found.commands[0].files.values()
    (file := tmp_path / "workers.yaml").write_text(text)
    plugin = load_settings(file)
    assert plugin.executor == found.socket == FOLDER / "p-0" / "engine.sock"
    assert plugin.dispatch.policy == policy
    assert plugin.encrypt is encrypts


def test_workers_of_two_replicas_on_a_node_have_ports_by_their_gpus() -> None:
    """Also where a GPU serves two ranks."""
    pair = stage_of(tp=2, devices=("a/0", "a/1"), kv_head_groups_kept=1)
    wide = plan_of(pair, pools=(replace(POOL, devices=("a/4",), kv_head_groups=3),)).replicas[0]
    other = plan_of(stage_of(devices=("a/2",)), pools=(replace(POOL, devices=("a/3", "a/5")),)).replicas[0]
    listens = [
        command.shown[command.shown.index("--listen") + 1]
        for one in (wide, other)
        for command in part(one, engine="vllm-hetis").commands
        if "--listen" in command.shown
    ]
    assert listens == [f"127.0.0.1:{7070 + 64 * gpu + more}" for gpu, more in ((4, 0), (4, 1), (3, 0), (5, 0))]


@pytest.mark.parametrize(
    ("given", "used"), [(None, "/run/engines/p-0/worker.key"), ("/etc/hetis/key", "/etc/hetis/key")]
)
def test_the_key_of_attention_workers_is_the_one_of_the_settings_or_beside_its_files(
    given: str | None, used: str
) -> None:
    asked = plan_of(stage_of(), pools=(POOL,)).replicas[0]
    found = part(asked, "b", engine="vllm-hetis", key_file=given)
    assert found.commands
    assert all(f"--key-file {used}" in one.line for one in found.commands)


def refusals() -> Iterator[tuple[object, dict[str, object], str]]:
    yield plan_of(stage_of(), pools=(POOL,)).replicas[0], {}, "it has attention workers, which vLLM only supports"
    copies = stage_of(copies=2, devices=("a/0", "a/1"), kv_head_groups_kept=8)
    yield plan_of(copies).replicas[0], {}, "stage 1: it has 2 copies, vLLM has one of each stage"
    yield replica_on("a/0"), {"model": "/no/such/folder"}, "tiny: there is no folder /no/such/folder on this node"
    yield two_nodes().replicas[0], {"program": "python -m vllm"}, "only `vllm serve` and `sglang serve` start stages"


@pytest.mark.parametrize(("replica", "settings", "says"), list(refusals()))
def test_what_the_engine_cannot_do_is_refused_with_the_reason(replica: object, settings: object, says: str) -> None:
    message = refused(replica, **settings)  # type: ignore[arg-type]
    assert says in message
    assert message.startswith("clusters/c/replicas/p-0: ")


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path / "tiny")
    wider = replace(MODEL, hidden=256)
    asked = assigned(model=wider)
    with pytest.raises(RefusedError, match="the plan is of another model \\(tiny\\): hidden 256, not 128"):
        part_of(asked, settings_of(model=f"{tmp_path}/{{name}}"), node="a", folder=FOLDER)


def test_the_checkpoint_is_that_of_the_replicas_precision(tmp_path: Path) -> None:
    model = with_precision(MODEL, weights="bf16,A100=fp8", kv="A100=fp8")
    gpu = replica_on("a/0").stages[0].gpu
    own = with_precision(MODEL, weights=f"bf16,{gpu}=fp8", kv=f"{gpu}=fp8")
    for name, planned in (("bf16", model), ("fp8", own)):
        write_config(tmp_path / f"tiny-{name}")
        settings = settings_of(model=f"{tmp_path}/{{name}}-{{weights}}")
        line = part_of(assigned(model=planned), settings, node="a", folder=FOLDER).commands[0].line
        assert f"{tmp_path}/tiny-{name}" in line
        assert ("--kv-cache-dtype fp8" in line) == (name == "fp8")


def test_kv_of_a_checkpoint_that_is_not_the_plans_has_to_be_told(tmp_path: Path) -> None:
    write_config(tmp_path / "tiny", FP8_KV)
    where = f"{tmp_path}/{{name}}"
    with pytest.raises(RefusedError, match="tiny states fp8 KV, which engines use by default, but the replica"):
        part_of(assigned(model=MODEL), settings_of(model=where), node="a", folder=FOLDER)
    told = settings_of(model=where, options="--kv-cache-dtype bfloat16")
    line = part_of(assigned(model=MODEL), told, node="a", folder=FOLDER).commands[0].line
    assert line.count("--kv-cache-dtype bfloat16") == 1
    as_stated = part_of(assigned(model=replace(MODEL, kv_bytes=1.0)), settings_of(model=where), node="a", folder=FOLDER)
    assert "--kv-cache-dtype fp8" in as_stated.commands[0].line


def test_a_drain_time_becomes_the_engines_own() -> None:
    assert "--shutdown-timeout 30" in part(drain_timeout="30s").commands[0].line
    assert part(drain_timeout="30s").commands[0].stops_s == 60
    assert "--shutdown-timeout" not in part(drain_timeout="0s").commands[0].line
    assert part(drain_timeout="30s", options="--shutdown-timeout 5").commands[0].line.count("--shutdown-timeout") == 1
    assert "--shutdown-timeout" not in part(engine="sglang").commands[0].line
