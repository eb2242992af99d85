"""Nodes as ``kubectl get nodes,pods,resourceslices,resourceclaims -A -o json`` prints them, in one file or several.

A node's GPUs are those of its ResourceSlices (DRA) if it has any, and otherwise its extended resources, whose product
and memory are labels: GPU feature discovery's or AMD's node labeller's, GKE's accelerator, or an AWS instance type.
Labels describe one type per node, so a node with two types needs ResourceSlices to be described correctly.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hetis.formats.discovery.found import (
    PARTS,
    FoundGpus,
    FoundNode,
    Inventory,
    counted,
    grouped,
    inventory,
    some_of,
    text,
    whole_number,
    zone_of,
)
from hetis.formats.discovery.labels import bytes_of, partition_of, product_of
from hetis.formats.errors import Problem, single_problem
from hetis.formats.fields import listed, mapping
from hetis.formats.positions import Text

_WHOLE_PARTITION = "amd.com/spx_nps1"  # what AMD's device plugin calls whole GPUs beside parts of others
_RESOURCES = (
    *("nvidia.com/gpu", "amd.com/gpu", _WHOLE_PARTITION, "gpu.intel.com/xe", "gpu.intel.com/i915"),
    *("habana.ai/gaudi", "google.com/tpu", "huawei.com/Ascend910", "huawei.com/ascend-1980", "huawei.com/npu"),
)
# What NVIDIA's device plugin advertises instead of GPUs that pods share, if `renameByDefault` is set (docs.nvidia.com,
# "Time-Slicing GPUs in Kubernetes"): as many as GPUs times replicas.
_NVIDIA, _SHARED, _MIG = "nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-"
# Resources of accelerators whose cards are not read, and of parts of cards.
_OTHERS = re.compile(
    r"(?:nvidia|amd|huawei|metax-tech|cambricon|kunlunxin|iluvatar|enflame|hygon|furiosa)\.(?:com|ai)/.*"
    r"|.*/v?(?:gpu|npu|mlu|xpu|dcu|neuron|qgpu)(?:-\w+)?"
)
_DRIVERS = {"gpu.nvidia.com": "nvidia.com/gpu", "gpu.amd.com": "amd.com/gpu", "gpu.intel.com": "gpu.intel.com/xe"}
_DRIVERS |= {"gaudi.intel.com": "habana.ai/gaudi", "tpu.google.com": "google.com/tpu"}
_WHOLE = ("gpu", "amdgpu")  # types of devices (github.com/ROCm/k8s-gpu-dra-driver, docs/driver-attributes.md)
_ZONES = ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone")
_LEAVING = {
    "ToBeDeletedByClusterAutoscaler": "the autoscaler removes it",
    "karpenter.sh/disrupted": "Karpenter removes it",
    "node.kubernetes.io/out-of-service": "out of service",
}
_OF_CONDITIONS = "node.kubernetes.io/"  # taints that follow from conditions and cordons
# GKE's labels of nodes whose GPUs are MIG slices, and of those whose GPUs or slices so many pods share
# (docs.cloud.google.com/kubernetes-engine, "GPU sharing strategies"): both are advertised as GPUs.
_GKE_PART = "cloud.google.com/gke-gpu-partition-size"
_GKE_SHARES = "cloud.google.com/gke-max-shared-clients-per-gpu"
# Where HAMi registers the GPUs that it shares among pods; the node then advertises as many as pods may share.
_HAMI = ("hami.io/node-nvidia-register", "4pd.io/node-nvidia-register")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    """An object of the API and its place in the file."""

    data: dict[str, Any]
    source: Text
    path: tuple[str | int, ...]

    @property
    def name(self) -> str:
        return text(mapping(self.data.get("metadata")).get("name"))

    @property
    def labels(self) -> dict[str, Any]:
        return mapping(mapping(self.data.get("metadata")).get("labels"))

    def part(self, name: str) -> dict[str, Any]:
        """Return ``spec`` or ``status``."""
        return mapping(self.data.get(name))


_Use = Mapping[str, Counter[str]]
"""The GPUs of a node in use, by resource and by the pod that has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Device:
    """A device of a ResourceSlice. ``reason`` is why it is left out; ``part`` the profile of a MIG slice."""

    product: str
    memory_bytes: int | None
    resource: str
    reason: str = ""
    part: str = ""


