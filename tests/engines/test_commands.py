"""Command lines follow from the layout and the nodes' addresses, and their programs understand them."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetis.engines.commands import Addresses, Command, as_json, as_shell, commands_of
from hetis.engines.layout import Layout, layout_of
from hetis.engines.serving import Serving, checkpoint_model, decided_in, missing_kv_option, program_of
from hetis.engines.versions import Engine
from hetis.formats import catalogue
from hetis.runtime.vllm.settings import PluginSettings, load_settings
from hetis.runtime.worker.main import WorkerOptions, read_options
from hetis.solver.model import DraftShape
from hetis.solver.plan import Role
from tests.engines import plans
from tests.engines.plans import (
    FP8_KV,
    MODEL,
    POOL,
    WITH_EXPERTS,
    plan_of,
    ranks_of,
    sharing,
    sharing_experts,
    stage_of,
    staged,
    stages_of,
    write_config,
)
from tests.models import replace

ONE = layout_of(plan_of(stage_of(), pools=(POOL,)), 0, MODEL)
STAGED = layout_of(staged(), 0, MODEL)
SHARING = layout_of(sharing(), 0, MODEL)
ALONE = layout_of(plans.ALONE, 0, MODEL)
SLIDING = layout_of(plan_of(stage_of(), pools=(POOL,)), 0, replace(MODEL, sliding_window=64, sliding_layers=2))
DRAFTING = layout_of(plans.ALONE, 0, replace(MODEL, draft=DraftShape(tokens=2, acceptance=0.5)))
FBGEMM = layout_of(plans.ALONE, 0, replace(MODEL, weights="fbgemm-fp8"))
SHARED = sharing_experts()
SERVING = Serving(model="/models/tiny", options=("--port", "8080"))


def settings_of(command: Command, folder: Path) -> PluginSettings:
    """Return the plugin's settings in the command's file."""
    [(name, text)] = command.files.items()
    assert command.environment["HETIS_VLLM_CONFIG"] == name
    (folder / "workers.yaml").write_text(text, encoding="utf-8")
    return load_settings(folder / "workers.yaml")


def told(command: Command, key: Path) -> WorkerOptions:
    """Return the worker's parsed options, with an existing key."""
    words = [str(key) if word == Addresses().key_file else word for word in command.shown[1:]]
    return read_options(words, {})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "worker.key"
    path.touch(mode=0o600)
    path.write_text("sixteen letters or more", encoding="utf-8")
    return path


def test_vllm_is_told_of_model_room_and_connector(tmp_path: Path) -> None:
    vllm = commands_of(ONE, SERVING, Addresses())[0]
    assert vllm.shown == (
        *("vllm", "serve", "/models/tiny", "--max-num-seqs", "4", "--max-num-batched-tokens", "36"),
        "--kv-transfer-config",
        '{"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}',
        *("--attention-backend", "CUSTOM", "--no-async-scheduling", "--port", "8080"),
    )
    assert vllm.environment == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0",
        "HETIS_VLLM_CONFIG": "hetis-launch/workers.yaml",
    }
    switch = "--no-async-scheduling"
    assert not decided_in((switch,)), "users of vLLM as it is may give it"
    given = commands_of(ONE, replace(SERVING, options=(switch,)), Addresses())[0]
    assert given.shown.count(switch) == 1
    on_cpu = replace(SERVING, device="cpu", dtype="float32", limits_kv=True, options=("--max_num_seqs=9",))
    [vllm, *_] = commands_of(ONE, on_cpu, Addresses())
    words = " ".join(vllm.shown)
    assert "--attention-backend" not in words
    assert "--max-num-seqs" not in words
    assert f"--dtype float32 --kv-cache-memory-bytes {ONE.servers[0].kv_bytes} " in words
    assert set(vllm.environment) == {"HETIS_VLLM_CONFIG"}
    steered = commands_of(ONE, replace(SERVING, executor="/run/e.sock"), Addresses())[0]
    assert settings_of(steered, tmp_path).executor == Path("/run/e.sock")


