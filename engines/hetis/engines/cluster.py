"""The settings of a replica's objects in a cluster, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

IMAGE, WORKER_IMAGE = "vLLM with the plugin, as docker/vllm.Dockerfile makes it", "as docker/worker.Dockerfile makes it"
HF_TOKEN = "HF_TOKEN"  # the variable in which engines look for it, and the usual key of a Secret
_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")  # of a Secret
CONFIG_FOLDER, CONFIG_FILE, KEY_FILE = "/etc/hetis", "workers.yaml", "/tmp/hetis-worker.key"
_OWN_MOUNTS = (CONFIG_FOLDER, "/tmp", "/dev/shm")
LONGEST_OBJECT_NAME = 253  # maximum length of an object name in Kubernetes
OBJECT = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # pod names are longer than this and must fit into 63 characters


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """The user's settings of objects in a cluster, under the names of their options."""

    namespace: str = ""
    # A PersistentVolumeClaim with the models, mounted read-only at the parent of the model's path. Empty: the image has
    # the model, or the engine locates it.
    model_claim: str = ""
    api_key_secret: str = ""  # a Secret whose ``api-key`` clients must present
    # A Secret with the token by which the engine downloads models, as ``NAME`` or ``NAME:KEY``; its key is HF_TOKEN
    hf_token_secret: str = ""
    worker_key_secret: str = ""  # a Secret whose ``worker-key`` vLLM and its attention workers share
    # Where engines keep the models that they download: a PersistentVolumeClaim, or a folder of the nodes if it begins
    # with a slash. Empty: they download to the pod's own disk at every start
    model_cache: str = ""
    insecure: bool = False  # no key is required; exactly one of this and ``api_key_secret`` must be set


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment(ClusterSettings):
    """Settings of the deployment of a replica that are not in the plan."""

    name: str  # name of the replica, and prefix of the names of its objects
    image: str  # image of the engine; has the plugin if there are attention workers
    worker_image: str  # an image with `hetis[worker]`
    # Names of the replicas that exchange KV with this one. None: unknown; any hetis replica in the namespace may.
    kv_partners: tuple[str, ...] | None = None
    copies: int = 1  # pods of the replica, if it is a single one
    nodes: tuple[str, ...] = ()  # nodes of these pods; empty: each process is on its own
    product: str = ""  # GPU type of the nodes of these pods, as `PRODUCT_LABEL` names it; empty: they are on ``nodes``
    part_of: str = ""  # name of what the replica belongs to, in the label of its pods; empty: none
    model_bytes: float = 0.0  # what an engine without a cache downloads; 0: unknown

    def wrong(self, model: str, *, has_workers: bool) -> list[str]:
        """Return what is wrong with these settings, in terms of the command-line options.

        ``model`` is the path of the model in the pod, or its name, the value of ``--model``.
        """
        wrong = []
        if not _NAME.fullmatch(self.name):
            wrong.append(
                f"--name is {self.name!r}, must be 1 to 40 lower-case letters, digits and -, starting with a letter"
            )
        if self.namespace and not NAMESPACE.fullmatch(self.namespace):
            wrong.append(f"--namespace is {self.namespace!r}, must be 1 to 63 lower-case letters, digits and -")
        if not self.image:
            wrong.append(f"--image is missing: {IMAGE if has_workers else 'of the engine'}")
        if has_workers and not self.worker_image:
            wrong.append(f"--worker-image is missing: {WORKER_IMAGE}")
        if has_workers and not self.worker_key_secret:
            wrong.append("--worker-key-secret is missing: the key of vLLM and its workers")
        path = PurePosixPath(model)
        if self.model_claim and (not path.is_absolute() or len(path.parts) < 3):
            wrong.append(f"--model is {model!r}, must be like /models/NAME")
        elif self.model_claim and str(path.parent) in _OWN_MOUNTS:
            wrong.append(f"--model is {model!r}: {path.parent} is mounted by pods for their own files")
        objects = {"--api-key-secret": self.api_key_secret, "--worker-key-secret": self.worker_key_secret}
        wrong += wrong_objects({**objects, "--model-claim": self.model_claim})
        wrong += wrong_cache("--model-cache", self.model_cache)
        wrong += wrong_token("--hf-token-secret", self.hf_token_secret)
        if self.api_key_secret and self.insecure:
            wrong.append("--api-key-secret and --insecure contradict each other: give one of them")
        elif not self.api_key_secret and not self.insecure:
            wrong.append("give --api-key-secret, or --insecure to serve without a key")
        return wrong


def wrong_objects(names: Mapping[str, str]) -> Iterator[str]:
    """Yield an error for every name, by option, that no object in Kubernetes can have; an empty one is not given."""
    for option, name in names.items():
        if name and not (len(name) <= LONGEST_OBJECT_NAME and OBJECT.fullmatch(name)):
            yield f"{option} is {name!r}, must be the name of an object: lower-case letters, digits, - and ."


def wrong_cache(option: str, given: str) -> Iterator[str]:
    """Yield the errors in the name of a claim, or the path of a folder."""
    if not given.startswith("/"):
        yield from wrong_objects({option: given})
    elif ".." in PurePosixPath(given).parts or len(PurePosixPath(given).parts) < 2:
        yield f"{option} is {given!r}, must be the path of a folder"


def wrong_token(option: str, given: str) -> Iterator[str]:
    """Yield the errors in ``SECRET`` or ``SECRET:KEY``; empty: none is given."""
    name, key = secret_and_key(given)
    yield from wrong_objects({option: name})
    if given and not (name and _KEY.fullmatch(key)):
        yield f"{option} is {given!r}, must be SECRET or SECRET:KEY, with letters, digits, -, _ and . in KEY"


def secret_and_key(given: str) -> tuple[str, str]:
    name, colon, key = given.partition(":")
    return name, key if colon else HF_TOKEN