def read_kubernetes(files: Sequence[tuple[Any, Text]], *, with_busy: bool = False) -> Inventory:
    """Return the nodes that the objects of all files describe. With ``with_busy``, GPUs in use count as free. Raises
    DocumentError if there are no nodes, or counts are not numbers.
    """
    by_kind: dict[str, list[_Object]] = {}
    for data, source in files:
        for one in _objects(data, source):
            by_kind.setdefault(text(one.data.get("kind"))[:40], []).append(one)
    nodes, slices = by_kind.get("Node", []), by_kind.get("ResourceSlice", [])
    if not nodes and not slices:
        why = f"has no Node and no ResourceSlice, but {', '.join(by_kind) or 'no object with a kind'}"
        raise single_problem(files[0][1].file, f"{why}: kubectl get nodes -o json")
    problems: list[Problem] = []
    use = {} if with_busy else _use_by_node(by_kind.get("Pod", []), problems)
    claimed = set() if with_busy else set(_claimed(by_kind.get("ResourceClaim", [])))
    devices = _devices_by_node(slices, claimed)
    known = {node.name for node in nodes}
    found = [_found(node, devices.get(node.name, []), use.get(node.name, {}), problems) for node in nodes]
    for one in slices:  # nodes known only from their slices
        name = text(one.part("spec").get("nodeName"))
        if name and name not in known:
            known.add(name)
            node = _Object(data={"metadata": {"name": name}}, source=one.source, path=one.path)
            found.append(_found(node, devices[name], use.get(name, {}), problems))
    notes = [] if "Pod" in by_kind or with_busy else ["no pods were given, so GPUs used by pods count as free"]
    return inventory(found, problems, notes)


def is_list(data: Any) -> bool:
    """Return whether these are objects in a list that has lost its own kind, as jq writes it."""
    items = listed(mapping(data).get("items"))
    return bool(items) and "kind" not in data and all(mapping(one).get("kind") for one in items)


def _objects(data: Any, source: Text) -> Iterator[_Object]:
    """Yield the objects of a list, which may omit their kind if the list has it, or the one object of a file."""
    kind = text(mapping(data).get("kind"))
    if (kind.endswith("List") or is_list(data)) and isinstance(data.get("items"), list):
        for i, item in enumerate(data["items"]):
            if isinstance(item, dict):
                yield _Object(data={"kind": kind.removesuffix("List"), **item}, source=source, path=("items", i))
    elif kind:
        yield _Object(data=data, source=source, path=())


def _use_by_node(pods: Iterable[_Object], problems: list[Problem]) -> Mapping[str, _Use]:
    found = defaultdict[str, dict[str, Counter[str]]](lambda: defaultdict(Counter))
    for pod in pods:
        node = text(pod.part("spec").get("nodeName"))
        if not node or pod.part("status").get("phase") in ("Succeeded", "Failed"):
            continue
        name = f"{text(mapping(pod.data.get('metadata')).get('namespace')) or 'default'}/{pod.name}"
        for resource, count in _requested(pod, problems).items():
            found[node][resource][name] += count
    return found


