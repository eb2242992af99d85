"""Reads exports back: the layers and GPUs of each replica. It shares no code with the writers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typer.testing import CliRunner

from hetis.runtime.launch.main import app as hetis_launch
from hetis.solver.plan import ReplicaPlan
from tests.engines.plans import MODEL


class Read(NamedTuple):
    """A replica: layers and GPUs of each stage, and the GPUs of its attention workers."""

    layers: tuple[int, ...]
    devices: tuple[tuple[str, ...], ...]
    workers: frozenset[str]


class Found(NamedTuple):
    """A process as exported."""

    words: list[str]
    environment: Mapping[str, str]
    devices: list[str]


def planned(replica: ReplicaPlan) -> Read:
    """Return what an export of a replica must contain."""
    return Read(
        tuple(stage.num_layers for stage in replica.stages),
        tuple(stage.devices for stage in replica.stages),
        frozenset(replica.worker_devices()),
    )


def read_replica(processes: Iterable[Found]) -> Read:
    """Return a replica from its processes, in whatever order they are."""
    servers, workers = list[Found](), set[str]()
    for one in processes:
        if "hetis-worker" in one.words:
            workers |= set(one.devices)
        else:
            servers.append(one)
    servers.sort(key=lambda one: int(option(one.words, "--node-rank") or 0))
    assert [int(option(one.words, "--node-rank") or 0) for one in servers] == list(range(len(servers)))
    nnodes = {int(option(one.words, "--nnodes") or 1) for one in servers}
    assert nnodes == {len(servers)}, "every process knows how many there are"
    first = servers[0]
    tp = int(option(first.words, "--tensor-parallel-size", "--tp-size") or 1)
    if copies := option(first.words, "--data-parallel-size"):  # SGLang counts copies among its ranks
        assert "--enable-expert-parallel" in first.words
        tp *= int(copies)
    stages = int(option(first.words, "--pipeline-parallel-size", "--pp-size") or 1)
    partitions = {partition_of(one.environment) for one in servers}
    assert len(partitions) == 1, "every process knows every stage"
    partition = partitions.pop()
    layers = tuple(map(int, partition.split(","))) if partition else (MODEL.num_layers,)
    assert (len(layers), sum(layers)) == (stages, MODEL.num_layers)
    devices = [device for one in servers for device in one.devices]
    assert len(devices) == tp * stages
    return Read(layers, tuple(tuple(devices[i * tp : (i + 1) * tp]) for i in range(stages)), frozenset(workers))


def partition_of(environment: Mapping[str, str]) -> str:
    return environment.get("VLLM_PP_LAYER_PARTITION", environment.get("SGLANG_PP_LAYER_PARTITION", ""))


def option(words: list[str], *names: str) -> str | None:
    """Return the value of an option, which may have several names."""
    for name, value in pairwise(words):
        if name in names:
            return value
    return None


def visible(environment: Mapping[str, str], node: str) -> list[str]:
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    return [f"{node}/{index}" for index in environment["CUDA_VISIBLE_DEVICES"].split(",")]


def read_shell(files: Mapping[str, str]) -> dict[str, Read]:
    """Read NODE/rN.sh."""
    found = dict[str, list[Found]]()
    for path, text in files.items():
        if not (match := re.fullmatch(r"([^/]+)/(r\d+)\.sh", path)):
            continue
        node, name = match.groups()
        for line in text.splitlines():
            if line.startswith("env "):
                words = shlex.split(line.removeprefix("env ").rpartition(" >")[0])
                environment = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
                words = words[len(environment) :]
                found.setdefault(name, []).append(Found(words, environment, visible(environment, node)))
    return {name: read_replica(processes) for name, processes in found.items()}


def read_compose(files: Mapping[str, str]) -> dict[str, Read]:
    """Read NODE/compose.yaml: the container numbers its visible GPUs from 0."""
    found = dict[str, list[Found]]()
    for path, text in files.items():
        if path.endswith("/compose.yaml"):
            node = path.partition("/")[0]
            for name, service in yaml.safe_load(text)["services"].items():
                [reserved] = service["deploy"]["resources"]["reservations"]["devices"]
                inside = [int(i) for i in service["environment"]["CUDA_VISIBLE_DEVICES"].split(",")]
                devices = [f"{node}/{reserved['device_ids'][i]}" for i in inside]
                words = [*service["entrypoint"], *service["command"]]
                one = Found(words, service["environment"], devices)
                found.setdefault(name.partition("-")[0], []).append(one)
    return {name: read_replica(processes) for name, processes in found.items()}


def manifests(files: Mapping[str, str]) -> list[dict[str, Any]]:
    """Yield every object of every manifest."""
    return [
        one
        for path, text in files.items()
        if path.endswith(".yaml") and not path.startswith("router/") and path != "kustomization.yaml"
        for one in yaml.safe_load_all(text)
        if one
    ]


def container_of(pod: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    [container] = [c for c in pod["containers"] if not name or c["name"] == name]
    return dict(container)


def expanded(word: str, environment: Mapping[str, str]) -> str:
    """Return a word of a pod's command as Kubernetes passes it on, with variables of its environment."""
    known = {"$$": "$", **{f"$({name})": value for name, value in environment.items()}}
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: known.get(found[0], found[0]), word)


