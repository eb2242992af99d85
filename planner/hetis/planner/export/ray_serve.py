"""Ray Serve: one application per replica, with its ranks in a placement group whose bundles name the plan's nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hetis.commands.endpoints import joined
from hetis.engines.serving import (
    connector_of,
    is_of_http_server,
    option_groups,
    room_options,
    shape_options,
    variables_of,
    without_kv_dtype,
)
from hetis.engines.versions import Engine
from hetis.formats.documents import yaml_text
from hetis.planner.export.replicas import PUSHED, Launchable, LaunchableReplica, Written, pairs_of
from hetis.solver.cluster import node_of
from hetis.solver.plan import Role

HEAD = "ray-head"  # stands for the node of Ray Serve in --node-address
# The accelerator types of Ray 2.60 (ray/util/accelerators) that occur in our catalogue.
_TYPES = ("H100", "H200", "H20", "B200", "B300", "A100", "L40S", "L4", "A10G", "T4", "V100", "P100")
_TINY = 0.001
_LONG_NAME = re.compile(r"--[a-z][a-z0-9_-]*")
_TEXT = re.compile(r"(revision|name|model|tokenizer|path|dir|token|key)$")  # a commit may be all digits
_SHORT_NUMBER = re.compile(r"\d+(\.\d+)?[kKmMgGtT]")  # which vLLM's command line alone spells out


def write_ray(launchable: Launchable) -> Written:
    """Return a config file of Ray Serve."""
    pairs = pairs_of(launchable)
    applications = [
        _application(launchable, number, pairs)
        for number, one in launchable.replicas.items()
        if one.plan.role is not Role.DECODE
    ]
    whole = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": launchable.settings.port},
        "applications": applications,
    }
    head = joined(launchable.settings.hosts.get(HEAD, HEAD), launchable.settings.port)
    fronts = {decode: prefill for prefill, decode in pairs.items()}
    nodes = dict.fromkeys(p.node for one in launchable.replicas.values() for p in one.layout.processes)
    resources = "\n".join(f"ray start --resources '{json.dumps({_resource(node): 1})}' ...  # {node}" for node in nodes)
    _, refused = engine_arguments(launchable.settings.engine_options)
    if program := launchable.settings.program:
        refused.insert(0, f"--program {program}: Ray Serve LLM starts the engine itself")
    return Written(
        files={"serve.yaml": yaml_text(whole)},
        shown=("serve.yaml",),
        endpoints={
            number: f"{head}/{launchable.replicas[fronts.get(number, number)].name}" for number in launchable.replicas
        },
        start=_HOW.format(resources=resources),
        not_carried=(*launchable.mixed_nodes("which of them a rank gets, Ray decides"), *refused),
    )


def llm_config(launchable: Launchable, one: LaunchableReplica) -> dict[str, Any]:
    """Return the fields of Ray's LLMConfig for a replica."""
    layout, settings = one.layout, launchable.settings
    options = shape_options(layout, executor="ray") | room_options(layout, one.serving)
    options.pop("--kv-transfer-config", None)
    options.pop("--distributed-executor-backend", None)  # Ray Serve LLM sets it
    arguments = {name[2:].replace("-", "_"): _value(name, text) for name, text in options.items()}
    arguments |= engine_arguments(settings.engine_options)[0]
    if connector := connector_of(layout):
        arguments["kv_transfer_config"] = connector
    devices = [device for stage in one.plan.stages for device in stage.devices]
    types = {_type_of(stage.gpu) for stage in one.plan.stages}
    bundles = [{"GPU": 1, "CPU": 1, _resource(node_of(device)): _TINY} for device in devices]
    config: dict[str, Any] = {
        "model_loading_config": {
            "model_id": settings.served_name or one.serving.model,
            "model_source": one.serving.model,
        },
        "engine_kwargs": arguments,
        "placement_group_config": {"bundles": bundles, "strategy": "PACK"},
        "deployment_config": {"num_replicas": 1, "max_ongoing_requests": layout.seats},
        "runtime_env": {
            "env_vars": {
                **variables_of(layout),
                "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, range(len(devices)))),
                "HETIS_DEVICES": ",".join(devices),
            }
        },
    }
    if len(types) == 1 and None not in types:
        config["accelerator_type"] = types.pop()
    return config