def _requested(pod: _Object, problems: list[Problem]) -> dict[str, int]:
    """Return the GPUs of a pod: the sum over its containers, or the maximum over its init containers if larger.

    Shared GPUs count as `_NVIDIA`.
    """

    def each(group: str, resource: str) -> Iterator[int]:
        for i, container in enumerate(listed(pod.part("spec").get(group))):
            if resources := mapping(mapping(container).get("resources")):
                value = mapping(resources.get("limits")).get(resource, mapping(resources.get("requests")).get(resource))
                path = (*pod.path, "spec", group, i, "resources", "limits", resource)
                yield whole_number(value, path, pod.source, problems)

    requests = (mapping(mapping(one).get("resources")) for one in listed(pod.part("spec").get("containers")))
    slices = {name for one in requests for name in mapping(one.get("limits")) if name.startswith(_MIG)}
    names = (*_RESOURCES, _SHARED, *sorted(slices))
    most = {r: max(sum(each("containers", r)), max(each("initContainers", r), default=0)) for r in names}
    most[_NVIDIA] += most.pop(_SHARED)
    return {resource: count for resource, count in most.items() if count}


def _claimed(claims: Iterable[_Object]) -> Iterator[tuple[str, str, str]]:
    """Yield driver, pool and device of everything that is allocated to a claim."""
    for claim in claims:
        allocation = mapping(claim.part("status").get("allocation"))
        for result in listed(mapping(allocation.get("devices")).get("results")):
            one = mapping(result)
            if not one.get("adminAccess"):  # monitoring access, which is not exclusive
                yield text(one.get("driver")), text(one.get("pool")), text(one.get("device"))


def _devices_by_node(slices: Sequence[_Object], claimed: set[tuple[str, str, str]]) -> dict[str, list[_Device]]:
    """Return the devices of every node's newest slices: a pool with a higher generation replaces earlier ones."""
    newest: dict[tuple[str, str], int] = {}
    for one in slices:
        key, generation = _pool(one)
        newest[key] = max(newest.get(key, 0), generation)
    found: dict[str, list[_Device]] = {}
    for one in slices:
        spec, (key, generation) = one.part("spec"), _pool(one)
        node, driver = text(spec.get("nodeName")), text(spec.get("driver"))
        if not node or driver not in _DRIVERS or generation < newest[key]:
            continue
        found.setdefault(node, [])
        for device in map(mapping, listed(spec.get("devices"))):
            name = text(device.get("name"))
            body = mapping(device.get("basic")) or device  # v1beta1 has one more level
            found[node].append(_device(driver, body, (driver, key[1], name) in claimed))
    return found


def _pool(one: _Object) -> tuple[tuple[str, str], int]:
    spec = one.part("spec")
    pool = mapping(spec.get("pool"))
    generation = pool.get("generation", 0)
    return (text(spec.get("driver")), text(pool.get("name"))), generation if isinstance(generation, int) else 0


def _device(driver: str, body: Mapping[str, Any], is_claimed: bool) -> _Device:
    attributes = {name.rpartition("/")[2]: mapping(value) for name, value in mapping(body.get("attributes")).items()}
    words = {name: text(value.get("string")) for name, value in attributes.items()}
    # NVIDIA's and AMD's name the product, Intel's the model, and Google's the generation.
    generation = words.get("tpuGen")
    product = words.get("productName") or words.get("model") or (f"TPU {generation}" if generation else driver)
    kind = words.get("type") or _WHOLE[0]
    capacity = {name.rpartition("/")[2]: value for name, value in mapping(body.get("capacity")).items()}
    memory = capacity.get("memory")
    size = memory.get("value") if isinstance(memory, dict) else memory
    # Devices that consume counters are parts that might be made, beside the whole GPU.
    part = "" if kind != "mig" or body.get("consumesCounters") else words.get("profile", "")
    reason = "in use by a resource claim" if is_claimed else ""
    if kind not in _WHOLE and not part:
        reason = PARTS
    elif any(mapping(taint).get("effect") in ("NoSchedule", "NoExecute") for taint in listed(body.get("taints"))):
        reason = "tainted by the driver"
    elif attributes.get("healthy", {}).get("bool") is False:
        reason = "unhealthy"
    return _Device(product=product, memory_bytes=bytes_of(size), resource=_DRIVERS[driver], reason=reason, part=part)


