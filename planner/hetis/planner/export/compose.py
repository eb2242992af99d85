"""A compose file for each node, with a service per process on the host's network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetis.engines.commands import Command
from hetis.engines.layout import ProcessKind
from hetis.engines.versions import Engine
from hetis.planner.export.replicas import Launchable, LaunchableReplica, NotExportableError, published_image
from hetis.planner.export.shell import not_reached
from hetis.planner.export.written import Written
from hetis.planner.export.yaml_files import yaml_text

_CONFIG, _KEY = "/etc/hetis/workers.yaml", "/run/secrets/worker-key"


def write_compose(launchable: Launchable) -> Written:
    """Return a folder for each node with its compose.yaml and the plugin's files.

    Raises:
        NotExportableError: an image is missing.
    """
    image = launchable.settings.image or published_image(launchable.engine)
    wrong = [] if image else ["--image is missing: vLLM with the plugin, as docker/vllm.Dockerfile makes it"]
    if launchable.has_workers and not launchable.settings.worker_image:
        wrong.append("--worker-image is missing: as docker/worker.Dockerfile makes it")
    if wrong:
        raise NotExportableError(tuple(wrong))
    files, shown = dict[str, str](), list[str]()
    for node, here in launchable.by_node().items():
        services, secret = dict[str, Any](), False
        for _, one in here:
            for command in one.commands:
                if command.process.node == node:
                    services[service_of(one, command)] = _service(launchable, one, command, image)
                    files |= {f"{node}/{path}": text for path, text in command.files.items()}
                    secret = secret or bool(command.secrets)
        whole: dict[str, Any] = {"name": launchable.settings.name, "services": services}
        if secret:
            whole["secrets"] = {"worker-key": {"file": "./worker.key"}}
        files[f"{node}/compose.yaml"] = yaml_text(whole)
        shown.append(f"{node}/compose.yaml")
    return Written(
        files=files,
        shown=tuple(shown),
        endpoints={number: one.endpoint for number, one in launchable.replicas.items()},
        start=_HOW,
        not_carried=tuple(not_reached(launchable)),
    )


def service_of(one: LaunchableReplica, command: Command) -> str:
    """Return the name of a process among services, which may contain no slash and no dot."""
    return f"{one.name}-{command.process.name}".replace("/", "-").replace(".", "-").replace("+", "-")


def _service(launchable: Launchable, one: LaunchableReplica, command: Command, image: str) -> dict[str, Any]:
    process, settings = command.process, launchable.settings
    is_worker = process.kind is ProcessKind.ATTENTION_WORKER
    places = {one.addresses.config_file: _CONFIG, one.addresses.key_file: _KEY}
    shown = [places.get(word, word) for word in command.shown]
    environment = {name: places.get(text, text) for name, text in command.environment.items()} | _gpus(process.gpus)
    volumes = [f"./{path}:{_CONFIG}:ro" for path in command.files]
    if one.serving.model.startswith("/") and not is_worker:
        volumes.append(f"{one.serving.model}:{one.serving.model}:ro")
    service: dict[str, Any] = {
        "image": settings.worker_image if is_worker else image,
        # Images have entry points of their own; these words are the whole command.
        "entrypoint": shown[:1],
        "command": shown[1:],
        "environment": environment,
        "network_mode": "host",
        "ipc": "host",
        "restart": "unless-stopped",
        "stop_grace_period": f"{command.stops_s:g}s",
        "labels": {"hetis.devices": ",".join(f"{process.node}/{gpu}" for gpu in process.gpus)},
        "deploy": {"resources": {"reservations": {"devices": [_reserved(process.gpus)]}}},
    }
    if volumes:
        service["volumes"] = volumes
    if command.secrets:
        service["secrets"] = ["worker-key"]
    if process.kind is ProcessKind.SERVER:
        test = ["CMD", "python3", "-c", f"import urllib.request as u; u.urlopen('http://{one.endpoint}/health')"]
        service["healthcheck"] = {"test": test, "interval": "10s", "timeout": "5s", "start_period": "30m"}
        if launchable.engine is not Engine.SGLANG:
            environment["VLLM_API_KEY"] = "${VLLM_API_KEY:-}"
    return service


def _reserved(gpus: tuple[int, ...]) -> Mapping[str, Any]:
    return {"driver": "nvidia", "device_ids": [str(gpu) for gpu in sorted(gpus)], "capabilities": ["gpu"]}


def _gpus(gpus: tuple[int, ...]) -> dict[str, str]:
    """Return the environment for the ranks' order among the GPUs that the container sees, which renumbers them."""
    seen = sorted(gpus)
    order = ",".join(str(seen.index(gpu)) for gpu in gpus)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": order}


_HOW = """Copy the folder of each node there: `docker compose up -d`. Containers use the host's network and the GPUs of
the plan by index (NVIDIA container toolkit). `VLLM_API_KEY` in the environment, or in `.env`, is what clients must say
(SGLang: give `-- --api-key KEY`). Where replicas have attention workers, `worker.key` beside the file is their key."""
