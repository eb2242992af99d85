"""Exports for fleets of several vendors, and for GPUs whose engines would choose different attention backends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import compose_spec
import jsonschema
import pytest
import yaml

from hetis.engines.versions import Engine
from hetis.formats.errors import DocumentError
from hetis.planner.export import ExportTarget
from hetis.planner.export.replicas import NotExportableError
from hetis.planner.export.targets import export_wanted
from hetis.solver.plan import KvRoute, Plan, Role
from tests.engines.plans import POOL, stage_of
from tests.planner.export import reading, schemas
from tests.planner.export.exporting import SETTINGS, exported
from tests.planner.export.plans import apart, made_of, on, replica
from tests.planner.export.test_schemas import check_object

TWO_VENDORS = made_of(replica(on("a/1", "a/0", tp=2, gpu="MI300X-192GB")), replica(on("b/0", gpu="H100-SXM-80GB")))
AMD_WORKERS = made_of(replica(stage_of(), attention_workers=(replace(POOL, gpu="MI210-64GB"),)))


@pytest.mark.parametrize(
    ("prefill", "decode", "vllm", "sglang"),
    [
        ("T4", "L4", ["TRITON_ATTN"] * 2, []),
        ("H100-SXM-80GB", "B200-SXM-180GB", ["FLASH_ATTN"] * 2, ["flashinfer"] * 2),
        ("A100-SXM-80GB", "L4", [], []),
        ("MI300X-192GB", "L4", ["TRITON_ATTN"] * 2, None),
    ],
)
def test_replicas_that_exchange_kv_are_told_one_attention_backend(
    prefill: str, decode: str, vllm: list[str], sglang: list[str] | None
) -> None:
    plan = apart(prefill, decode)
    alone = replace(plan, replicas=tuple(replace(one, role=Role.UNIFIED) for one in plan.replicas), kv_routes=())
    for target, told in ((ExportTarget.VLLM, vllm), (ExportTarget.SGLANG, sglang)):
        if told is None:
            continue
        scripts = [text for path, text in exported(plan, target).files.items() if path.endswith(".sh")]
        assert re.findall(r"--attention-backend (\S+)", "".join(scripts)) == told
        assert "--attention-backend" not in str(exported(alone, target).files)


def test_pods_take_the_resource_and_the_image_of_their_vendor() -> None:
    made = exported(TWO_VENDORS, ExportTarget.KUBERNETES, engine=Engine.VLLM, image="cuda:1, amd=rocm:1")
    objects = reading.manifests(made.files)
    for one in objects:
        check_object(one)
    pods = [one["spec"]["template"]["spec"]["containers"][0] for one in objects if one["kind"] == "StatefulSet"]
    assert [(pod["image"], gpus_of(pod["resources"]["limits"])) for pod in pods] == [
        ("rocm:1", {"amd.com/gpu": 2}),
        ("cuda:1", {"nvidia.com/gpu": 1}),
    ]


def in_fleet(plan: Plan, **resources: str) -> Plan:
    """Return the plan with a fleet whose nodes offer their GPUs to pods under these names."""
    nodes = [{"name": node, "gpus": [{"type": "L4"}], "resource": name} for node, name in resources.items()]
    documents = {**plan.inputs["documents"], "cluster": {"nodes": nodes}}
    return replace(plan, inputs={"documents": documents})


SHARED = "nvidia.com/gpu.shared"


def gpus_of(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requested GPUs among the limits of a container."""
    return {name: count for name, count in limits.items() if "/" in name}


