"""One list says what runs where; command lines follow from it and from where nodes are reached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.launch.room import Compute
from hetis.runtime.model.config import read_config
from hetis.runtime.replica.asking import Asked, checked_hosts, read_asked
from hetis.runtime.replica.commands import Addresses
from hetis.runtime.replica.processes import Sizes, processes_of
from hetis.runtime.replica.roles import prompt_sites
from hetis.runtime.replica.showing import as_json, as_shell
from hetis.runtime.server.errors import ServeError
from hetis.runtime.stages.options import read_options as stage_options
from hetis.runtime.worker.options import read_options
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Plan, Role
from tests.runtime.launch.plans import POOL, plan_of, sharing, stage_of
from tests.runtime.replica.replicas import PAGE_BYTES, PAGES, asked_for, write_model, write_plan


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return asked_for(tmp_path_factory.mktemp("replica"), "--port", "8080")


def options_of(command: tuple[str, ...]) -> dict[str, str]:
    """Of a worker's command line, without the program."""
    return dict(zip(command[::2], command[1::2], strict=True))


def test_every_device_of_the_plan_is_a_process_with_the_kv_it_counts_on(asked: Asked) -> None:
    rows = [(p.name, p.kind.value, p.node, p.gpus, p.kv_bytes) for p in asked.processes]
    assert rows == [
        ("engine", "engine", "a", (0,), 2 * PAGES * PAGE_BYTES),
        ("b/0", "attention-worker", "b", (0,), 3 * PAGES * PAGE_BYTES),
        ("b/1", "attention-worker", "b", (1,), 3 * PAGES * PAGE_BYTES),
    ]


def test_a_smaller_machine_and_another_dtype_need_less(tmp_path: Path) -> None:
    model = read_config(write_model(tmp_path))
    plan = plan_of(stage_of(), pools=(POOL,))
    found = processes_of(plan, 0, model, Sizes(dtype="bfloat16", page_tokens=32, kv_tokens=100))
    assert [process.kv_bytes for process in found] == [2 * 4 * PAGE_BYTES, 3 * 4 * PAGE_BYTES, 3 * 4 * PAGE_BYTES]


def staged() -> Plan:
    """Two ranks on a with a worker on b, then one on c with a worker beside it and one on b."""
    return plan_of(
        stage_of(num_layers=3, tp=2, devices=("a/0", "a/1"), kv_head_groups_kept=1),
        stage_of(first_layer=3, num_layers=1, devices=("c/2",), kv_head_groups_kept=4),
        pools=(
            AttentionWorkerPool(stage=0, gpu="T4", devices=("b/0",), kv_head_groups=3),
            AttentionWorkerPool(stage=1, gpu="T4", devices=("c/3", "b/1"), kv_head_groups=4),
        ),
    )


def test_stages_are_processes_and_hold_as_much_as_their_layers_and_ranks_need(tmp_path: Path) -> None:
    found = processes_of(staged(), 0, read_config(write_model(tmp_path)), Sizes())
    layer = PAGES * PAGE_BYTES // 4  # of one KV head
    assert [(p.name, p.kind.value, p.stage, p.node, p.gpus, p.kv_bytes) for p in found] == [
        ("engine", "engine", 0, "a", (0, 1), 2 * 1 * 3 * layer),
        ("c/2", "stage", 1, "c", (2,), 4 * layer),
        ("b/0", "attention-worker", 0, "b", (0,), 2 * 3 * 3 * layer),
        ("c/3", "attention-worker", 1, "c", (3,), 2 * layer),
        ("b/1", "attention-worker", 1, "b", (1,), 2 * layer),
    ]


def test_a_card_that_stages_share_has_a_process_for_each_with_memory_of_its_own(tmp_path: Path, asked: Asked) -> None:
    processes = processes_of(sharing(), 0, read_config(write_model(tmp_path)), Sizes())
    layer = PAGES * PAGE_BYTES // 4  # of one KV head
    assert [(p.name, p.stage, p.node, p.gpus, p.kv_bytes, p.sharing) for p in processes if "stage" in p.name] == [
        ("b/0.stage0", 0, "b", (0,), 3 * 3 * layer, 2),
        ("b/1.stage0", 0, "b", (1,), 3 * 3 * layer, 2),
        ("b/0.stage1", 1, "b", (0,), 3 * 1 * layer, 2),
        ("b/1.stage1", 1, "b", (1,), 3 * 1 * layer, 2),
    ]
    commands = replace(asked, processes=processes).commands(Addresses(), worker_device="cuda")
    last = commands[-1]
    assert last.environment == {"CUDA_VISIBLE_DEVICES": "1"}
    assert read_options(last.arguments, {}).name == "b/1.stage1"
    assert commands[0].shown.count("--worker") == 4