def engine_arguments(options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return verbatim options of vLLM as ``engine_kwargs``, and a sentence for each that cannot be one of them.

    Ray Serve LLM takes the fields of vLLM's AsyncEngineArgs and FrontendArgs by name, and refuses any other
    (`VLLMEngineConfig.from_llm_config`). It accepts those of the HTTP server, but has a server of its own.
    """
    arguments, refused = dict[str, Any](), list[str]()
    for words in option_groups(without_kv_dtype(options)):
        name, joint, value = words[0].partition("=")
        values = [value, *words[1:]] if joint else words[1:]
        field, what = name[2:].replace("-", "_"), " ".join((name, *values))
        if is_of_http_server(name):
            refused.append(f"{what}: Ray Serve LLM replaces vLLM's HTTP server")
        elif not _LONG_NAME.fullmatch(name) or len(values) > 1 or any(map(_SHORT_NUMBER.fullmatch, values)):
            refused.append(f"{what}: Ray does not read command lines, set engine_kwargs in serve.yaml")
        elif field.startswith("no_") and not values:
            arguments[field[3:]] = False
        else:
            arguments[field] = _value(name, "".join(values))
    return arguments, refused


def _application(launchable: Launchable, number: int, pairs: dict[int, int]) -> dict[str, Any]:
    one = launchable.replicas[number]
    config = llm_config(launchable, one)
    if one.plan.role is Role.PREFILL:
        decode = llm_config(launchable, launchable.replicas[pairs[number]])
        path: str = "ray.serve.llm:build_pd_openai_app"
        arguments: dict[str, Any] = {"prefill_config": config, "decode_config": decode}
    else:
        path, arguments = "ray.serve.llm:build_openai_app", {"llm_configs": [config]}
    return {"name": one.name, "route_prefix": f"/{one.name}", "import_path": path, "args": arguments}


def why_not_on_ray(launchable: Launchable, one: LaunchableReplica) -> tuple[str, ...]:
    """Return why vLLM on Ray cannot run a replica: attention workers, or an order of stages that addresses do not give.

    vLLM numbers Ray's workers node by node: the front end's node first, then nodes with fewer workers, then by address.
    """
    if launchable.engine is Engine.SGLANG:
        return ("Ray Serve LLM only runs vLLM: the engine is sglang",)
    if one.layout.workers:
        return ("Ray Serve cannot start attention workers",)
    if one.layout.data_parallel > 1:
        return ("Ray Serve LLM deploys copies that share experts differently",)
    if one.layout.pushes_kv:
        return (f"{PUSHED}, and Ray Serve LLM only sets up the one by which decode replicas read it",)
    nodes = [node_of(device) for stage in one.plan.stages for device in stage.devices]
    first, *further = dict.fromkeys(nodes)
    if nodes != [node for each in (first, *further) for node in nodes if node == each]:
        return ("stages of a node are not next to each other: vLLM counts Ray's workers node by node",)
    unknown = [node for node in further if node not in launchable.settings.hosts]
    if len(further) > 1 and unknown:
        lack = "has" if len(unknown) == 1 else "have"
        return (f"vLLM orders Ray's workers by address, and {', '.join(unknown)} {lack} none: give --node-address",)
    order = sorted(further, key=lambda node: (nodes.count(node), launchable.settings.hosts.get(node, "")))
    if order != further:
        return (f"vLLM orders Ray's workers by node and address: stages would be on {', '.join((first, *order))}",)
    return ()


def _resource(node: str) -> str:
    """Return the custom Ray resource of a node, by which bundles name it."""
    return f"hetis-{node}"


def _type_of(gpu: str) -> str | None:
    words = gpu.replace("_", "-").split("-")
    return next((kind for kind in _TYPES if kind in words), None)


def _value(name: str, text: str) -> Any:
    """Return the value of a command-line option as a Python argument of the engine."""
    if not text:
        return True  # a flag without a value
    if _TEXT.search(name):
        return text
    try:
        return json.loads(text)  # a number, or the fields of a configuration
    except ValueError:
        return text


_HOW = """Nodes of the Ray cluster say which node of the plan they are by a resource of our own:

```
{resources}
```

Then `serve deploy serve.yaml`. Each replica is an application of its own, at its own route (`/r0/v1/chat/completions`);
Ray chooses which of a node's GPUs it gets."""
