"""Boards that the reference table of GPUs lacks, as rows of that table.

Figures are those of vendors' data sheets, as generally known: memory in GB, its bandwidth in GB/s, dense 16-bit matrix
TFLOPS with 32-bit accumulation, and power. A rate that a data sheet lacks follows from streaming multiprocessors and
boost clock, with 512 FLOPs per clock and multiprocessor on GeForce boards and 1,024 on others. No price is stated.
"""

from __future__ import annotations

from collections.abc import Iterator

_SHEET = "vendor datasheet, from general knowledge"
# Name, architecture, GB, GB/s, TFLOPS in 16 bits, those in 8 as a multiple, PCIe generation and GB/s, NVLink GB/s, W.
_NVIDIA: tuple[tuple[str, str, float, float, float, int, int, int, int, int, str], ...] = (
    ("RTX-2080", "Turing", 8, 448, 40.3, 0, 3, 16, 0, 215, "no bf16"),
    ("RTX-2080Ti-22GB", "Turing", 22, 616, 53.8, 0, 3, 16, 0, 250, "memory doubled by others than NVIDIA; no bf16"),
    ("Titan-RTX", "Turing", 24, 672, 130.5, 0, 3, 16, 0, 280, "no bf16"),
    ("Quadro-RTX-5000", "Turing", 16, 448, 89.2, 0, 3, 16, 0, 230, "no bf16"),
    ("Quadro-RTX-8000", "Turing", 48, 672, 130.5, 0, 3, 16, 0, 295, "no bf16"),
    ("RTX-3060-12GB", "Ampere", 12, 360, 25.5, 0, 4, 32, 0, 170, ""),
    ("RTX-3060Ti", "Ampere", 8, 448, 32.4, 0, 4, 32, 0, 200, ""),
    ("RTX-3070", "Ampere", 8, 448, 40.6, 0, 4, 32, 0, 220, ""),
    ("RTX-3080-10GB", "Ampere", 10, 760, 59.5, 0, 4, 32, 0, 320, ""),
    ("RTX-3080-12GB", "Ampere", 12, 912, 61.3, 0, 4, 32, 0, 350, ""),
    ("RTX-3080-20GB", "Ampere", 20, 760, 59.5, 0, 4, 32, 0, 320, "memory doubled by others than NVIDIA"),
    ("RTX-3080Ti", "Ampere", 12, 912, 68.2, 0, 4, 32, 0, 350, ""),
    ("RTX-3090Ti", "Ampere", 24, 1008, 80.0, 0, 4, 32, 0, 450, ""),
    ("RTX-A2000-12GB", "Ampere", 12, 288, 31.9, 0, 4, 32, 0, 70, ""),
    ("RTX-A4500", "Ampere", 20, 640, 94.6, 0, 4, 32, 0, 200, ""),
    ("RTX-A5500", "Ampere", 24, 768, 136.4, 0, 4, 32, 0, 230, ""),
    ("A2", "Ampere", 16, 200, 18.1, 0, 4, 16, 0, 60, ""),
    ("A800-PCIe-80GB", "Ampere", 80, 1935, 312.0, 0, 4, 32, 0, 300, ""),
    ("A100-SXM-64GB", "Ampere", 64, 1638, 358.0, 0, 4, 32, 600, 440, "of the Leonardo supercomputer"),
    ("V100S-PCIe-32GB", "Volta", 32, 1134, 130.0, 0, 3, 16, 0, 250, "no bf16"),
    ("P40", "Pascal", 24, 347, 11.8, 0, 3, 16, 0, 250, "no tensor cores; 16-bit products are computed in 32 bits"),
    ("RTX-4060Ti-16GB", "Ada GeForce", 16, 288, 44.1, 2, 4, 16, 0, 165, ""),
    ("RTX-4070", "Ada GeForce", 12, 504, 58.3, 2, 4, 32, 0, 200, ""),
    ("RTX-4070-SUPER", "Ada GeForce", 12, 504, 71.0, 2, 4, 32, 0, 220, ""),
    ("RTX-4070Ti", "Ada GeForce", 12, 504, 80.2, 2, 4, 32, 0, 285, ""),
    ("RTX-4070Ti-SUPER", "Ada GeForce", 16, 672, 88.2, 2, 4, 32, 0, 285, ""),
    ("RTX-4080", "Ada GeForce", 16, 717, 97.5, 2, 4, 32, 0, 320, ""),
    ("RTX-4080-SUPER", "Ada GeForce", 16, 736, 104.4, 2, 4, 32, 0, 320, ""),
    ("RTX-4090D", "Ada GeForce", 24, 1008, 147.1, 2, 4, 32, 0, 425, ""),
    ("RTX-4090-48GB", "Ada GeForce", 48, 1008, 165.2, 2, 4, 32, 0, 450, "memory doubled by others than NVIDIA"),
    ("RTX-4000-Ada", "Ada", 20, 360, 106.8, 2, 4, 32, 0, 130, ""),
    ("RTX-4500-Ada", "Ada", 24, 432, 158.5, 2, 4, 32, 0, 210, ""),
    ("RTX-5000-Ada", "Ada", 32, 576, 261.1, 2, 4, 32, 0, 250, ""),
    ("RTX-5880-Ada", "Ada", 48, 960, 277.3, 2, 4, 32, 0, 285, ""),
    ("L2", "Ada", 24, 300, 96.5, 2, 4, 32, 0, 72, ""),
    ("H100-SXM-64GB", "Hopper", 64, 2020, 989.0, 2, 5, 64, 900, 700, "of the MareNostrum 5 supercomputer"),
    ("H100-SXM-96GB", "Hopper", 96, 3350, 989.0, 2, 5, 64, 900, 700, ""),
    ("H800-PCIe-80GB", "Hopper", 80, 2039, 756.0, 2, 5, 64, 0, 350, ""),
    ("H20-3e-141GB", "Hopper", 141, 4800, 148.0, 2, 5, 64, 900, 400, ""),
    ("GH200-144GB", "Hopper", 144, 4900, 989.0, 2, 5, 64, 900, 900, ""),
    ("RTX-5060Ti-16GB", "RTX Blackwell", 16, 448, 47.4, 2, 5, 32, 0, 180, ""),
    ("RTX-5070", "RTX Blackwell", 12, 672, 61.7, 2, 5, 64, 0, 250, ""),
    ("RTX-5070Ti", "RTX Blackwell", 16, 896, 87.9, 2, 5, 64, 0, 300, ""),
    ("RTX-5080", "RTX Blackwell", 16, 960, 112.6, 2, 5, 64, 0, 360, ""),
    ("RTX-5090D", "RTX Blackwell", 32, 1792, 148.4, 2, 5, 64, 0, 575, "matrix rate limited for export"),
    ("RTX-PRO-4000", "RTX Blackwell", 24, 672, 187.8, 2, 5, 64, 0, 140, ""),
    ("RTX-PRO-4500", "RTX Blackwell", 32, 896, 219.8, 2, 5, 64, 0, 200, ""),
    ("RTX-PRO-5000", "RTX Blackwell", 48, 1344, 294.8, 2, 5, 64, 0, 300, ""),
    ("RTX-PRO-6000-Workstation-96GB", "RTX Blackwell", 96, 1792, 503.8, 2, 5, 64, 0, 600, ""),
    ("RTX-PRO-6000-MaxQ-96GB", "RTX Blackwell", 96, 1792, 438.9, 2, 5, 64, 0, 300, ""),
    ("GB10", "RTX Blackwell", 120, 273, 125.0, 2, 5, 16, 0, 140, "DGX Spark: memory is shared with the CPU"),
)  # fmt: skip


def rows() -> Iterator[dict[str, str]]:
    """Yield the boards as rows of the reference table."""
    for name, architecture, size, bandwidth, tflops, times, generation, pcie, nvlink, watts, note in _NVIDIA:
        yield {
            "name": name,
            "vendor": "NVIDIA",
            "architecture": architecture,
            "memory_gb": f"{size:g}",
            "mem_bw_gbs": f"{bandwidth:g}",
            "fp16_dense_tflops": f"{tflops:g}",
            "fp8_dense_tflops": f"{tflops * times:g}" if times else "",
            "nvlink_gbs": f"{nvlink:g}" if nvlink else "",
            "pcie_gen": str(generation),
            "pcie_gbs": str(pcie),
            "tdp_w": f"{watts:g}",
            "usd_per_hour": "",
            "price_source": "",
            "spec_source": _SHEET,
            "note": note,
        }