@pytest.mark.parametrize(
    ("words", "decided"),
    [
        (("--kv-cache-dtype", "bfloat16"), False),
        (("--kv_cache_dtype=float16", "--seed", "1"), False),
        (("--kv-cache-dtype", "fp8"), True),
        (("--kv-cache-dtype", "bfloat16", "--kv-cache-dtype=fp8"), True),
        (("--kv-cache-dtype", "bf16"), True),  # not a name of vLLM's
        (("--seed", "1", "--kv-cache-dtype"), True),
        (("--kv-cache-dtype", "auto"), True),
    ],
)
def test_users_say_which_dtype_kv_of_16_bits_has(words: tuple[str, ...], decided: bool) -> None:
    assert decided_in(words) == ({"--kv-cache-dtype"} if decided else set())
    assert decided_in((*words, "-tp", "2")) - {"--kv-cache-dtype"} == {"-tp"}


@pytest.mark.parametrize(
    ("words", "decided"),
    [
        (("--data-parallel-size", "2"), "--data-parallel-size"),
        (("-dp=2",), "-dp"),
        (("--tensor-parallel", "4"), "--tensor-parallel-size"),
        (("--tensor_par=4",), "--tensor-parallel-size"),
        (("-t", "4"), "-tp"),
        (("-n2",), "-n"),
        (("--kv-cache-memory", "100"), "--kv-cache-memory-bytes"),
        (("--kv-cache-dtyp", "bfloat16"), "--kv-cache-dtype"),  # otherwise the option would be passed twice
        (("--kv-transfer-config.kv_role=kv_both",), "--kv-transfer-config"),
        (("--kv_transfer_conf.kv_connector", "X"), "--kv-transfer-config"),
        (("--config", "c.yaml"), "--config"),
        *((words, "") for words in (("--seed", "-1"), ("--max-model-len=-1",), ("--kv-cache-dtype-skip-layers", "0"))),
        *((words, "") for words in (("--config-format", "hf"), ("--model-impl", "vllm"), ("-dpb", "mp"), ("-O3",))),
        *((words, "") for words in (("--hf-overrides.x", "1"), ("--", "-"), ("--data-parallel-rpc-port", "1"))),
    ],
)
def test_what_the_plan_decides_is_found_however_parsers_let_it_be_written(words: tuple[str, ...], decided: str) -> None:
    assert decided_in(words) == ({decided} if decided else set())


@pytest.mark.parametrize(
    ("layout", "serving", "told"),
    [
        ({}, {}, None),
        ({}, {"options": ("--kv-cache-dtype", "bfloat16", "--seed", "1")}, "bfloat16"),
        ({}, {"options": ("--seed", "1", "--kv_cache_dtype=float16")}, "float16"),
        ({}, {"dtype": "float16"}, "float16"),  # dtype of the model and its KV
        ({}, {"dtype": "float16", "options": ("--seed", "1", "--kv-cache-dtype", "bfloat16")}, "float16"),
        ({}, {"dtype": "float32"}, None),  # KV has no 32-bit dtype
        ({"dtype": "float16"}, {"options": ("--kv-cache-dtype", "bfloat16", "--seed", "1")}, "float16"),
        ({"dtype": "float16"}, {"device": "cpu"}, None),
        ({}, {"device": "cpu", "dtype": "bfloat16"}, None),
        ({}, {"device": "cpu", "options": ("--seed", "1", "--kv-cache-dtype", "bfloat16")}, "bfloat16"),
        ({"kv_is_fp8": True}, {}, "fp8"),
        ({"kv_is_fp8": True}, {"options": ("--kv-cache-dtype", "bfloat16", "--seed", "1")}, "fp8"),
    ],
)
def test_every_engine_is_told_of_the_kv_of_its_own_replica(
    layout: dict[str, Any], serving: dict[str, Any], told: str | None
) -> None:
    [vllm] = commands_of(replace(ALONE, **layout), replace(SERVING, **serving), Addresses())
    after = dict(itertools.pairwise(vllm.shown))
    assert after.get("--kv-cache-dtype") == told
    assert sum("kv-cache-dtype" in word or "kv_cache_dtype" in word for word in vllm.shown) == (told is not None)
    assert after.get("--seed") == ("1" if serving.get("options") else None)
    if (layout.get("dtype"), serving.get("dtype")) == (None, None) and told != "float16":  # SGLang has no float16 KV
        [sglang] = commands_of(replace(ALONE, **layout, engine=Engine.SGLANG), replace(SERVING, **serving), Addresses())
        after = dict(itertools.pairwise(sglang.shown))
        assert after.get("--kv-cache-dtype") == ("fp8_e4m3" if told == "fp8" else told)
        assert sglang.shown.count("--kv-cache-dtype") == (told is not None)


