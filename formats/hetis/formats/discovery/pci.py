"""The GPUs that numbers of PCI devices mean, in labels of node feature discovery and in ``lspci``'s list."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Devices of NVIDIA, AMD, Intel and Habana (github.com/pciutils/pciids) by the board; virtual functions are whole ones.
_BOARDS = """
P40 1b38 P100-PCIe-12GB 15f7 P100-PCIe-16GB 15f8 P100-SXM2-16GB 15f9 V100-SXM2-16GB 1db1,1df5 V100-PCIe-16GB 1db4
V100-SXM2-32GB 1db5,1db8 V100-PCIe-32GB 1db6 V100S-PCIe-32GB 1df6 T4 1eb8 RTX-2080Ti 1e04 RTX-2080 1e82 Titan-RTX 1e02
Quadro-RTX-5000 1eb0 A100-SXM-40GB 20b0 A100-PCIe-40GB 20b1,20f1 A100-SXM-80GB 20b2 A100-SXM-64GB 20b3
A100-PCIe-80GB 20b5 A30 20b7 A800-SXM-80GB 20f3 A800-PCIe-80GB 20f5 A10 2236 A10G 2237 A40 2235 RTX-A6000 2230
RTX-A5000 2231 RTX-A4500 2232 RTX-A5500 2233 RTX-A4000 24b0 RTX-A2000-12GB 2571 RTX-3090 2204 RTX-3090Ti 2203
RTX-3080-12GB 220a RTX-3080Ti 2208 RTX-3070 2484 RTX-3060Ti 2414,2486 RTX-3060-12GB 2487,2503 H100-SXM-80GB 2330
H100-PCIe-80GB 2331 H100-SXM-64GB 2337 H100-SXM-96GB 2338 H100-NVL-94GB 2321 H800-PCIe-80GB 2322 H800-SXM-80GB 2324
H20 2329 H20-3e-141GB 232c H200-SXM-141GB 2335 H200-NVL-141GB 233b GH200-96GB 2342 GH200-144GB 2348 L2 27b6 L4 27b8
L20 26b7,26ba L40 26b5 L40S 26b9 RTX-6000-Ada 26b1 RTX-5000-Ada 26b2 RTX-5880-Ada 26b3 RTX-4500-Ada 27b1
RTX-4000-Ada 27b2 RTX-4090 2684 RTX-4090D 2685 RTX-4080 2704 RTX-4080-SUPER 2702 RTX-4070Ti 2782
RTX-4070Ti-SUPER 2705 RTX-4070 2786 RTX-4070-SUPER 2783 RTX-4060Ti-16GB 2805 B200-SXM-180GB 2901 GB200-per-GPU 2941
B300-SXM-288GB 3182 GB300-per-GPU 31c2,31c3 GB10 2e12 RTX-PRO-6000-Workstation-96GB 2bb1 RTX-PRO-6000-MaxQ-96GB 2bb4
RTX-PRO-6000-Server-96GB 2bb5 RTX-PRO-4500 2c31 RTX-PRO-4000 2c34 RTX-5090 2b85 RTX-5090D 2b87 RTX-5080 2c02
RTX-5070Ti 2c05 RTX-5070 2f04 MI100-32GB 738c,738e MI210-64GB 740f MI300X-192GB 74a1,74a9,74b5
MI325X-256GB 74a5,74b9 MI355X-288GB 75a3,75b3 Radeon-AI-PRO-R9700 7551 Arc-Pro-B60-24GB e211 Gaudi2-96GB 1020
Gaudi3-128GB 1060
"""
_BY_DEVICE = {device: board for board, of in re.findall(r"(\S+) (\S+)", _BOARDS) for device in of.split(",")}
_VENDORS = {"nvidia.com": "10de", "amd.com": "1002", "gpu.intel.com": "8086", "habana.ai": "1da3"}
# Of node feature discovery, and of the device plugins of Intel and AMD, which name their own devices.
_LABEL = re.compile(
    r"feature\.node\.kubernetes\.io/pci-(?:[\da-f]{4}_)?([\da-f]{4})_([\da-f]{4})(?:_\w+)?\.present"
    r"|(gpu\.intel\.com)/device-id\.[\da-f]{4}-([\da-f]{4})\.present|(?:beta\.)?(amd\.com)/gpu\.device-id\.([\da-f]{4})"
)


def board_of_device(device: str) -> str | None:
    """Return the board of a device (``2330``, ``0x74a1``), or None if it is not known."""
    return _BY_DEVICE.get(device.lower().removeprefix("0x"))


def board_in_labels(names: Iterable[str], vendor: str) -> str | None:
    """Return the one board of a vendor (``nvidia.com``) that the names of labels have the device of.

    Node feature discovery's do if it is configured to label devices (``deviceLabelFields: [class, vendor, device]``).
    """
    found = (tuple(filter(None, one.groups())) for one in map(_LABEL.fullmatch, names) if one)
    boards = {_BY_DEVICE.get(device) for of, device in found if of in (vendor, _VENDORS.get(vendor))} - {None}
    return boards.pop() if len(boards) == 1 else None