def test_pods_request_gpus_by_the_name_under_which_their_node_offers_them() -> None:
    plan = in_fleet(
        made_of(replica(on("a/0")), replica(on("b/1", "b/0", tp=2)), replica(on("c/0"))), a=SHARED, b=SHARED
    )
    made = exported(plan, ExportTarget.KUBERNETES)
    pods = [one["spec"]["template"]["spec"] for one in reading.manifests(made.files) if one["kind"] == "StatefulSet"]
    requested = [gpus_of(pod["containers"][0]["resources"]["limits"]) for pod in pods]
    assert requested == [{SHARED: 1}, {SHARED: 2}, {"nvidia.com/gpu": 1}]
    assert {toleration["key"] for pod in pods for toleration in pod["tolerations"]} == {"nvidia.com/gpu"}
    assert made.lost == (
        f"replica 1: its pod on b requests 2 {SHARED}, which may be turns on one GPU, or refused"
        " (failRequestsGreaterThanOne)",
    )
    unknown = "Pods request nvidia.com/gpu. Where `kubectl describe node` shows GPUs under another name"
    assert unknown in made.files["README.md"]
    known = exported(in_fleet(made_of(replica(on("a/0"))), a=SHARED), ExportTarget.KUBERNETES)
    assert "Pods request" not in known.files["README.md"]


def test_pods_of_one_template_request_the_same_resource() -> None:
    stages = (on(f"{node}/0", first=i, layers=1 + (i == 0)) for i, node in ((0, "a"), (2, "b"), (3, "c")))
    plan = made_of(replica(*stages, in_flight=3))
    exported(in_fleet(plan, b=SHARED, c=SHARED), ExportTarget.LWS)
    exported(in_fleet(plan, c=SHARED), ExportTarget.KUBERNETES)
    with pytest.raises(NotExportableError, match=f"further stages request nvidia.com/gpu and {SHARED}: pods of one"):
        exported(in_fleet(plan, c=SHARED), ExportTarget.KSERVE)
    alone = reading.manifests(exported(in_fleet(plan, c=SHARED), ExportTarget.LWS).files)
    assert [one["kind"] for one in alone].count("StatefulSet") == 3


def test_services_have_the_devices_of_their_vendor() -> None:
    made = exported(TWO_VENDORS, ExportTarget.COMPOSE, image="")
    (amd,), (nvidia,) = (yaml.safe_load(made.files[f"{node}/compose.yaml"])["services"].values() for node in "ab")
    assert (amd["image"], nvidia["image"]) == ("vllm/vllm-openai-rocm:v0.32.0", "vllm/vllm-openai:v0.32.0")
    assert (amd["devices"], amd["group_add"]) == (["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"], ["video"])
    assert amd["environment"]["CUDA_VISIBLE_DEVICES"] == "1,0", "it has the devices of all GPUs of the node"
    assert "deploy" not in amd
    assert "devices" not in nvidia
    assert {service["environment"]["VLLM_API_KEY"] for service in (amd, nvidia)} == {"${VLLM_API_KEY:-}"}
    compose_spec.PyCompose.from_json(
        json.dumps({"name": "both", "services": {"amd": amd, "nvidia": nvidia}, "volumes": {"models": {}}})
    ).validate()


def test_workers_on_amds_gpus_beside_an_engine_on_nvidias() -> None:
    images = {"image": "plugin:1", "worker_image": "worker:1,AMD=worker-rocm:1"}
    objects = reading.manifests(exported(AMD_WORKERS, ExportTarget.KUBERNETES, **images).files)
    pods = [one["spec"]["template"]["spec"]["containers"][0] for one in objects if one["kind"] == "StatefulSet"]
    assert {(pod["image"], *gpus_of(pod["resources"]["limits"])) for pod in pods} == {
        ("plugin:1", "nvidia.com/gpu"),
        ("worker-rocm:1", "amd.com/gpu"),
    }
    with pytest.raises(DocumentError) as caught:
        exported(AMD_WORKERS, ExportTarget.KUBERNETES, image="", worker_image="worker:1")
    assert [problem.message for problem in caught.value.problems] == [
        "--image is missing: vLLM with the plugin, as docker/vllm.Dockerfile makes it",
        "--worker-image is missing for AMD GPUs: give --worker-image IMAGE,AMD=IMAGE",
    ]


def test_what_a_vendor_has_no_image_for_is_refused() -> None:
    with pytest.raises(DocumentError, match="--image is missing for AMD GPUs: give --image IMAGE,AMD=IMAGE"):
        exported(TWO_VENDORS, ExportTarget.KUBERNETES, engine=Engine.SGLANG, image="cuda:1")
    made = exported(TWO_VENDORS, ExportTarget.DYNAMO, engine=Engine.VLLM, image="")
    assert any("it has GPUs of AMD: Dynamo's images are for NVIDIA's" in line for line in made.lost)