def test_sglang_is_not_told_of_kv_in_float16() -> None:
    [sglang] = commands_of(replace(ALONE, dtype="float16", engine=Engine.SGLANG), SERVING, Addresses())
    assert ("float16" in sglang.shown, "--kv-cache-dtype" in sglang.shown) == (True, False)


def test_vllm_has_room_for_a_chunk_beside_the_tokens_that_decode() -> None:
    for layout, tokens in ((ALONE, ALONE.chunk_tokens + 4), (DRAFTING, DRAFTING.chunk_tokens + 3 * 4)):
        [vllm] = commands_of(layout, SERVING, Addresses())
        options = dict(itertools.pairwise(vllm.shown))
        assert (options["--max-num-seqs"], options["--max-num-batched-tokens"]) == ("4", str(tokens))


def test_kv_that_would_not_be_as_planned_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, FP8_KV)
    assert checkpoint_model(tmp_path, None)[0].kv_bytes == 1
    model, stated = checkpoint_model(tmp_path, MODEL)
    assert (model.name, model.kv_bytes, stated) == (MODEL.name, 2, "fp8")
    write_config(tmp_path / "usual")
    assert checkpoint_model(tmp_path / "usual", MODEL)[1] == "", "KV in 16 bits needs no option"
    assert missing_kv_option(ALONE, SERVING, stated=stated) == (
        "/models/tiny states fp8 KV, which engines use by default, but the replica needs 16 bits: "
        "give the engine --kv-cache-dtype bfloat16 or float16, the dtype of the checkpoint"
    )
    sglang = replace(ALONE, engine=Engine.SGLANG)
    told, other = ({"options": ("--kv-cache-dtype", dtype)} for dtype in ("bfloat16", "float16"))
    both = {"options": (*told["options"], *other["options"])}
    for layout, serving, why in (
        (replace(ALONE, kv_is_fp8=True), {}, ""),
        (replace(ALONE, kv_is_fp8=True), both, ""),
        (replace(ALONE, dtype="float16"), {}, ""),
        (replace(ALONE, dtype="float16"), told, ""),  # it gets its own dtype, whatever the others have
        (ALONE, {"dtype": "bfloat16"}, ""),
        (ALONE, {"dtype": "bfloat16"} | told, ""),
        (ALONE, told, ""),
        (ALONE, both, "--kv-cache-dtype is bfloat16 and float16, must be bfloat16 or float16 of vLLM"),
        (ALONE, {"dtype": "float16"} | told, "is bfloat16, and --dtype is float16, which also applies to KV"),
        (ALONE, {"dtype": "float32"} | told, "is bfloat16, and --dtype is float32, which also applies to KV"),
        (ALONE, {"dtype": "float32"}, "vLLM has no option to keep KV in float32: /models/tiny states fp8"),
        (ALONE, {"dtype": "bfloat16", "device": "cpu"}, "give the engine --kv-cache-dtype bfloat16, the dtype"),
        (ALONE, {"dtype": "bfloat16", "device": "cpu"} | told, ""),
        (sglang, {}, "give the engine --kv-cache-dtype bfloat16, the dtype"),
        (sglang, told, ""),
        (sglang, other, "--kv-cache-dtype is float16, must be bfloat16 of SGLang"),
        (replace(sglang, dtype="float16"), {}, "SGLang has no option to keep KV in float16: /models/tiny states fp8"),
        (replace(sglang, dtype="float16"), told, "SGLang has no option to keep KV in float16"),
    ):
        found = missing_kv_option(layout, replace(SERVING, **serving), stated=stated)
        assert why in found if why else not found, (layout, serving)
    assert not missing_kv_option(ALONE, SERVING)
    assert not missing_kv_option(ALONE, replace(SERVING, dtype="float32"))


def test_vllms_other_program_is_told_its_model_by_an_option() -> None:
    front = replace(SERVING, program=("python", "-m", "vllm.entrypoints.openai.api_server"))
    shown = commands_of(ONE, front, Addresses())[0].shown
    assert shown[:5] == ("python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/tiny")


