"""Options, keys and tokens reach every engine as they are, or are told as lost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from hetis.engines.versions import Engine
from hetis.formats.errors import DocumentError
from hetis.planner.export import ExportTarget
from hetis.planner.export.ray_serve import engine_arguments
from hetis.planner.export.replicas import NotExportableError
from hetis.planner.export.settings import ExportSettings
from hetis.planner.export.targets import ENGINES, export_plan, export_wanted
from hetis.solver.model import DraftShape
from tests.planner.export import reading
from tests.planner.export.exporting import IN_CLUSTERS, READERS, SETTINGS, containers_in, exported
from tests.planner.export.plans import (
    PLANS,
    WITH_WORKERS,
    model_of,
)

ON_HOSTS = (ExportTarget.VLLM, ExportTarget.HETIS_LAUNCH, ExportTarget.COMPOSE, ExportTarget.SLURM)


@pytest.mark.parametrize("name", ["--config=/tmp/evil.yaml", "--trust-remote-code", " x"])
def test_a_plan_file_gives_engines_no_options_by_the_name_of_its_model(name: str) -> None:
    plan = PLANS["one GPU"]
    documents = plan.inputs["documents"]
    hostile = replace(plan, inputs={"documents": {**documents, "model": {**documents["model"], "name": name}}})
    with pytest.raises(DocumentError, match=f"plan.json: inputs.documents.model.name is '{name}', must be a name"):
        export_wanted(hostile, ExportTarget.VLLM, ExportSettings(), file="plan.json")


@pytest.mark.parametrize("target", list(ExportTarget))
def test_options_after_two_dashes_are_written_or_told_as_lost(target: ExportTarget) -> None:
    made = exported(PLANS["one GPU"], target, engine_options=("--seed", "4711"))
    carried = any("4711" in text for name, text in made.files.items() if name != "README.md")
    assert carried != any("--seed 4711" in lost for lost in made.lost)


def test_options_for_ray_are_arguments_of_the_engine_or_told_as_lost() -> None:
    """Ray takes the fields of vLLM's engine and front end, refuses unknown ones, and serves HTTP itself."""
    given = "--max-num-seqs 7 --seed=-1 --enforce-eager --no-enable-prefix-caching --gpu-memory-utilization 0.5"
    given += ' --tool-call-parser hermes --hf-overrides {"a":{"b":[1]}} --api-key k -O3 --max-model-len 8k'
    made = exported(PLANS["one GPU"], ExportTarget.RAY, engine_options=tuple(given.split()), program="my vllm")
    (application,) = yaml.safe_load(made.files["serve.yaml"])["applications"]
    arguments = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert arguments.items() >= {
        "max_num_seqs": 7, "seed": -1, "enforce_eager": True, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5, "tool_call_parser": "hermes", "hf_overrides": {"a": {"b": [1]}},
    }.items()  # fmt: skip
    assert not arguments.keys() & {"api_key", "max_model_len", "O3"}
    command_line = "Ray does not read command lines, set engine_kwargs in serve.yaml"
    assert made.lost == (
        "--program my vllm: Ray Serve LLM starts the engine itself",
        "--api-key k: Ray Serve LLM replaces vLLM's HTTP server",
        f"-O3: {command_line}",
        f"--max-model-len 8k: {command_line}",
    )


def test_a_value_without_an_option_is_told_as_lost_by_ray() -> None:
    """What the plan decides is left out before, here the option that stood before the value."""
    assert engine_arguments(["--kv-cache-dtype", "fp8", "extra"]) == (
        {},
        ["extra: Ray does not read command lines, set engine_kwargs in serve.yaml"],
    )


