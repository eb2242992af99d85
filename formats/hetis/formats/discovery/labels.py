"""The GPUs that labels of a Kubernetes node name: by drivers and clouds, or by the type of its machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hetis.formats.discovery.found import text
from hetis.formats.discovery.pci import board_in_labels, board_of_device
from hetis.formats.units import parse_bytes

# Values of cloud.google.com/gke-accelerator name machines, each with one board
# (cloud.google.com/kubernetes-engine/docs, "GPU machine types").
_GKE = {
    "nvidia-tesla-t4": "T4",
    "nvidia-tesla-v100": "V100-SXM2-16GB",
    "nvidia-tesla-p100": "P100-PCIe-16GB",
    "nvidia-tesla-a100": "A100-SXM-40GB",
    "nvidia-a100-80gb": "A100-SXM-80GB",
    "nvidia-l4": "L4",
    "nvidia-h100-80gb": "H100-SXM-80GB",
    "nvidia-h100-mega-80gb": "H100-SXM-80GB",
    "nvidia-h200-141gb": "H200-SXM-141GB",
    "nvidia-b200": "B200-SXM-180GB",
    "nvidia-gb200": "GB200-per-GPU",
    "nvidia-rtx-pro-6000": "RTX-PRO-6000-Server-96GB",
}
# AWS instance families and their boards (aws.amazon.com/ec2/instance-types, "Accelerated Computing").
_AWS = {
    "p3": "V100-SXM2-16GB",
    "p3dn": "V100-SXM2-32GB",
    "p4d": "A100-SXM-40GB",
    "p4de": "A100-SXM-80GB",
    "p5": "H100-SXM-80GB",
    "p5e": "H200-SXM-141GB",
    "p5en": "H200-SXM-141GB",
    "p6-b200": "B200-SXM-180GB",
    "p6-b300": "B300-SXM-288GB",
    "g4dn": "T4",
    "g5": "A10G",
    "g6": "L4",
    "gr6": "L4",
    "g6e": "L40S",
    "g7e": "RTX-PRO-6000-Server-96GB",
    "p6e-gb200": "GB200-per-GPU",
    "p6e-gb300": "GB300-per-GPU",
}
# Instance types of Azure, Oracle, Google, IBM, CoreWeave, Nebius, Lambda, DigitalOcean, Scaleway, Akamai, Crusoe and
# Alibaba, and their boards (learn.microsoft.com, "GPU accelerated VM sizes"; docs.oracle.com, "Compute Shapes";
# docs.cloud.google.com, "GPU machine types"; cloud.ibm.com/docs/vpc, "Profiles"; docs.coreweave.com, "GPU instances";
# docs.nebius.com, "Types of virtual machines and GPUs"). Types that have a part of a board, such as
# Standard_NV6ads_A10_v5, g4-standard-6 and Vultr's vcg-a100-2c-15g-10vram, are not here.
_INSTANCES = (
    (r"Standard_NC\d+ads_A100_v4", "A100-PCIe-80GB"),
    (r"Standard_NCC?\d+[ad]*i?s_H100_v5", "H100-NVL-94GB"),
    (r"Standard_NC\d+as_T4_v3|ecs\.(ebm)?gn6i-.+", "T4"),
    (r"Standard_NC\d+r?s_v3", "V100-PCIe-16GB"),
    (r"Standard_(NC\d+ads_A10_v4|NV(36|72)adm?s_A10_v5)|(BM|VM)\.GPU\.A10\.\d|ecs\.(ebm)?gn7i-.+", "A10"),
    (r"Standard_NC\d+\w*_RTXPRO6000BSE_v6|g4-standard-(48|96|192|384)", "RTX-PRO-6000-Server-96GB"),
    (r"rtxp6000-8x|gpu-rtx6000(-\w)?", "RTX-PRO-6000-Server-96GB"),
    (r"Standard_ND96asr_v4|BM\.GPU(\.B)?4\.8|VM\.GPU\.A100\.40G\.\d", "A100-SXM-40GB"),
    (r"a2-(high|mega)gpu-\d+g|gpu_8x_a100|gpu_\dx_a100_sxm4", "A100-SXM-40GB"),
    (r"Standard_ND96amsr_A100_v4|BM\.GPU\.A100-v2\.8|VM\.GPU\.A100\.80G\.\d|a2-ultragpu-\dg", "A100-SXM-80GB"),
    (r"gd-8xa100-i128|gpu_8x_a100_80gb_sxm4|a100-80gb-sxm-ib\.\dx|ecs\.(ebm)?gn7ex?-.+", "A100-SXM-80GB"),
    (r"Standard_ND96isr?_(flex_)?H100_v5|BM\.GPU\.H100(-NC)?\.8|a3-(high|mega|edge)gpu-\dg", "H100-SXM-80GB"),
    (r"gx3d-\d+x\d+x8h100|gd-8xh100ib-i128|gpu-h100-sxm(-\w)?|gpu_\dx_h100_sxm5", "H100-SXM-80GB"),
    (r"gpu-h100x\d-\d+gb|H100-SXM-\d-80G|h100-80gb-sxm-ib\.\dx", "H100-SXM-80GB"),
    (r"H100-\d-80G|gpu_1x_h100_pcie", "H100-PCIe-80GB"),
    (r"Standard_ND96isr_H200_v5|BM\.GPU\.H200(-NC)?\.8|a3-ultragpu-8g|gx3d-\d+x\d+x8h200", "H200-SXM-141GB"),
    (r"gd-8xh200ib-i128|gpu-h200-sxm(-\w)?|gpu-h200x\d-\d+gb|h200-141gb-sxm-ib\.\dx", "H200-SXM-141GB"),
    (r"BM\.GPU\.B200\.8|a4-highgpu-8g|b200-8x|gpu-b200-sxm(-\w)?|gpu_\dx_b200_sxm6", "B200-SXM-180GB"),
    (r"BM\.GPU\.B300\.8|b300-8x|gpu-b300-sxm(-\w)?|B300-SXM-\d-288G", "B300-SXM-288GB"),
    (r"Standard_ND128isr_(NDR_)?GB200_v6|BM\.GPU\.GB200\.4|a4x-highgpu-4g|gb200-4x", "GB200-per-GPU"),
    (r"Standard_ND128isr_(NDR_)?GB300_v6|BM\.GPU\.GB300\.4|a4x-maxgpu-4g-metal|gb300-4x", "GB300-per-GPU"),
    (r"gd-1xgh200|gpu_1x_gh200", "GH200-96GB"),
    (r"(BM|VM)\.GPU3\.\d|ecs\.(ebm)?gn6v-.+", "V100-SXM2-16GB"),
    (r"Standard_ND40rs_v2|ecs\.(ebm)?gn6e-.+", "V100-SXM2-32GB"),
    (r"BM\.GPU\.L40S\.4|gx3-\d+x\d+x\dl40s|gd-8xl40s-i128|gpu-l40s(-\w)?", "L40S"),
    (r"gpu-l40sx\d-\d+gb|L40S-\d-48G|l40s-48gb\.\d+x", "L40S"),
    (r"gd-8xl40-i128", "L40"),
    (r"g2-standard-\d+|gx3-\d+x\d+x\dl4|L4-\d-24G", "L4"),
    (r"g2-gpu-rtx4000a\d-\w+|gpu-4000adax1-20gb", "RTX-4000-Ada"),
    (r"gpu-6000adax1-48gb", "RTX-6000-Ada"),
    (r"g1-gpu-rtx6000-\d", "Quadro-RTX-6000"),
    (r"Standard_ND96isr?_(flex_)?MI300X_v5|BM\.GPU\.MI300X\.8|gx3d-\d+x\d+x8mi300x", "MI300X-192GB"),
    (r"gpu-mi300x\d-\d+gb|mi300x-192gb-ib\.\dx", "MI300X-192GB"),
    (r"BM\.GPU\.MI355X(-v\d)?\.8", "MI355X-288GB"),
    (r"gx3d-\d+x\d+x8gaudi3", "Gaudi3-128GB"),
    (r"ct5l(p-hightpu)?-\w*-?\dt", "TPU-v5e"),
    (r"ct6e-standard-\dt", "TPU-v6e"),
)
# Labels with the name of a node's GPUs, and with the memory of one in MiB, by what sets them: GPU feature discovery,
# EKS Auto Mode, Karpenter on AWS and on Azure (node auto-provisioning), CoreWeave, Alibaba's ACK, DigitalOcean, Nebius,
# SkyPilot, kOps, GKE for boards that are not known above, AMD's node labellers.
_PRODUCT_LABELS = {
    "nvidia.com": (
        ("nvidia.com/gpu.product", "nvidia.com/gpu.memory"),
        ("eks.amazonaws.com/instance-gpu-name", "eks.amazonaws.com/instance-gpu-memory"),
        ("karpenter.k8s.aws/instance-gpu-name", "karpenter.k8s.aws/instance-gpu-memory"),
        ("gpu.nvidia.com/class", "gpu.nvidia.com/vram"),
        ("gpu.nvidia.com/model", "gpu.nvidia.com/vram"),
        ("karpenter.azure.com/sku-gpu-name", ""),
        ("aliyun.accelerator/nvidia_name", "aliyun.accelerator/nvidia_mem"),
        ("doks.digitalocean.com/gpu-model", ""),
        ("nebius.com/gpu-name", ""),
        ("nebius.com/gpu", ""),
        ("skypilot.co/accelerator", ""),
        ("accelerator", ""),
        ("cloud.google.com/gke-accelerator", ""),
        ("k8s.amazonaws.com/accelerator", ""),
    ),
    "gpu.intel.com": (("gpu.intel.com/product", ""),),
    "habana.ai": (),
    "amd.com": (
        ("amd.com/gpu.product-name", ""),
        ("beta.amd.com/gpu.product-name", ""),
        ("eks.amazonaws.com/instance-gpu-name", ""),
        ("karpenter.k8s.aws/instance-gpu-name", ""),
        ("amd.com/gpu.device-id", ""),
        ("beta.amd.com/gpu.device-id", ""),
    ),
}
# Labels of accelerators of other vendors: GKE's for TPUs, and MindCluster's and Volcano's for Ascend.
_PRODUCT_LABELS |= {
    "google.com": (("cloud.google.com/gke-tpu-accelerator", ""),),
    "huawei.com": (("node.kubernetes.io/npu.chip.name", ""), ("accelerator-type", ""), ("accelerator", "")),
}
# Labels with the type of a node's machine, of Kubernetes and of what starts machines; AWS's families are enough.
_OF_MACHINES = (
    *("node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type", "node.coreweave.cloud/type"),
    *("karpenter.azure.com/sku-name", "eks.amazonaws.com/instance-family", "karpenter.k8s.aws/instance-family"),
)
# Boards of which AWS has one kind, by its names in labels; the memory beside them tells their sizes.
_OF_AWS = {name: f"{name}-sxm" for name in ("v100", "a100", "h100")}
_OF_AWS |= {f"rtx-pro-{of}": "rtx-pro-6000-server" for of in ("6000", "server-6000", "6000-server")}
_ASCEND = re.compile(r"(?:module-|card-|huawei-)?(?:ascend)?-?(910[a-c]\d?)(?:-\d+)*", re.IGNORECASE)
_LEAST_MEBIBYTES = 1024  # CoreWeave labels memory in GB
_VRAM = re.compile(r"(\d+)([KMGT])i?B?")


def product_of(node_labels: Mapping[str, Any], resource: str) -> tuple[str, int | None]:
    """Return the product name and memory of a node's GPUs from its labels, or the resource itself without labels."""
    labels = {name: text(value) for name, value in node_labels.items()}
    vendor = resource.partition("/")[0]
    instance = next((found for name in _OF_MACHINES if (found := labels.get(name))), "")
    by_machine = _GKE.get(labels.get("cloud.google.com/gke-accelerator", "")) or _board_of(instance, vendor)
    for name, of_memory in _labels_of(vendor):
        # A cloud's own label is less exact than the machine (l4, a100), a driver's is more.
        product, is_of_driver = labels.get(name, ""), name.startswith((vendor, f"beta.{vendor}"))
        if not product or (not is_of_driver and (by_machine or not any(map(str.isdigit, product)))):
            continue
        if "aws" in name:
            product = _OF_AWS.get(product.lower(), product)
        if vendor == "huawei.com" and any(value.startswith("module-a3-") for value in labels.values()):
            return "Ascend 910C", None
        if vendor == "huawei.com" and (chip := _ASCEND.fullmatch(product)):  # module-910b-8
            return f"Ascend {chip[1]}", None
        if name.endswith("device-id"):
            product = board_of_device(product) or product  # of AMD's labellers before 2025
        megabytes = labels.get(of_memory, "").removesuffix("MiB")
        vram = next((found for one in ("", "beta.") if (found := labels.get(f"{one}{vendor}/gpu.vram"))), "")
        size = _VRAM.fullmatch(vram)
        if megabytes.isdecimal() and len(megabytes) < 10:
            return product, int(megabytes) * (2**30 if int(megabytes) < _LEAST_MEBIBYTES else 2**20)
        return product, bytes_of(f"{size[1]}{size[2]}i") if size else None
    return by_machine or board_in_labels(labels, vendor) or instance or resource, None