def test_a_replica_without_workers_needs_no_plugin() -> None:
    [vllm] = commands_of(ALONE, SERVING, Addresses())
    assert "--kv-transfer-config" not in vllm.shown
    assert "--attention-backend" not in vllm.shown
    assert (vllm.files, vllm.secrets, set(vllm.environment)) == ({}, (), {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"})


@pytest.mark.parametrize(("role", "chunk", "tokens"), [("decode", 0, 264), ("unified", 32, 264), ("unified", 512, 516)])
def test_an_iteration_has_room_for_an_image_that_vllm_does_not_divide(role: str, chunk: int, tokens: int) -> None:
    """Gemma 3's images have 260 tokens; each of the four seats has one more."""
    gemma = replace(MODEL, vision_params=1_000_000, sliding_window=64, sliding_layers=2)
    plan = plan_of(stage_of(kv_head_groups_kept=8), role=Role(role), chunk_tokens=chunk)
    [command] = commands_of(layout_of(plan, 0, gemma, engine=Engine.VLLM), SERVING, Addresses())
    assert command.shown[command.shown.index("--max-num-batched-tokens") + 1] == str(tokens)
    text = layout_of(plan, 0, replace(gemma, vision_params=0), engine=Engine.VLLM)
    [command] = commands_of(text, SERVING, Addresses())
    assert command.shown[command.shown.index("--max-num-batched-tokens") + 1] == str(chunk + 4)


@pytest.mark.parametrize(("in_flight", "chunk", "tokens"), [(1, 32, 36), (4, 32, 36), (4, 8, 16)])
def test_an_iteration_has_room_for_a_chunk_beside_one_of_the_micro_batches(
    in_flight: int, chunk: int, tokens: int
) -> None:
    """Of the seats, only those of a micro-batch decode in an iteration; vLLM wants a token for each all the same."""
    plan = plan_of(*stages_of(2, 2, kv_head_groups_kept=8), micro_batch=4, in_flight=in_flight, chunk_tokens=chunk)
    [command] = commands_of(layout_of(plan, 0, MODEL, engine=Engine.VLLM), SERVING, Addresses())
    words = command.shown
    assert words[words.index("--max-num-seqs") + 1] == str(4 * in_flight)
    assert words[words.index("--max-num-batched-tokens") + 1] == str(tokens)


@pytest.mark.parametrize(
    ("tp", "chunk", "micro_batch", "beside"),
    [(2, 2048, 160, 2096), (2, 2048, 16, 2048), (4, 2048, 64, 2112), (4, 256, 32, 256), (8, 512, 16, 528)],
)
def test_where_layers_keep_states_a_chunk_is_whole_blocks(tp: int, chunk: int, micro_batch: int, beside: int) -> None:
    """vLLM's blocks have 2,096 tokens of Qwen3.5-397B in two ranks, as its log says, and fewer in more ranks.

    With less than a block beside all that decode, prompts would wait until fewer do; with 2,048 beside them, an
    iteration would compute one of 1,056.
    """
    found = catalogue.known_model("Qwen/Qwen3.5-397B-A17B")
    assert found is not None
    ranks = ranks_of(tp, num_layers=60, kv_head_groups_kept=1, gpu="H200-SXM-141GB")
    plan = plan_of(ranks, chunk_tokens=chunk, micro_batch=micro_batch, kv_tokens=100_000)
    [command] = commands_of(layout_of(plan, 0, found, engine=Engine.VLLM), SERVING, Addresses())
    words = command.shown
    assert words[words.index("--max-num-batched-tokens") + 1] == str(beside + micro_batch)


def test_a_method_that_vllm_has_deprecated_is_allowed() -> None:
    flag = "--allow-deprecated-quantization"
    assert flag in commands_of(FBGEMM, SERVING, Addresses())[0].shown
    assert flag not in commands_of(ALONE, SERVING, Addresses())[0].shown
    [given] = commands_of(FBGEMM, replace(SERVING, options=(flag,)), Addresses())
    assert given.shown.count(flag) == 1
    [sglang] = commands_of(replace(FBGEMM, engine=Engine.SGLANG), SERVING, Addresses())
    assert flag not in sglang.shown


def test_copies_that_share_experts_are_one_engine() -> None:
    """vLLM's limits apply to each copy, SGLang's to all together."""
    layout = layout_of(SHARED, 0, WITH_EXPERTS)
    [vllm] = commands_of(layout, SERVING, Addresses())
    assert vllm.shown[3:] == (
        *("--tensor-parallel-size", "2", "--data-parallel-size", "2", "--enable-expert-parallel"),
        *("--distributed-executor-backend", "mp", "--max-num-seqs", "4", "--max-num-batched-tokens", "36"),
        *("--port", "8080"),
    )
    assert vllm.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert (layout.kv_tokens, layout.seats, layout.data_parallel) == (1024, 4, 2)
    assert layout_of(SHARED, 0, WITH_EXPERTS, kv_tokens=512).kv_tokens == 512
    [sglang] = commands_of(layout_of(SHARED, 0, WITH_EXPERTS, engine=Engine.SGLANG), SERVING, Addresses())
    words = " ".join(sglang.shown)
    assert "--tp-size 4 --dp-size 2 --ep-size 4 --enable-dp-attention --dist-init-addr 127.0.0.1:29501" in words
    assert "--max-running-requests 8 --chunked-prefill-size 64" in words


def test_stages_on_several_nodes_meet_by_vllms_own_launch() -> None:
    hosts = {"a": "10.0.0.1", "c": "gpu-c.example"}
    first, second, *_ = commands_of(STAGED, SERVING, Addresses(hosts=hosts, master_port=3000))
    common = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp")
    for number, command in enumerate((first, second)):
        assert command.shown[3:9] == common
        assert command.shown[9:17] == (
            *("--nnodes", "2", "--node-rank", str(number), "--master-addr", "10.0.0.1", "--master-port", "3000"),
        )
        assert command.environment["VLLM_PP_LAYER_PARTITION"] == "3,1"
    assert [("--headless" in one.shown) for one in (first, second)] == [False, True]
    assert first.environment["VLLM_HOST_IP"] == "10.0.0.1"
    assert "VLLM_HOST_IP" not in second.environment  # vLLM would take this host name for an address
    assert first.environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert second.environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_stages_on_one_node_need_no_meeting() -> None:
    whole = replace(STAGED, servers=(replace(STAGED.servers[0], gpus=(0, 1, 2, 3)),))
    [vllm, *_] = commands_of(whole, SERVING, Addresses())
    assert "--nnodes" not in vllm.shown
    assert "--pipeline-parallel-size" in vllm.shown
    assert vllm.environment["VLLM_PP_LAYER_PARTITION"] == "3,1"


@pytest.mark.parametrize("layout", [ONE, STAGED, SHARING])
@pytest.mark.parametrize("addresses", [Addresses(), Addresses(all_here=True), Addresses(hosts={"b": "10.0.0.2"})])
def test_every_rank_finds_its_worker_process_where_that_listens(
    layout: Layout, addresses: Addresses, tmp_path: Path, key: Path
) -> None:
    commands = commands_of(layout, SERVING, addresses)
    vllm, workers = commands[: len(layout.servers)], commands[len(layout.servers) :]
    listening = {command.process.name: told(command, key) for command in workers}
    reached = []
    for command in vllm:
        settings = settings_of(command, tmp_path)
        assert [one.name for one in settings.workers] == [one.name for one in layout.workers]
        for worker, planned in zip(settings.workers, layout.workers, strict=True):
            assert str(worker.key_file) == addresses.key_file
            for address, name in zip(worker.addresses, planned.processes, strict=True):
                host, _, port = address.rpartition(":")
                options = listening[name]
                assert int(port) == options.listen[1]
                assert options.listen[0] in (host, "0.0.0.0")
                reached.append(address)
    nodes = {command.process.name: "here" if addresses.all_here else command.process.node for command in workers}
    ports = [(nodes[name], options.listen[1]) for name, options in listening.items()]
    assert len(set(ports)) == len(ports), "each has a port of its own on its node"
    assert {options.name: options.kv_bytes for options in listening.values()} == {
        process.name: process.kv_bytes for process in layout.attention_workers
    }
    assert {options.device for options in listening.values()} == {"cuda"}


def test_between_nodes_an_address_is_listened_on_alone_and_a_name_on_all(key: Path) -> None:
    for host, listens in (("10.0.0.2", "10.0.0.2"), ("fd00::2", "fd00::2"), ("b.example", "0.0.0.0")):
        worker = commands_of(ONE, SERVING, Addresses(hosts={"b": host}))[1]
        assert told(worker, key).listen == (listens, 7070)
    beside = replace(ONE, servers=(replace(ONE.servers[0], node="b"),))
    worker = commands_of(beside, SERVING, Addresses(hosts={"b": "10.0.0.2"}))[1]
    assert told(worker, key).listen[0] == "127.0.0.1"  # on vLLM's node, where they share memory


def test_the_forms_say_the_same() -> None:
    commands = commands_of(ONE, SERVING, Addresses())
    found = json.loads(as_json(commands))
    assert [row["name"] for row in found] == ["vllm", "b/0", "b/1"]
    assert [tuple(row["command"]) for row in found] == [command.shown for command in commands]
    shell = as_shell(commands)
    assert [line for line in shell.splitlines() if line.startswith("#")] == ["# on a", "# on b"]
    written = shell.partition("<<'YAML'\n")[2].partition("YAML\n")[0]
    assert yaml.safe_load(written) == yaml.safe_load(found[0]["files"]["hetis-launch/workers.yaml"])
    done = subprocess.run(["sh", "-n"], input=shell, text=True, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def lines_of_layouts() -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Return command lines with what vLLM's own parser must read from them; see test_vllm.py of exports."""
    serving = replace(SERVING, limits_kv=True, dtype="float32")
    lines, expected = list[tuple[str, ...]](), list[dict[str, Any]]()
    for layout in (ONE, STAGED, SHARING, ALONE, SLIDING, DRAFTING, FBGEMM, layout_of(SHARED, 0, WITH_EXPERTS)):
        for number, command in enumerate(commands_of(layout, serving, Addresses())[: len(layout.servers)]):
            lines.append(command.shown[1:])
            ranks = layout.tensor_parallel * len(layout.layers)
            expected.append(
                {
                    "model": "/models/tiny",
                    "tp": layout.tensor_parallel,
                    "pp": len(layout.layers),
                    "nodes": len(layout.servers),
                    "rank": number,
                    "headless": number > 0,
                    "seats": layout.seats,
                    "tokens": layout.chunk_tokens + layout.seats * (3 if layout is DRAFTING else 1),
                    "backend": "CUSTOM" if layout.workers else None,
                    "connector": "HetisConnector" if layout.workers else None,
                    "executor": "mp" if ranks > 1 else None,
                    "kv": layout.rank_kv_bytes if layout.fixes_kv else None,
                    "dtype": "float32",
                    "context": layout.context_tokens,
                    "kv_dtype": "auto",
                    "hybrid_off": True if layout is SLIDING else None,
                    "sharing": [layout.data_parallel, layout.data_parallel > 1],
                    "deprecated": layout is FBGEMM,
                    "drafts": ["mtp", 2] if layout is DRAFTING else None,
                }
            )
    return lines, expected


@pytest.mark.parametrize(
    ("engine", "gpus", "dtype"),
    [
        (Engine.VLLM, ("A100-PCIe-80GB", "T4"), "float16"),
        (Engine.SGLANG, ("A100-PCIe-80GB", "T4"), "float16"),
        (Engine.VLLM, ("A100-PCIe-80GB", "L4"), None),
        (Engine.VLLM, ("T4", "of-another-maker"), "float16"),
    ],
)
def test_gpus_without_bfloat16_make_all_ranks_compute_in_float16(
    engine: Engine, gpus: tuple[str, str], dtype: str | None
) -> None:
    stages = [replace(one, gpu=gpu) for one, gpu in zip(stages_of(3, 1, kv_head_groups_kept=8), gpus, strict=True)]
    layout = layout_of(plan_of(*stages, in_flight=2), 0, MODEL, engine=engine)
    serving = Serving(model="/models/tiny", program=program_of(engine))
    for command in commands_of(layout, serving, Addresses()):
        said = dict(itertools.pairwise(command.shown))
        assert said.get("--dtype") == dtype, "each node would choose by its own GPUs"
    as_wanted = commands_of(layout, replace(serving, dtype="float32"), Addresses())[0].shown
    assert dict(itertools.pairwise(as_wanted))["--dtype"] == "float32"
    on_cpu = commands_of(layout, replace(serving, device="cpu"), Addresses())[0].shown
    assert "--dtype" not in on_cpu


def test_prefill_and_decode_replicas_hand_kv_over_in_one_dtype() -> None:
    strong, weak = (stage_of(kv_head_groups_kept=8, gpu=gpu) for gpu in ("A100-PCIe-80GB", "T4"))
    prefill = plan_of(strong, role=Role.PREFILL, micro_batch=0, tpot_s=0.0).replicas
    decode = plan_of(replace(weak, devices=("b/0",)), role=Role.DECODE, chunk_tokens=0, ttft_s=0.0).replicas
    both = replace(plan_of(stage_of()), replicas=(*prefill, *decode))
    dtypes = {layout_of(both, number, MODEL, engine=Engine.VLLM).dtype for number in (0, 1)}
    assert dtypes == {"float16"}