def test_the_chart_of_llm_d_is_told_the_vendor() -> None:
    made = exported(TWO_VENDORS, ExportTarget.LLM_D, engine=Engine.VLLM, image="")
    values = {path: yaml.safe_load(text) for path, text in made.files.items() if "values" in path}
    assert [one.get("accelerator") for _, one in sorted(values.items())] == [{"type": "amd"}, None]


def test_the_chart_of_llm_d_adds_no_gpus_under_another_name() -> None:
    made = exported(in_fleet(made_of(replica(on("a/0"))), a=SHARED), ExportTarget.LLM_D)
    values = yaml.safe_load(made.files["values-r0.yaml"])
    jsonschema.Draft202012Validator(schemas.VALUES).validate(values)
    assert values["accelerator"] == {"resources": {"nvidia": SHARED}}
    assert gpus_of(values["decode"]["containers"][0]["resources"]["limits"]) == {SHARED: 1}


def test_stages_stay_with_one_vendor_and_routes_where_no_kernel_is_common() -> None:
    mixed = made_of(replica(on("a/0", layers=2, gpu="MI300X-192GB"), on("b/0", first=2, layers=2, gpu="L4")))
    with pytest.raises(NotExportableError, match="it has stages on GPUs of AMD and NVIDIA: an engine"):
        exported(mixed, ExportTarget.VLLM)
    with pytest.raises(NotExportableError, match=r"no attention backend of SGLang runs .* on all of them"):
        exported(apart("MI300X-192GB", "L4"), ExportTarget.SGLANG)


def test_only_replicas_that_exchange_kv_need_one_backend() -> None:
    first, second = apart("T4", "T4"), apart("L4", "L4")
    moved = [
        replace(one, stages=(replace(one.stages[0], devices=(device,)),))
        for one, device in zip(second.replicas, ("e/0", "f/0"), strict=True)
    ]
    plan = made_of(*first.replicas, *moved, routes=(*first.kv_routes, KvRoute(prefill=2, decode=3, rate=2.0)))
    assert "--attention-backend" not in str(exported(plan, ExportTarget.VLLM).files)
    joined = replace(plan, kv_routes=(*plan.kv_routes, KvRoute(prefill=0, decode=3, rate=0.1)))
    scripts = [text for path, text in exported(joined, ExportTarget.VLLM).files.items() if path.endswith(".sh")]
    assert re.findall(r"--attention-backend (\S+)", "".join(scripts)) == ["TRITON_ATTN"] * 4


def test_gpus_of_other_vendors_are_refused_also_those_that_the_plan_defines_itself() -> None:
    gaudi, ours = made_of(replica(on("a/0", gpu="Gaudi3-128GB"))), made_of(replica(on("a/0", gpu="ours")))
    exported(ours, ExportTarget.VLLM)
    types = {"ours": {"memory": "64GiB", "vendor": "Huawei"}}
    told = replace(ours, inputs={"documents": {**ours.inputs["documents"], "cluster": {"gpu_types": types}}})
    for plan, vendor in ((gaudi, "Intel"), (told, "Huawei")):
        with pytest.raises(NotExportableError, match=f"it has GPUs of {vendor}: hetis only starts processes on"):
            exported(plan, ExportTarget.VLLM)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("cuda:1,Intel=other:1", "INTEL is not a supported vendor, must be NVIDIA or AMD"),
        ("cuda:1,nvidia=other:1", "2 images for NVIDIA"),
        ("cuda:1,", "an image name is empty$"),
        ("AMD=rocm:1,AMD=rocm:2", "2 images for AMD"),
        ("cuda:1,other:1", "2 images for NVIDIA"),
    ],
)
def test_images_are_for_vendors(image: str, why: str) -> None:
    with pytest.raises(DocumentError, match=f"image is '{re.escape(image)}': {why}"):
        export_wanted(TWO_VENDORS, ExportTarget.KUBERNETES, replace(SETTINGS, image=image, hosts={}))
