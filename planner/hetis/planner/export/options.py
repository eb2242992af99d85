"""What is wrong with the options of an export."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator

from hetis.commands.endpoints import is_host
from hetis.engines.cluster import NAMESPACE, wrong_cache, wrong_objects, wrong_token
from hetis.engines.gpus import VENDORS
from hetis.engines.kubernetes import FRONT_PORT
from hetis.engines.kv_room import DTYPE_BYTES
from hetis.engines.planned import unknown_nodes
from hetis.engines.serving import decided_in, names_of
from hetis.engines.versions import Engine
from hetis.planner.export import IN_KUBERNETES, ExportTarget
from hetis.planner.export.ray_serve import HEAD
from hetis.planner.export.replicas import images_in
from hetis.planner.export.settings import ExportSettings
from hetis.solver.plan import Plan

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?")
_MAX_PORT = 60_000  # below the ephemeral ports of operating systems


def _wrong_images(text: str) -> Iterator[str]:
    """Yield the errors in ``IMAGE,AMD=IMAGE`` (`images_in`)."""
    images = images_in(text)
    if not all(image for _, image in images):
        yield "an image name is empty"
    if any(re.search(r"\s", image) for _, image in images):
        yield "an image name has spaces"
    for vendor, times in Counter(vendor for vendor, image in images if image).items():
        if vendor not in VENDORS:
            yield f"{vendor} is not a supported vendor, must be {' or '.join(VENDORS)}"
        if times > 1:
            yield f"{times} images for {vendor}"


MODEL = "a name or a folder"


def wrong_name(text: str, where: str, must_be: str) -> Iterator[str]:
    """Yield an error if engines would not take a text as what it ``must_be``, such as a model's name."""
    if text != text.strip() or text.startswith("-") or not text.isprintable():
        yield f"{where} is {text!r}, must be {must_be}"


def wrong_settings(
    given: ExportSettings, target: ExportTarget, allowed: tuple[Engine, ...], spelled: Callable[[str], str]
) -> Iterator[str]:
    yield from wrong_name(given.model, spelled("model"), MODEL)
    yield from wrong_name(given.served_name, spelled("served_name"), "a name")
    for node, host in given.hosts.items() if target not in IN_KUBERNETES else ():
        if not (node and is_host(host)):
            text = f"{node}={host}" if node else host  # as on the command line
            yield f"{spelled('node_address')} is {text!r}, must be NODE=HOST, such as gpu2=10.0.0.2"
    for option in sorted(decided_in(given.engine_options)):
        why = "it could override the plan, give its options on the command line" if option == "--config" else ""
        yield f"{option} cannot be passed to the engine: {why or 'the plan sets it'}"
    if given.engine_options and not given.engine_options[0].startswith("-"):
        yield f"{given.engine_options[0]!r} is not an engine option, options begin with -"
    if given.engine is not None and given.engine not in allowed:
        runs = " or ".join(one.value for one in allowed)
        yield f"{spelled('engine')} is {given.engine}: {spelled('to')} {target.value} runs {runs}"
    for option, text in (("image", given.image), ("worker_image", given.worker_image)):
        yield from (f"{spelled(option)} is {text!r}: {why}" for why in _wrong_images(text))
    if given.dtype not in DTYPE_BYTES:
        yield f"{spelled('dtype')} is {given.dtype!r}, must be one of {', '.join(DTYPE_BYTES)}"
    if not _NAME.fullmatch(given.name):
        yield (
            f"{spelled('name')} is {given.name!r}, must be 1 to 30 lower-case letters, digits and -, starting with "
            "a letter"
        )
    if given.namespace and not NAMESPACE.fullmatch(given.namespace):
        yield f"{spelled('namespace')} is {given.namespace!r}, must be 1 to 63 lower-case letters, digits and -"
    if not 1 <= given.port <= _MAX_PORT:
        yield f"{spelled('port')} is {given.port}, must be from 1 to {_MAX_PORT}"
    if given.device == "cpu" and target not in (ExportTarget.VLLM, ExportTarget.HETIS_LAUNCH):
        yield f"{spelled('device')} is cpu: {spelled('to')} {target.value} is for GPUs"
    yield from (_wrong_in_kubernetes if target in IN_KUBERNETES else _only_in_kubernetes)(given, target, spelled)
    for option, text in (("program", given.program), ("sbatch", given.sbatch)):
        try:
            words = shlex.split(text)
        except ValueError as error:
            yield f"{spelled(option)} is {text!r}: {error}"
        else:
            if option == "sbatch" and not all(word.startswith("--") and "\n" not in word for word in words):
                yield f"{spelled(option)} is {text!r}, must be options such as --partition=gpu"
    if given.sbatch and target is not ExportTarget.SLURM:
        yield f"{spelled('sbatch')}: {spelled('to')} {target.value} makes no jobs"


