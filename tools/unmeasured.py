"""Architectures and boards without tables: the measured relative of each, and how its shares of the peaks differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetis.profiler.roofline import MemoryRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Boards without tables whose shares of the peaks differ from those of their architecture's measured board."""

    relative: str  # architecture with their other operators
    flop_share: float  # share of the catalogue's 16-bit peak that the fastest product reaches
    byte_share: float  # share of the catalogue's bandwidth that streaming reaches
    reason: str  # sources of both shares


# Hetis (SC'25) measured prefill MLP on a P100-12GB 24.5 times slower than on an A100-80GB; the peaks differ 16.7 times.
_PASCAL_COMPUTE = 24.5 / (312.0 / 18.7)
# TFLOPS of the fastest of many 16-bit products over the catalogue's peak, by one tool on the GPUs of both vendors
# (stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS"). AMD's own figures for eight bits
# agree for MI300X (1,273 beside an H100's 1,402.6: 1.46 times) and are less for MI325X (1,519: 1.22 times).
_H100_SHARE = 794.5 / 989.0
_CDNA3_COMPUTE = _H100_SHARE / math.sqrt((668.4 / 1307.4) * (784.9 / 1307.4))
_CDNA4_COMPUTE = _H100_SHARE / (1565.0 / 2516.6)
RELATIVES = {
    "Pascal": (
        "Ampere",
        _PASCAL_COMPUTE,
        "No tensor cores: the catalogue's fp16 peak is the CUDA cores'. Hetis (SC'25) measured MLPs on a P100-12GB "
        "24.5 times slower than on an A100-80GB where the peaks differ 16.7 times, so FLOPs take 1.47 times Ampere's "
        "share. Its 7.93 times for decode is read as that compute bound too (a batch above 20 leaves the memory roof "
        "of a P100), so the share of bandwidth is Ampere's. Attention is assumed to read KV once per head group; "
        "vLLM's own kernel for Pascal reads it once per query head.",
    ),
    "Volta": ("Ampere", 1.0, "Tensor cores and HBM of the generation before; no table."),
    "Turing": ("Ampere", 1.0, "Tensor cores of the generation before; no table, GDDR6 parts assumed like the A40."),
    "Blackwell": ("Hopper", 1.0, "The generation before, where B200 has none."),
    "RTX Blackwell": ("Ada", 1.0, "The boards without HBM of the generation before; only all-reduces over NVLink."),
    "CDNA": ("Ampere", 1.0, "Contemporary HBM part; no table. ROCm libraries may reach less of the peak."),
    "CDNA2": ("Ampere", 1.0, "Contemporary HBM part; no table. ROCm libraries may reach less of the peak."),
    "CDNA3": (
        "Hopper",
        _CDNA3_COMPUTE,
        "Contemporary HBM part; no table. 16-bit products reach at most 51% of the peak on an MI300X and 60% on an "
        "MI325X where an H100 reaches 80% (stas00/ml-engineering), so FLOPs take 1.45 times Hopper's share.",
    ),
    "CDNA4": (
        "Hopper",
        _CDNA4_COMPUTE,
        "Contemporary HBM part; no table. 16-bit products reach at most 62% of the peak on an MI355X where an H100 "
        "reaches 80% (stas00/ml-engineering), so FLOPs take 1.29 times Hopper's share.",
    ),
    "Gaudi2": ("Ampere", 1.0, "Contemporary HBM part; no table. Another programming model: the least certain of all."),
    "Gaudi3": ("Hopper", 1.0, "Contemporary HBM part; no table. Another programming model: the least certain of all."),
    "GCN": (
        "Ampere",
        _PASCAL_COMPUTE,
        "No matrix units, like Pascal, whose share of the peak it takes; no table.",
    ),
    "RDNA3": (
        "Ada",
        1.0,
        "GDDR6 part; no table. ROCm libraries may reach less of the peak.",
    ),
    "RDNA4": (
        "Ada",
        1.0,
        "GDDR6 part; no table. ROCm libraries may reach less of the peak.",
    ),
    "Ascend": ("Ampere", 1.0, "Contemporary HBM part; no table. Another programming model: the least certain of all."),
    "TPU": ("Ampere", 1.0, "Contemporary HBM part; no table. Another programming model: the least certain of all."),
    "Battlemage": ("Ada", 1.0, "GDDR6 part without products in eight bits; only all-reduces over NVLink."),
}
# Boards of an architecture that reach more of their peaks than the measured one, each with the shares of a 16-bit
# product and of streaming, and the sources. One tool's cuBLASLt (xzwgit/gpu-flops-bench, 5a32ae9e) makes products of
# different architectures comparable: it reaches 853.3 TFLOPS on an H200 NVL, 1.02 of the catalogue's peak.
H200_SHARE = 853.3 / 835.5
BOARDS = {
    "Ada GeForce": Board(
        relative="Ada",
        flop_share=179.2 / 165.2,
        byte_share=921.0 / 1008.0,
        reason="Ada's chips with GDDR6X, which has no ECC, and half the tensor rate (fp32 accumulation), which power "
        "does not limit as it does an L40S of 350 W. Products take Hopper's share of the rate that one tool's cuBLASLt "
        "reaches on both (108% of the peak on an RTX 4090, 102% on an H200 NVL; xzwgit/gpu-flops-bench, 5a32ae9e), and "
        "stream weights as clpeak streams (921 of 1,008 GB/s; krrishnarraj/clpeak issue 106)",
    ),
}
MEMORY = MemoryRule(
    usable_ratio=0.9,
    reserve_bytes=int(1.25 * 2**30),
    reason="assumed: engines take 0.90 to 0.95 of a card by default, the driver and ECC keep some; of the usable part "
    "1.25 GiB go to the CUDA context, captured graphs, collective buffers and workspaces",
)