def test_a_draft_is_a_mapping_for_ray() -> None:
    plan = PLANS["one GPU"]
    model = replace(model_of(plan), draft=DraftShape(tokens=1, acceptance=0.8))
    made = export_plan(plan, model, ExportTarget.RAY, SETTINGS)
    (application,) = yaml.safe_load(made.files["serve.yaml"])["applications"]
    arguments = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert arguments["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 1}


@pytest.mark.parametrize("name", sorted(WITH_WORKERS))
def test_every_key_and_file_of_compose_is_mounted_where_it_is_read(name: str) -> None:
    files, num_keys = exported(PLANS[name], ExportTarget.COMPOSE).files, 0
    for path in (path for path in files if path.endswith("/compose.yaml")):
        whole = yaml.safe_load(files[path])
        for service in whole["services"].values():
            secrets = {f"/run/secrets/{name}": whole["secrets"][name]["file"] for name in service.get("secrets", ())}
            assert set(secrets.values()) == {"./worker.key"}, "which the README tells users to put there"
            mounted = {each["target"]: each["source"] for each in service.get("volumes", ())}
            keys = [reading.option(service["command"], "--key-file")]
            if place := service["environment"].get("HETIS_VLLM_CONFIG"):
                config = yaml.safe_load(files[path.replace("compose.yaml", mounted[place].removeprefix("./"))])
                keys = [worker["keyFile"] for worker in config["workers"]]
            assert keys
            assert set(keys) <= secrets.keys()
            num_keys += len(keys)
    assert num_keys > 1


@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.SLURM])
def test_the_key_of_scripts_is_the_file_beside_them(target: ExportTarget) -> None:
    """Scripts change to their own folder, and jobs run in that of `submit.sh`."""
    files = exported(PLANS["attention workers"], target).files
    configs = [yaml.safe_load(text) for path, text in files.items() if path.endswith("workers.yaml")]
    assert configs
    assert {worker["keyFile"] for one in configs for worker in one["workers"]} == {"worker.key"}
    assert "`worker.key`" in files["README.md"]


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS - {ExportTarget.DYNAMO}))
def test_pods_write_their_key_to_the_file_that_the_plugin_reads(target: ExportTarget) -> None:
    objects = reading.manifests(exported(PLANS["attention workers"], target).files)
    [config] = [one for one in objects if one["kind"] == "ConfigMap"]
    [engine] = [each for one in objects for each in containers_in(one) if each["name"] in ("vllm", "main")]
    [text] = [word for word in engine["command"] if "HETIS_WORKER_KEY" in word]
    for worker in yaml.safe_load(config["data"]["workers.yaml"])["workers"]:
        assert f"> {worker['keyFile']} " in text
    assert any(each["mountPath"] == "/tmp" and not each.get("readOnly") for each in engine["volumeMounts"])


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("target", [*sorted(IN_CLUSTERS - {ExportTarget.DYNAMO}), *ON_HOSTS])
def test_what_engines_and_workers_exchange_is_encrypted_where_it_is_requested(
    target: ExportTarget, *, encrypt: bool
) -> None:
    files = exported(PLANS["attention workers"], target, encrypt=encrypt).files
    if target is ExportTarget.HETIS_LAUNCH:
        lines = [line for path, text in files.items() if path.endswith(".sh") for line in text.splitlines()]
        found = ["--encrypt" in line.partition(" -- ")[0] for line in lines if "hetis-launch processes" in line]
    elif target in IN_CLUSTERS:
        configs = [one for one in reading.manifests(files) if one["kind"] == "ConfigMap"]
        found = ["encrypt: true" in one["data"]["workers.yaml"] for one in configs]
    else:
        found = ["encrypt: true" in text for path, text in files.items() if path.endswith("workers.yaml")]
    assert found
    assert set(found) == {encrypt}


def test_a_plan_without_attention_workers_has_nothing_to_encrypt() -> None:
    with pytest.raises(NotExportableError, match="--encrypt: the plan has no attention workers"):
        exported(PLANS["one GPU"], ExportTarget.VLLM, encrypt=True)


def test_compose_puts_no_variables_in_place_of_dollars_and_mounts_paths_with_colons() -> None:
    given = {"model": "/models/$HOME/tiny:v1", "served_name": "ti$ny", "engine_options": ("--api-key", "pa$s1")}
    made = exported(PLANS["attention workers"], ExportTarget.COMPOSE, **given)
    for path in made.shown:
        text = made.files[path]
        assert set(re.findall(r"\$.*", text.replace("$$", ""))) <= {"${VLLM_API_KEY:-}"}
    service = yaml.safe_load(made.files["a/compose.yaml"])["services"]["r0-vllm"]
    words = [word.replace("$$", "$") for word in service["command"]]
    assert words[:2] == ["serve", "/models/$HOME/tiny:v1"]
    assert reading.option(words, "--api-key") == "pa$s1"
    model = "/models/$$HOME/tiny:v1"
    assert {"type": "bind", "source": model, "target": model, "read_only": True} in service["volumes"]
    assert service["environment"]["VLLM_API_KEY"] == "${VLLM_API_KEY:-}"
    assert service["environment"]["HF_TOKEN"] is None, "passed on if it is set"