def _found(node: _Object, devices: list[_Device], use: _Use, problems: list[Problem]) -> FoundNode:
    where = node.source.problem(node.path, "")
    if not node.name:
        problems.append(node.source.problem((*node.path, "metadata", "name"), "is missing: every node needs a name"))
    zone = zone_of(node.labels, _ZONES)
    gpus, left_out = _of_devices(devices, use) if devices else _of_resources(node, use, problems)
    unusable = _unusable(node)
    if unusable and gpus:
        count = sum(one.count for one in gpus)
        gpus, left_out = [], [*left_out, f"{counted(count)} ({some_of(one.product for one in gpus)}): {unusable}"]
    return FoundNode(name=node.name, zone=zone, gpus=tuple(gpus), left_out=tuple(left_out), where=where)


def _unusable(node: _Object) -> str:
    """Return why nothing may run on a node, or an empty string if it may."""
    spec, taints = node.part("spec"), [mapping(taint) for taint in listed(node.part("spec").get("taints"))]
    reasons = []
    if mapping(node.data.get("metadata")).get("deletionTimestamp"):
        reasons.append("is being deleted")
    if spec.get("unschedulable") is True:
        reasons.append("cordoned")
    for condition in map(mapping, listed(node.part("status").get("conditions"))):
        if condition.get("type") == "Ready" and condition.get("status") != "True":
            reasons.append(f"not ready ({text(condition.get('reason'))[:80] or condition.get('status')})")
    reasons += [why for key, why in _LEAVING.items() if any(taint.get("key") == key for taint in taints)]
    return ", ".join([*reasons, *_not_tolerated(taints)])


