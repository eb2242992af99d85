"""The GPUs that labels of a Kubernetes node name: by drivers and clouds, or by the type of its machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hetis.formats.discovery.found import text
from hetis.formats.units import parse_bytes

# Values of cloud.google.com/gke-accelerator name machines, each with one board
# (cloud.google.com/kubernetes-engine/docs, "GPU machine types").
_GKE = {
    "nvidia-tesla-t4": "T4",
    "nvidia-tesla-v100": "V100-SXM2-16GB",
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
    "g6e": "L40S",
}
# Instance types of Azure and Oracle, and their boards (learn.microsoft.com, "GPU accelerated VM sizes";
# docs.oracle.com, "Compute Shapes").
_INSTANCES = (
    (r"Standard_NC\d+ads_A100_v4", "A100-PCIe-80GB"),
    (r"Standard_NCC?\d+[ad]*i?s_H100_v5", "H100-NVL-94GB"),
    (r"Standard_NC\d+as_T4_v3", "T4"),
    (r"Standard_NC\d+r?s_v3", "V100-PCIe-16GB"),
    (r"Standard_N[CV]\d+ads_A10_v\d", "A10"),
    (r"Standard_ND96asr_v4", "A100-SXM-40GB"),
    (r"Standard_ND96amsr_A100_v4", "A100-SXM-80GB"),
    (r"Standard_ND96isr_H100_v5", "H100-SXM-80GB"),
    (r"Standard_ND96isr_H200_v5", "H200-SXM-141GB"),
    (r"Standard_ND96isr_MI300X_v5", "MI300X-192GB"),
    (r"Standard_ND128isr_(NDR_)?GB200_v6", "GB200-per-GPU"),
    (r"Standard_ND40rs_v2", "V100-SXM2-32GB"),
    (r"BM\.GPU4\.8", "A100-SXM-40GB"),
    (r"BM\.GPU\.A100-v2\.8", "A100-SXM-80GB"),
    (r"BM\.GPU\.H100\.8", "H100-SXM-80GB"),
    (r"BM\.GPU\.H200\.8", "H200-SXM-141GB"),
    (r"BM\.GPU\.B200\.8", "B200-SXM-180GB"),
    (r"BM\.GPU\.L40S\.4", "L40S"),
    (r"BM\.GPU\.MI300X\.8", "MI300X-192GB"),
    (r"(BM|VM)\.GPU\.A10\.\d", "A10"),
)
# Labels with the name of a node's GPUs, and with the memory of one in MiB, by what sets them: GPU feature discovery,
# EKS Auto Mode, Karpenter on AWS and on Azure (node auto-provisioning), CoreWeave, AMD's node labellers.
_PRODUCT_LABELS = {
    "nvidia.com": (
        ("nvidia.com/gpu.product", "nvidia.com/gpu.memory"),
        ("eks.amazonaws.com/instance-gpu-name", "eks.amazonaws.com/instance-gpu-memory"),
        ("karpenter.k8s.aws/instance-gpu-name", "karpenter.k8s.aws/instance-gpu-memory"),
        ("gpu.nvidia.com/class", ""),
        ("gpu.nvidia.com/model", ""),
        ("karpenter.azure.com/sku-gpu-name", ""),
    ),
    "amd.com": (
        ("amd.com/gpu.product-name", ""),
        ("beta.amd.com/gpu.product-name", ""),
        ("eks.amazonaws.com/instance-gpu-name", ""),
        ("karpenter.k8s.aws/instance-gpu-name", ""),
    ),
}
# Labels of accelerators of other vendors: GKE's for TPUs, and MindCluster's and Volcano's for Ascend.
_PRODUCT_LABELS |= {
    "google.com": (("cloud.google.com/gke-tpu-accelerator", ""),),
    "huawei.com": (("node.kubernetes.io/npu.chip.name", ""), ("accelerator-type", ""), ("accelerator", "")),
}
_ASCEND = re.compile(r"(?:module-|card-|huawei-)?(?:ascend)?-?(910[a-c]\d?)(?:-\d+)*", re.IGNORECASE)
_VRAM = re.compile(r"(\d+)([KMGT])i?B?")


def product_of(node_labels: Mapping[str, Any], resource: str) -> tuple[str, int | None]:
    """Return the product name and memory of a node's GPUs from its labels, or the resource itself without labels."""
    labels = {name: text(value) for name, value in node_labels.items()}
    vendor, instance = resource.partition("/")[0], labels.get("node.kubernetes.io/instance-type", "")
    of_vendor = ((f"{vendor}/gpu.product", ""), (f"{vendor}/gpu.product-name", ""))
    by_machine = _GKE.get(labels.get("cloud.google.com/gke-accelerator", "")) or _board_of(instance, vendor)
    for name, of_memory in _PRODUCT_LABELS.get(vendor, of_vendor):
        # A cloud's own label is less exact than the machine (l4, a100), a driver's is more.
        if not (product := labels.get(name)) or (by_machine and not name.startswith((vendor, f"beta.{vendor}"))):
            continue
        if vendor == "huawei.com" and (chip := _ASCEND.fullmatch(product)):  # module-910b-8
            return f"Ascend {chip[1]}", None
        megabytes = labels.get(of_memory, "")
        vram = next((found for one in ("", "beta.") if (found := labels.get(f"{one}{vendor}/gpu.vram"))), "")
        size = _VRAM.fullmatch(vram)
        if megabytes.isdecimal() and len(megabytes) < 10:
            return product, int(megabytes) * 2**20
        return product, bytes_of(f"{size[1]}{size[2]}i") if size else None
    return by_machine or instance or resource, None


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