def product_label(resource: str) -> str:
    """Return the label in which a vendor's own driver names the GPUs that a resource counts; empty: none does."""
    return next((name for name, _ in _labels_of(resource.partition("/")[0])), "")


def _labels_of(vendor: str) -> Sequence[tuple[str, str]]:
    return _PRODUCT_LABELS.get(vendor, ((f"{vendor}/gpu.product", ""), (f"{vendor}/gpu.product-name", "")))


def partition_of(node_labels: Mapping[str, Any]) -> str:
    """Return the modes that divide AMD's GPUs of a node (``cpx_nps4``), or an empty string if they are whole."""
    names = [f"{one}amd.com/{of}compute-memory-partition" for one in ("", "beta.") for of in ("", "gpu.")]
    modes = next((found for name in names if (found := text(node_labels.get(name)))), "")
    return "" if modes.lower().startswith("spx") else modes[:40]


def _board_of(instance: str, vendor: str) -> str | None:
    """Return the GPU of a cloud's instance type, or None if it is not known."""
    family = instance.partition(".")[0]
    if vendor == "nvidia.com" and family in _AWS:
        return _AWS[family]
    return next((board for pattern, board in _INSTANCES if re.fullmatch(pattern, instance)), None)


def bytes_of(value: object) -> int | None:
    """Return the bytes of ``80Gi``, ``81559Mi`` or ``85899345920``, or None if the value is none of these."""
    if not isinstance(value, str | int) or isinstance(value, bool) or len(str(value)) > 40:
        return None
    try:
        return parse_bytes(f"{value}B".replace("k", "K"))
    except ValueError:
        return None