def _not_tolerated(taints: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the taints that exported pods do not tolerate, apart from those whose cause is a reason of its own."""
    for taint in taints:
        key, effect = text(taint.get("key")), text(taint.get("effect"))
        is_known = key in (*_RESOURCES, *_LEAVING) or key.startswith(_OF_CONDITIONS)
        if effect in ("NoSchedule", "NoExecute") and not is_known:
            value = f"={text(taint.get('value'))}" if taint.get("value") else ""
            yield f"tainted {key[:80]}{value[:80]}:{effect}"


def _of_devices(devices: Sequence[_Device], use: _Use) -> tuple[list[FoundGpus], list[str]]:
    left_out = []
    for reason in dict.fromkeys(device.reason for device in devices if device.reason):
        alike = [device for device in devices if device.reason == reason]
        what = counted(len(alike), "device" if reason == PARTS else "GPU")
        left_out.append(f"{what} ({some_of(device.product for device in alike)}): {reason}")
    free = [device for device in devices if not device.reason]
    for resource, pods in use.items():
        taken = [i for i, device in enumerate(free) if device.resource == resource][: pods.total()]
        if taken:
            left_out.append(f"{counted(len(taken))}: in use by {some_of(pods)}")
            free = [device for i, device in enumerate(free) if i not in taken]
    whole = grouped((device.product, device.memory_bytes, 0) for device in free if not device.part)
    parts = Counter((device.product, device.part) for device in free if device.part)
    return [*whole, *(FoundGpus(product=of, count=n, part=part) for (of, part), n in parts.items())], left_out


def _of_resources(node: _Object, use: _Use, problems: list[Problem]) -> tuple[list[FoundGpus], list[str]]:
    gpus, left_out = list[FoundGpus](), list[str]()
    for resource in _RESOURCES:
        found, out = _of_resource(node, resource, use, problems)
        gpus += found
        left_out += out
    for resource in mapping(node.part("status").get("capacity")):
        if resource.startswith(_MIG):
            count, busy = _number(node, "allocatable", resource, problems), use.get(resource, Counter[str]()).total()
            product, _ = product_of(node.labels, _NVIDIA)
            if busy and count:
                left_out.append(
                    f"{counted(min(busy, count), 'slice')} ({resource}): in use by {some_of(use[resource])}"
                )
            if count > busy:
                part = resource.removeprefix(_MIG)
                gpus.append(FoundGpus(product=product, count=count - busy, part=part, resource=resource))
        elif _OTHERS.fullmatch(resource) and resource not in (*_RESOURCES, _SHARED) and not (gpus or left_out):
            left_out.append(f"{resource}: a resource that is not read; a table of node,gpu,count adds such nodes")
    return gpus, left_out


def _number(node: _Object, of: str, name: str, problems: list[Problem]) -> int:
    value = mapping(node.part("status").get(of)).get(name)
    return whole_number(value, (*node.path, "status", of, name), node.source, problems)


def _of_resource(node: _Object, resource: str, use: _Use, problems: list[Problem]) -> tuple[list[FoundGpus], list[str]]:
    # After the plugin has renamed a resource, the node may keep the old name for a while.
    renamed = resource == _NVIDIA and _number(node, "capacity", _SHARED, problems) > 0
    advertised = _SHARED if renamed else resource
    capacity = _number(node, "capacity", advertised, problems)
    usable = min(capacity, _number(node, "allocatable", advertised, problems))
    if not capacity:
        return [], []
    product, memory = product_of(node.labels, resource)
    registered = _registered(node) if resource == _NVIDIA else ()
    if product == resource:  # without labels
        product = next(filter(None, registered), product)
    if modes := partition_of(node.labels):
        return [], [f"{counted(capacity, 'device')} ({product}): parts of GPUs ({modes}), not whole GPUs"]
    product, _, part = product.partition("-MIG-")
    part = part or text(node.labels.get(_GKE_PART))
    labelled, shares = _label(node, "count", problems), max(1, _label(node, "replicas", problems))
    if (of_gke := _of_label(node, _GKE_SHARES, problems)) > 1:
        labelled, shares = capacity // of_gke, of_gke
    if registered:
        labelled = labelled or len(registered)
        shares = max(shares, capacity // labelled)
    left_out = []
    if renamed or shares > 1:  # several pods take turns on a GPU, and the node counts turns
        if not labelled or capacity > labelled * shares:
            times = f" {shares} times" if shares > 1 else ""
            why = f"shared{times}, and its labels do not say how many GPUs there are"
            return [], [f"{counted(capacity)} ({product}): {why}"]
        capacity, usable = labelled, -(-usable // shares)
    elif resource == "nvidia.com/gpu" and labelled and capacity > labelled:
        why = f"its labels speak of {labelled}, which mixed types do: give its ResourceSlices or nvidia-smi -q -x"
        return [], [f"{counted(capacity)} ({product}): {why}"]
    if usable < capacity:
        left_out.append(f"{counted(capacity - usable)} ({product}): not allocatable, which unhealthy ones are")
    pods = use.get(resource, Counter[str]())
    busy = min(usable, pods.total())
    if busy:
        left_out.append(f"{counted(busy)} ({product}): in use by {some_of(pods)}")
    if usable == busy:
        return [], left_out
    own_name = _SHARED if renamed else resource if resource == _WHOLE_PARTITION else ""
    memory = None if part else memory
    one = FoundGpus(product=product, count=usable - busy, memory_bytes=memory, resource=own_name, part=part)
    return [one], left_out


def _registered(node: _Object) -> Sequence[str]:
    """Return the products of the GPUs that HAMi shares on a node, as far as it names them; nothing: it shares none."""
    notes = mapping(mapping(node.data.get("metadata")).get("annotations"))
    for name in _HAMI:
        try:
            found = [text(mapping(one).get("type")) for one in listed(json.loads(text(notes.get(name)) or "[]"))]
        except (ValueError, RecursionError):  # earlier versions join them with colons
            found = ["".join(one.split(",")[4:5]) for one in text(notes.get(name)).split(":") if "," in one]
        if found:
            return [product.removeprefix("NVIDIA-") for product in found]
    return ()


def _label(node: _Object, name: str, problems: list[Problem]) -> int:
    return _of_label(node, f"nvidia.com/gpu.{name}", problems)


def _of_label(node: _Object, label: str, problems: list[Problem]) -> int:
    value = node.labels.get(label)
    return whole_number(value, (*node.path, "metadata", "labels", label), node.source, problems)