def test_the_engine_calls_its_stages_and_each_stage_its_workers(tmp_path: Path, asked: Asked) -> None:
    processes = processes_of(staged(), 0, read_config(write_model(tmp_path)), Sizes())
    engine, stage, *workers = replace(asked, processes=processes).commands(Addresses(), worker_device="cuda")
    assert engine.shown[engine.shown.index("--store") :] == (
        *("--store", "0.0.0.0:8500", "--stage", "c/2=1", "--worker", "b/0", "--worker", "c/3", "--worker", "b/1"),
        *("--port", "8080"),
    )
    assert engine.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert stage.shown[:3] == ("python", "-m", "hetis.runtime.stages")
    options = stage_options(stage.arguments, {})
    assert (options.name, options.store, options.model) == ("c/2", ("a", 8500), asked.model)
    assert options.device is Compute.CUDA
    assert stage_options(stage.arguments[:-6], {"HETIS_STAGE_DEVICE": "cpu"}).device == "cpu"
    assert (options.listen, options.advertise) == (("0.0.0.0", 0), "c")
    listening = [read_options(worker.arguments, {}).listen[0] for worker in workers]
    assert listening == ["0.0.0.0", "127.0.0.1", "0.0.0.0"]  # c/3 is beside its stage


def test_replicas_with_roles_are_told_where_prompts_are_computed(asked: Asked) -> None:
    prefill = plan_of(stage_of(kv_head_groups_kept=8), role=Role.PREFILL, micro_batch=0).replicas[0]
    decode = replace(prefill, role=Role.DECODE, stages=(replace(prefill.stages[0], devices=("c/0",)),))
    near = replace(decode, stages=prefill.stages)
    plan = replace(plan_of(stage_of()), replicas=(prefill, decode, prefill, near))
    told = Addresses(hosts={"a": "10.0.0.1"})

    def options(plan: Plan, replica: int, addresses: Addresses = told) -> list[str]:
        one = replace(asked, prompts=prompt_sites(plan, replica), serve_options=())
        shown = one.commands(addresses, worker_device="cpu")[0].shown
        at = [i for i, text in enumerate(shown) if text in ("--kv-listen", "--prefill")]
        return [" ".join(shown[i : i + 2]) for i in at]

    assert options(plan, 0) == ["--kv-listen 10.0.0.1:8700"]
    assert options(plan, 0, Addresses()) == ["--kv-listen 0.0.0.0:8700"]
    assert options(plan, 1) == ["--prefill 10.0.0.1:8700", "--prefill 10.0.0.1:8702"]
    assert options(plan, 1, Addresses(all_here=True, kv_port=90)) == [
        "--prefill 127.0.0.1:90",
        "--prefill 127.0.0.1:92",
    ]
    routed = replace(plan, kv_routes=(KvRoute(prefill=0, decode=1, rate=1), KvRoute(prefill=2, decode=3, rate=1)))
    assert options(routed, 1) == ["--prefill 10.0.0.1:8700"]
    assert (options(routed, 2), options(routed, 3)) == (["--kv-listen 127.0.0.1:8702"], ["--prefill 127.0.0.1:8702"])
    assert not prompt_sites(plan_of(stage_of()), 0)


def test_a_stage_on_two_nodes_is_refused(tmp_path: Path) -> None:
    plan = plan_of(stage_of(tp=2, devices=("c/2", "d/0"), kv_head_groups_kept=4))
    with pytest.raises(LayoutError) as caught:
        processes_of(plan, 0, read_config(write_model(tmp_path)), Sizes())
    assert caught.value.messages == ("stage 0 is on several nodes, must be on one: c/2, d/0",)


def test_what_the_memory_follows_from_is_told_to_the_engine_too(tmp_path: Path) -> None:
    asked = read_asked(
        plan=write_plan(tmp_path),
        model=write_model(tmp_path),
        replica=0,
        kv_tokens=100,
        page_tokens=32,
        dtype="bfloat16",
        serve_options=("--seats", "2"),
    )
    engine = asked.commands(Addresses(), worker_device="cpu")[0].shown
    assert engine[-8:] == ("--dtype", "bfloat16", "--page-tokens", "32", "--kv-tokens", "100", "--seats", "2")


def test_between_nodes_an_address_is_listened_on_alone_and_a_name_on_all(asked: Asked) -> None:
    hosts = {"a": "10.0.0.1", "b": "10.0.0.2"}
    engine, first, _ = asked.commands(Addresses(hosts=hosts, store_port=9000), worker_device="cuda")
    assert engine.shown == (
        *("hetis-serve", "--model", str(asked.model), "--plan", str(asked.plan), "--replica", "0"),
        *("--compute", "cuda"),
        *("--store", "10.0.0.1:9000", "--worker", "b/0", "--worker", "b/1", "--port", "8080"),
    )
    assert options_of(first.arguments) == {
        "--name": "b/0",
        "--store": "10.0.0.1:9000",
        "--kv-memory": f"{3 * PAGES * PAGE_BYTES}B",
        "--device": "cuda",
        "--listen": "10.0.0.2:0",
    }
    engine, first, second = asked.commands(Addresses(hosts={"b": "fd00::2"}), worker_device="cuda")
    assert "0.0.0.0:8500" in engine.shown
    assert options_of(first.arguments)["--store"] == "a:8500"
    assert options_of(first.arguments)["--listen"] == "[fd00::2]:0"
    _, first, second = asked.commands(Addresses(), worker_device="cuda")
    assert (options_of(second.arguments)["--listen"], options_of(second.arguments)["--advertise"]) == ("0.0.0.0:0", "b")
    assert [c.environment for c in (engine, first, second)] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]


