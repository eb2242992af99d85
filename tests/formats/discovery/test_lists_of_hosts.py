"""What further tools print of a host's GPUs is read: logs, lists of monitors, and reports on the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.formats.discovery.fleet import discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError

LOG = """
==============NVSMI LOG==============

Timestamp                                 : Wed Jan 14 15:17:09 2026
Attached GPUs                             : 2
GPU 00000000:42:00.0
    Product Name                          : NVIDIA L40S
    Product Brand                         : NVIDIA
    MIG Mode
        Current                           : N/A
        Pending                           : N/A
    FB Memory Usage
        Total                             : 46068 MiB
        Reserved                          : 638 MiB
        Used                              : 0 MiB
    BAR1 Memory Usage
        Total                             : 65536 MiB
        Used                              : 1 MiB
    Compute Mode                          : Default
GPU 00000000:C2:00.0
    Product Name                          : NVIDIA L40S
    FB Memory Usage
        Total                             : 46068 MiB
        Used                              : 40000 MiB
    BAR1 Memory Usage
        Total                             : 65536 MiB
        Used                              : 1 MiB
"""
ENVIRONMENT = """\
Collecting environment information...
OS                           : Ubuntu 22.04.5 LTS (x86_64)
GPU models and configuration : {gpus}
Nvidia driver version        : 580.65.06
GPU Topology:
\tGPU0\tGPU1\tCPU Affinity
GPU0\t X \tNV18\t0-31
GPU1\tNV18\t X \t0-31
"""
GPUSTAT = """\
gpu01  Thu Aug 13 10:00:00 2026  580.65.06
[0] NVIDIA GeForce RTX 4090 | 35'C,   0 % |     1 / 24564 MB |
[1] NVIDIA GeForce RTX 4090 | 36'C,  99 % | 20000 / 24564 MB | user(19999M)
"""
DCGMI = """\
1 GPU found.
+--------+------------------------------------------+
| GPU ID | Device Information                       |
+--------+------------------------------------------+
| 0      | Name: NVIDIA H100 80GB HBM3              |
|        | PCI Bus ID: 00000000:1B:00.0             |
+--------+------------------------------------------+
"""
XPU_SMI = """\
+-----------+------------------------------------------------------+
| Device ID | Device Information                                   |
+-----------+------------------------------------------------------+
| 0         | Device Name: Intel(R) Arc(TM) Pro B60 Graphics       |
|           | Vendor Name: Intel(R) Corporation                    |
"""
ROCM_SMI = """
=================================== ROCm System Management Interface ===================================
============================================= Concise Info =============================================
Device  Node  IDs              Temp        Power     Partitions          SCLK    MCLK    Fan  Perf  PwrCap  VRAM%  GPU%
              (DID,     GUID)  (Junction)  (Socket)  (Mem, Compute, ID)
========================================================================================================
0       2     0x74a1,   28851  35.0°C      143.0W    NPS1, SPX, 0        131Mhz  900Mhz  0%   auto  750.0W  0%     0%
1       3     0x74a1,   51499  36.0°C      141.0W    NPS1, SPX, 0        131Mhz  900Mhz  0%   auto  750.0W  91%    99%
========================================================================================================
"""


def gpus_in(folder: Path, content: str) -> list[tuple[str, int]]:
    (folder / "host.txt").write_text(content)
    cluster = discovered(read_inventory([str(folder / "host.txt")]), name="c", said={}).cluster
    return [(group.gpus[0].gpu, group.count * group.gpus[0].count) for group in cluster.node_groups]


@pytest.mark.parametrize(
    ("content", "gpus"),
    [
        (LOG, [("L40S", 1)]),  # the other one's memory is in use
        (ENVIRONMENT.format(gpus="\nGPU 0: NVIDIA H200\nGPU 1: NVIDIA H200"), [("H200-SXM-141GB", 2)]),
        (ENVIRONMENT.format(gpus="GPU 0: NVIDIA H200\nGPU 1: NVIDIA H200"), [("H200-SXM-141GB", 2)]),
        (ENVIRONMENT.format(gpus="\nGPU 0-7: NVIDIA H100 80GB HBM3"), [("H100-SXM-80GB", 8)]),
        (
            ENVIRONMENT.format(
                gpus="\nGPU 0: NVIDIA A100-SXM4-40GB\n  MIG 3g.20gb  Device 0:\n  MIG 3g.20gb  Device 1:"
            ),
            [("A100-SXM-40GB-3g.20gb", 2)],
        ),
        (GPUSTAT, [("RTX-4090", 1)]),
        (DCGMI, [("H100-SXM-80GB", 1)]),
        (XPU_SMI, [("Arc-Pro-B60-24GB", 1)]),
        (ROCM_SMI, [("MI300X-192GB", 1)]),
    ],
)
def test_lists_of_further_tools_are_read(tmp_path: Path, content: str, gpus: list[tuple[str, int]]) -> None:
    assert gpus_in(tmp_path, content) == gpus


def test_parts_in_the_table_of_rocm_smi_are_no_gpus(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"parts of GPUs \(CPX\)"):
        gpus_in(tmp_path, ROCM_SMI.replace("SPX", "CPX"))


def test_a_sliced_card_in_the_log_is_no_whole_one(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="MIG is on"):
        gpus_in(tmp_path, LOG.replace("Current                           : N/A", "Current : Enabled"))