def words_of(container: Mapping[str, Any]) -> list[str]:
    return [str(word) for word in (*container.get("command", []), *container.get("args", []))]


def environment_of(container: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


def nodes_of(pod: Mapping[str, Any]) -> list[str]:
    """Return the nodes on which a pod may run; a requirement on a field has exactly one value."""
    assert "nodeSelector" not in pod
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    nodes = list[str]()
    for term in required["nodeSelectorTerms"]:
        [field] = term["matchFields"]
        assert (term.keys(), field["key"], field["operator"]) == ({"matchFields"}, "metadata.name", "In")
        [node] = field["values"]
        nodes.append(node)
    return nodes


def read_kubernetes(files: Mapping[str, str]) -> dict[str, Read]:
    """Read StatefulSets: the node by its affinity, the number of GPUs, and which ones by the annotation."""
    found = dict[str, list[Found]]()
    for one in manifests(files):
        if one["kind"] == "StatefulSet":
            template = one["spec"]["template"]
            container, pod = container_of(template["spec"]), template["spec"]
            devices = template["metadata"]["annotations"]["hetis/devices"].split(",")
            assert container["resources"]["limits"]["nvidia.com/gpu"] == len(devices)
            assert {device.partition("/")[0] for device in devices} == set(nodes_of(pod))
            name = one["metadata"]["labels"]["app.kubernetes.io/instance"].rpartition("-")[2]
            process = Found(words_of(container), environment_of(container), devices)
            found.setdefault(name, []).append(process)
    return {name: read_replica(processes) for name, processes in found.items()}


def read_hetis_launch(files: Mapping[str, str], folder: Path) -> dict[str, Read]:
    """Read what every command line in NODE.sh would start, according to hetis-launch itself."""
    (folder / "plan.json").write_text(files["plan.json"], encoding="utf-8")
    found, parts = dict[str, Read](), dict[str, set[str]]()
    for path, text in files.items():
        for line in text.splitlines() if re.fullmatch(r"[^/]+\.sh", path) else ():
            if not line.startswith("hetis-launch "):
                continue
            words = shlex.split(line.removesuffix(" &"))
            name, node = f"r{option(words, '--replica')}", str(option(words, "--node"))
            place = words.index("--node")
            shown = ["show", "--form", "json", *words[2:place], *words[place + 2 :]]
            shown[shown.index("plan.json")] = str(folder / "plan.json")
            result = CliRunner().invoke(hetis_launch, shown)
            assert result.exit_code == 0, result.output
            rows = json.loads(result.stdout)
            parts.setdefault(name, set()).add(node)
            devices = [[f"{row['node']}/{gpu}" for gpu in row["gpus"]] for row in rows]
            of_all = [Found(row["command"], row["environment"], own) for row, own in zip(rows, devices, strict=True)]
            read = read_replica(of_all)
            assert found.setdefault(name, read) == read, "every node starts its part of the same replica"
            assert parts[name] <= {row["node"] for row in rows}
    return found


def of_groups(groups: Iterable[tuple[str, int, Mapping[str, Any], Mapping[str, Any] | None]]) -> dict[str, list[Found]]:
    """Read replicas made from two templates: name, size, the leader's and the workers'.

    A worker's script derives its rank from its node, so the script is run for every node.
    """
    found = dict[str, list[Found]]()
    for name, size, leader, workers in groups:
        container = container_of(leader["spec"])
        [node] = nodes_of(leader["spec"])
        devices = leader["metadata"]["annotations"]["hetis/devices"].split(",")
        assert {device.rpartition("/")[0] for device in devices} == {node}
        assert container["resources"]["limits"]["nvidia.com/gpu"] == len(devices)
        mine = found.setdefault(name, [])
        mine.append(Found(words_of(container), environment_of(container), devices))
        if size == 1:
            continue
        container = container_of(workers["spec"])
        by_node = dict[str, list[str]]()
        for device in workers["metadata"]["annotations"]["hetis/devices"].split(","):
            by_node.setdefault(device.rpartition("/")[0], []).append(device)
        assert len(by_node) == size - 1
        for node, own in by_node.items():
            assert container["resources"]["limits"]["nvidia.com/gpu"] == len(own)
            words = words_of(container)
            if "podAntiAffinity" not in workers["spec"]["affinity"]:
                assert nodes_of(workers["spec"]) == [node]
            else:
                check_apart(workers, list(by_node))
                words = run_script(words, node)
            mine.append(Found(words, environment_of(container), own))
    return found


def check_apart(workers: Mapping[str, Any], nodes: list[str]) -> None:
    """Assert that pods of one template are on these nodes, no two of them on the same."""
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    assert nodes_of(workers["spec"]) == nodes
    [apart] = workers["spec"]["affinity"]["podAntiAffinity"][required]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert apart["labelSelector"]["matchLabels"].items() <= workers["metadata"]["labels"].items()


def run_script(words: list[str], node: str) -> list[str]:
    """Return the command that a pod's script executes on a node."""
    at = words.index("-c") + 1
    shown = words[at].replace("exec ", "printf '%s\\n' ", 1)
    environment = {"HETIS_NODE": node, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*words[:at], shown], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def workers_of(files: Mapping[str, str]) -> dict[str, list[Found]]:
    """Read attention workers, which are StatefulSets whatever creates the engine's pods, and stages without a group."""
    found = dict[str, list[Found]]()
    for one in manifests(files):
        if one["kind"] == "StatefulSet":
            template = one["spec"]["template"]
            container = container_of(template["spec"])
            devices = template["metadata"]["annotations"]["hetis/devices"].split(",")
            name = one["metadata"]["labels"]["app.kubernetes.io/instance"].rpartition("-")[2]
            found.setdefault(name, []).append(Found(words_of(container), environment_of(container), devices))
    return found


def together(*parts: Mapping[str, list[Found]]) -> dict[str, Read]:
    """Return replicas whose processes come from several kinds of objects."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: read_replica([one for part in parts for one in part.get(name, [])]) for name in names}


def read_lws(files: Mapping[str, str]) -> dict[str, Read]:
    """Read LeaderWorkerSets, and those in a DisaggregatedSet."""
    groups = []
    for one in manifests(files):
        if one["kind"] == "LeaderWorkerSet":
            specs = [(one["metadata"]["labels"]["app.kubernetes.io/instance"].rpartition("-")[2], one["spec"])]
        elif one["kind"] == "DisaggregatedSet":
            specs = [(role["name"].rpartition("-")[2], role["spec"]) for role in one["spec"]["roles"]]
        else:
            continue
        for name, spec in specs:
            assert spec["replicas"] == 1
            group = spec["leaderWorkerTemplate"]
            leader = group.get("leaderTemplate", group["workerTemplate"])
            groups.append((name, group["size"], leader, group["workerTemplate"]))
    return together(of_groups(groups), workers_of(files))


def read_llm_d(files: Mapping[str, str]) -> dict[str, Read]:
    """Read the chart's values, and LeaderWorkerSets beside them."""
    found = dict[str, Read]()
    for path, text in files.items():
        if path.startswith("values-"):
            values = yaml.safe_load(text)
            [role] = [values[role] for role in ("prefill", "decode") if values[role]["create"]]
            [container] = role["containers"]
            devices = role["podAnnotations"]["hetis/devices"].split(",")
            assert container["resources"]["limits"]["nvidia.com/gpu"] == role["parallelism"]["tensor"] == len(devices)
            assert {d.rpartition("/")[0] for d in devices} == set(nodes_of(role["extraConfig"]))
            assert role["strategy"] == {"type": "Recreate"}, "an update would wait for GPUs of the former pod"
            one = Found(container["command"], environment_of(container), devices)
            found[values["fullnameOverride"].rpartition("-")[2]] = read_replica([one])
    rest = {path: text for path, text in files.items() if not path.startswith("values-")}
    return {**found, **read_lws(rest)}


def read_slurm(files: Mapping[str, str]) -> dict[str, Read]:
    """Read batch scripts: a component's node, and the steps that run there; a comment names the GPUs."""
    found = dict[str, Read]()
    for path, text in files.items():
        if not path.endswith(".sbatch"):
            continue
        components = [dict(re.findall(r"#SBATCH --(\S+?)=(\S+)", part)) for part in text.split("#SBATCH hetjob\n")]
        taken, processes = [0] * len(components), list[Found]()
        for comment, line in pairwise(text.splitlines()):
            if line.startswith("srun "):
                step, _, command = line.removesuffix(" &").partition(" env ")
                options = dict(word.split("=", 1) for word in step.split() if "=" in word)
                group = int(options.get("--het-group", 0))
                devices = comment.rpartition(" ")[2].split(",")
                assert {d.rpartition("/")[0] for d in devices} == {components[group]["nodelist"]}
                assert int(options["--gpus-per-node"]) == int(options["--gpus-per-task"]) == len(devices)
                taken[group] += len(devices)
                words = shlex.split(command)
                environment = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
                processes.append(Found(words[len(environment) :], environment, devices))
        assert taken == [int(one["gpus-per-node"]) for one in components], "a job asks for what its steps take"
        found[path.removesuffix(".sbatch")] = read_replica(processes)
    return found


def read_kserve(files: Mapping[str, str]) -> dict[str, Read]:
    """Read LLMInferenceServices. A pair has the name of its prefill replica."""
    found, workers = dict[str, list[Found]](), workers_of(files)
    for one in manifests(files):
        if one["kind"] == "LLMInferenceService":
            name = one["metadata"]["name"].rpartition("-")[2]
            spec = one["spec"]
            sides = {name: spec["prefill"], f"{name}'s decode": spec} if "prefill" in spec else {name: spec}
            for side, of_side in sides.items():
                assert of_side["replicas"] == 1
                size = of_side["parallelism"].get("pipeline", 1)
                said = of_side["annotations"]
                leader = _pod_template(of_side["template"], said["hetis/leader"])
                further = _pod_template(of_side["worker"], said["hetis/workers"]) if size > 1 else None
                if further is not None and "podAntiAffinity" in further["spec"]["affinity"]:
                    further["metadata"]["labels"] = {
                        "app.kubernetes.io/name": one["metadata"]["name"],
                        "app.kubernetes.io/component": "llminferenceservice-workload-worker"
                        + ("-prefill" if of_side is spec.get("prefill") else ""),
                    }
                found |= of_groups([(side, size, leader, further)])
    return together(found, workers)


def _pod_template(pod: Mapping[str, Any], devices: str) -> dict[str, Any]:
    return {"metadata": {"annotations": {"hetis/devices": devices}}, "spec": pod}


def read_dynamo(files: Mapping[str, str]) -> dict[str, Read]:
    """Read components of graphs."""
    found = dict[str, list[Found]]()
    for graph in manifests(files):
        front, *components = graph["spec"]["components"]
        assert front["type"] == "frontend"
        for one in components:
            found |= of_groups([(one["name"], 1, one["podTemplate"], None)])
    return together(found)


def read_ray(files: Mapping[str, str]) -> dict[str, Read]:
    """Read Serve's applications: a bundle for each rank, which names its node; Ray chooses the GPU's number."""
    found = dict[str, Read]()
    for application in yaml.safe_load(files["serve.yaml"])["applications"]:
        arguments, name = application["args"], application["name"]
        assert application["route_prefix"] == f"/{name}"
        configs = {f"{name}'s decode": arguments["decode_config"]} if "decode_config" in arguments else {}
        configs[name] = arguments["prefill_config"] if configs else arguments["llm_configs"][0]
        for key, config in configs.items():
            arguments, environment = config["engine_kwargs"], config["runtime_env"]["env_vars"]
            tp, stages = (arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
            bundles = config["placement_group_config"]["bundles"]
            assert len(bundles) == tp * stages
            assert environment["VLLM_RAY_BUNDLE_INDICES"] == ",".join(map(str, range(len(bundles))))
            devices = environment["HETIS_DEVICES"].split(",")
            for bundle, device in zip(bundles, devices, strict=True):
                assert (bundle["GPU"], bundle[f"hetis-{device.rpartition('/')[0]}"]) == (1, 0.001)
            layers = tuple(map(int, partition_of(environment).split(","))) if stages > 1 else (MODEL.num_layers,)
            assert (len(layers), sum(layers)) == (stages, MODEL.num_layers)
            found[key] = Read(layers, tuple(tuple(devices[i * tp : (i + 1) * tp]) for i in range(stages)), frozenset())
    return found