def _wrong_in_kubernetes(given: ExportSettings, target: ExportTarget, spelled: Callable[[str], str]) -> Iterator[str]:
    """Yield an error for every option without an effect in Kubernetes, and for every impossible name of an object."""
    if given.port != FRONT_PORT:
        yield f"{spelled('port')} is {given.port}: {spelled('to')} {target.value} serves at port {FRONT_PORT}"
    if given.hosts:
        yield f"{spelled('node_address')}: {spelled('to')} {target.value} takes none, pods have addresses of their own"
    objects = {name: getattr(given, name) for name in ("api_key_secret", "worker_key_secret", "model_claim")}
    yield from wrong_objects({spelled(option): name for option, name in objects.items()})
    yield from wrong_token(spelled("hf_token_secret"), given.hf_token_secret)
    yield from wrong_cache(spelled("model_cache"), given.model_cache)


def _only_in_kubernetes(given: ExportSettings, target: ExportTarget, spelled: Callable[[str], str]) -> Iterator[str]:
    """Yield an error for every option of pods or containers, with what processes read instead of a Secret."""
    environment = "docker compose or in .env" if target is ExportTarget.COMPOSE else "its processes"
    key, token = (f"set {name} in the environment of {environment}" for name in ("VLLM_API_KEY", "HF_TOKEN"))
    worker_key = "put the key into worker.key beside its files"
    if target in (ExportTarget.SGLANG, ExportTarget.RAY):
        worker_key = "it starts no attention workers"
    if ExportTarget.SGLANG is target or given.engine == "sglang":
        key = "give the engine --api-key after --"
    elif target is ExportTarget.RAY:
        key = "it asks for no key"
    instead_of = {"api_key_secret": key, "hf_token_secret": token, "worker_key_secret": worker_key}
    for option, instead in instead_of.items():
        if getattr(given, option):
            yield f"{spelled(option)}: {spelled('to')} {target.value} reads no Secrets of Kubernetes, {instead}"
    lacks = {"namespace": "pods", "model_claim": "pods"}
    if target is ExportTarget.COMPOSE and given.model_cache and not given.model_cache.startswith("/"):
        yield f"{spelled('model_cache')} is {given.model_cache}: {spelled('to')} compose takes the path of a folder"
    if target is not ExportTarget.COMPOSE:
        lacks |= {"model_cache": "containers", "image": "containers", "worker_image": "containers"}
    for option, what in lacks.items():
        if value := getattr(given, option):
            yield f"{spelled(option)} is {value}: {spelled('to')} {target.value} has no {what}"


def unknown_addresses(
    given: ExportSettings, target: ExportTarget, plan: Plan, spelled: Callable[[str], str]
) -> Iterator[str]:
    """Yield an error for every node with an address that the plan and its fleet do not have: it is misspelt."""
    named = [node for node in given.hosts if node and target not in IN_KUBERNETES]
    further = (HEAD,) if target is ExportTarget.RAY else ()
    yield from (f"{spelled('node_address')}: {what}" for what in unknown_nodes(named, plan, further))


def unguarded(target: ExportTarget, settings: ExportSettings) -> str:
    """Return how engines come to ask clients for a key, if neither the export nor an option makes them; empty: they do.

    In Kubernetes, one of a Secret and ``insecure`` must be given.
    """
    if target is ExportTarget.DYNAMO:
        return "Dynamo's front end asks clients for no key"
    if "--api-key" in names_of(settings.engine_options):
        return ""
    if target in IN_KUBERNETES:
        return "anyone in the cluster can send requests: --insecure" if settings.insecure else ""
    if target is ExportTarget.RAY:
        return "Ray Serve asks clients for no key: put what does in front of it"
    if target is ExportTarget.SGLANG or settings.engine == "sglang":
        return "engines ask clients for no key: give -- --api-key KEY"
    return "engines ask clients for a key only if VLLM_API_KEY is set where they start"