@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.SGLANG])
@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_kubernetes_puts_no_variables_in_place_of_dollars(target: ExportTarget, engine: Engine) -> None:
    texts = ("/models/$(HOME)/tiny", "ti$$ny", "$(HOME)$")
    given = {"model": texts[0], "served_name": texts[1], "engine_options": ("--chat-template", texts[2])}
    name = "one GPU" if target is ExportTarget.DYNAMO else "three nodes twice"
    num_commands = 0
    for one in reading.manifests(exported(PLANS[name], target, engine=engine, **given).files):
        for container in containers_in(one) if one["kind"] != "Deployment" else ():
            text = " ".join(reading.expanded(word, {"HOME": "/tmp"}) for word in reading.words_of(container))
            if "dynamo.frontend" not in text:
                assert all(each in text for each in texts)
                num_commands += 1
    assert num_commands >= (1 if target is ExportTarget.DYNAMO else 4)


@pytest.mark.parametrize("target", sorted(IN_CLUSTERS))
def test_every_engine_gets_the_token_by_which_it_downloads_its_model(target: ExportTarget) -> None:
    name = "one GPU" if target is ExportTarget.DYNAMO else "stages of two nodes"
    for given, key in (("hub", "HF_TOKEN"), ("hub:token", "token")):
        made = exported(PLANS[name], target, hf_token_secret=given)
        found = [each for one in reading.manifests(made.files) for each in containers_in(one)]
        wanted = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": key}}}
        assert len(found) == 2, "the engine's, and Dynamo's front end"
        assert all([each for each in one["env"] if each["name"] == "HF_TOKEN"] == [wanted] for one in found)
    assert "HF_TOKEN" not in str(exported(PLANS[name], target).files)


def test_dynamo_says_which_options_its_own_front_end_and_workers_replace() -> None:
    server = ("--ssl-keyfile", "/tls/tls.key", "--allowed-origins=[]")
    kept = ("--max-num-seqs", "7", "--seed=-1")
    made = exported(PLANS["one GPU"], ExportTarget.DYNAMO, engine_options=(*server, *kept), program="my serve")
    [graph] = reading.manifests(made.files)
    [_, component] = graph["spec"]["components"]
    words = component["podTemplate"]["spec"]["containers"][0]["args"]
    assert set(kept) <= set(words)
    assert not set(server) & set(words)
    assert [line for line in made.lost if line.startswith("--")] == [
        "--program my serve: Dynamo starts the engine by a worker of its own",
        "--ssl-keyfile /tls/tls.key: Dynamo's front end replaces the engine's HTTP server",
        "--allowed-origins=[]: Dynamo's front end replaces the engine's HTTP server",
    ]


@pytest.mark.parametrize("name", ["one GPU", "stages of two nodes", "prefill and decode"])
def test_options_mean_themselves_after_kserve_has_executed_its_templates(name: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{{{x}}}{% endfor %}"
    made = exported(PLANS[name], ExportTarget.KSERVE, engine_options=("--chat-template", template))
    services = [one for one in reading.manifests(made.files) if one["kind"] == "LLMInferenceService"]
    commands = [one["command"] for service in services for one in containers_in(service["spec"])]
    assert commands
    for command in commands:
        [found] = [word for word in command if "messages" in word]
        # An action of Go's templates that is a raw string yields the string.
        assert template in re.sub(r"\{\{`([^`]*)`\}\}", r"\1", found)
        assert "{{" not in re.sub(r"\{\{`[^`]*`\}\}", "", found)


def test_workers_get_no_token() -> None:
    made = exported(PLANS["attention workers"], ExportTarget.KUBERNETES, hf_token_secret="hub")
    found = [each for one in reading.manifests(made.files) for each in containers_in(one)]
    assert {(each["name"], "HF_TOKEN" in str(each["env"])) for each in found} == {("vllm", True), ("worker", False)}


@pytest.mark.parametrize("target", READERS)
def test_every_target_tells_its_engine_of_kv_once(target: ExportTarget) -> None:
    """The dtype of 16-bit KV is among the engine's options, and passed for each replica as its own."""
    plan = PLANS["one GPU"]
    settings = replace(SETTINGS, engine=next(iter(ENGINES.get(target, ())), None))
    settings = replace(settings, engine_options=("--kv-cache-dtype=bfloat16",))
    for kv_bytes, told in ((2.0, "bfloat16"), (1.0, "fp8")):
        made = export_plan(plan, replace(model_of(plan), kv_bytes=kv_bytes), target, settings)
        [found] = re.findall(r"kv[-_]cache[-_]dtype\W+(\w+)", "".join(made.files.values()))
        assert found.removesuffix("_e4m3") == told
        assert not made.lost