def test_what_nobody_else_needs_stays_on_the_loopback(asked: Asked) -> None:
    for addresses, processes in (
        (Addresses(all_here=True), asked.processes),
        (Addresses(hosts={"a": "10.0.0.1"}), tuple(replace(p, node="a") for p in asked.processes)),
    ):
        engine, first, _ = replace(asked, processes=processes).commands(addresses, worker_device="cpu")
        assert "127.0.0.1:8500" in engine.shown
        assert options_of(first.arguments)["--store"] == "127.0.0.1:8500"
        assert "--listen" not in first.arguments  # its default is the loopback
        assert first.environment == {}
    near = (asked.processes[0], replace(asked.processes[1], node="a"), asked.processes[2])
    _, first, second = replace(asked, processes=near).commands(Addresses(hosts={"a": "10.0.0.1"}), worker_device="cpu")
    assert "--listen" not in first.arguments  # beside the engine: they share memory
    assert options_of(first.arguments)["--store"] == "10.0.0.1:8500"
    assert "--listen" in second.arguments


def test_the_worker_understands_what_it_is_told(asked: Asked) -> None:
    for command in asked.commands(Addresses(), worker_device="cuda")[1:]:
        options = read_options(command.arguments, {})
        assert (options.name, options.kv_bytes) == (command.process.name, command.process.kv_bytes)
        assert (options.listen, options.advertise, options.device) == (("0.0.0.0", 0), "b", "cuda")


def test_the_forms_say_the_same(asked: Asked) -> None:
    commands = asked.commands(Addresses(), worker_device="cuda")
    rows = json.loads(as_json(commands))
    assert [row["name"] for row in rows] == ["engine", "b/0", "b/1"]
    assert [tuple(row["command"]) for row in rows] == [command.shown for command in commands]
    lines = as_shell(commands).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# on a", "# on b"]
    assert lines[1].startswith("CUDA_VISIBLE_DEVICES=0 hetis-serve --model ")
    assert lines[4].startswith("CUDA_VISIBLE_DEVICES=1 python -m hetis.runtime.worker --name b/1 --store a:8500 ")


def test_a_plan_whose_devices_have_no_node_is_refused(tmp_path: Path) -> None:
    model = read_config(write_model(tmp_path))
    plan = plan_of(stage_of(devices=("here",), kv_head_groups_kept=8))
    with pytest.raises(LayoutError) as caught:
        processes_of(plan, 0, model, Sizes())
    assert caught.value.messages == ("device 'here' of the plan must be NODE/INDEX, such as gpu2/0",)


def test_all_that_is_wrong_with_options_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ServeError) as caught:
        read_asked(
            plan=None,
            model=tmp_path,
            replica=-1,
            kv_tokens=0,
            page_tokens=0,
            dtype="int4",
            serve_options=["8080", "--worker=w", "--store", "x"],
            wrong=["and this"],
        )
    assert caught.value.messages == (
        "and this",
        f"--model {tmp_path}: there is no config.json in it",
        "--plan is missing: a plan of hetis-plan place",
        "--dtype is 'int4', must be auto, float32, float64, bfloat16, float16",
        "--replica is -1, must be >= 0 and <= 1000000",
        "--page-tokens is 0, must be >= 1 and <= 4096",
        "--kv-tokens is 0, must be >= 1 and <= 2147483648",
        "--store stands after --: it is hetis-launch that sets it",
        "--worker stands after --: it is hetis-launch that sets it",
        "'8080' is no option; those of hetis-serve stand after --",
    )


def test_addresses_of_nodes_are_checked() -> None:
    assert checked_hosts(["a=10.0.0.1", "rack=1/b=gpu-b.example"]) == {"a": "10.0.0.1", "rack=1/b": "gpu-b.example"}
    with pytest.raises(ServeError) as caught:
        checked_hosts(["a", "=b", "c=x y", "d=1.1.1.1", "d=2.2.2.2"])
    assert caught.value.messages == (
        *(f"--node-address is {text!r}, must be NODE=HOST, such as gpu2=10.0.0.2" for text in ("a", "=b", "c=x y")),
        "--node-address: d comes twice",
    )
