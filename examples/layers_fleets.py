"""Write ``layers-24.yaml`` and ``layers-42.yaml``: fleets of one-GPU nodes with times from a roofline.

    python -m examples.layers_fleets

Nothing in these files is measured. For Llama-2-70B in 16 bits, with W bytes and F FLOPs per token of one layer, K bytes
of KV per token and layer, and a GPU of memory M, bandwidth B and peak C:

    one layer, n prompt tokens       0.02 ms + max( W / (0.8 B),  n F / (0.5 C) )
    one layer, b decoding sequences  0.02 ms + max( W / (0.8 B),  b F / (0.5 C) ) + b (P + O) K / (0.8 B)
    KV entries beside k layers       (0.9 M - 1 GiB - k W) / K, at least a tenth of M / K
    tokens/s at k layers             (P + O) / (k (prompt + O decode(b) / b)),  b = KV entries / (L (P + 2 O))

The last is the rate of a node in an even chain of L / k such stages whose KV room it fills; b requests are at the node
at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hetis.formats import catalogue
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec

FOLDER = Path(__file__).parent
MODEL = "Llama-2-70B"
PROMPT, OUTPUT = 900, 250
FLEETS = {
    "layers-24": {"A100-PCIe-40GB": 4, "L4": 8, "T4": 12},
    "layers-42": {"A100-PCIe-40GB": 4, "RTX-A6000": 4, "V100-PCIe-16GB": 6, "A10": 6, "RTX-3090": 6, "L4": 8, "T4": 8},
}
PROMPTS = (1, 64, 128, 256, 512, 1024, 2048, 4096)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def main() -> None:
    """Write both files."""
    for name, counts in FLEETS.items():
        (FOLDER / f"{name}.yaml").write_text(text(fleet(name, counts)), encoding="utf-8")


def text(document: dict[str, Any]) -> str:
    """Return the document as YAML, with a list of numbers on one line."""
    header = f"# Made by `python -m examples.layers_fleets`: {MODEL} in 16 bits, roofline times, nothing measured.\n"
    return header + yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=118)


def fleet(name: str, counts: dict[str, int]) -> dict[str, Any]:
    """Return the document of a fleet with these counts of nodes by GPU type."""
    model = catalogue.find_model(MODEL).model
    return {
        "apiVersion": "hetis/v1",
        "kind": "LayersProblem",
        "name": name,
        "num_layers": model.num_layers,
        "node_types": {gpu: node_type(catalogue.find_gpu(gpu).gpu, model, count) for gpu, count in counts.items()},
        "mean_prompt_tokens": PROMPT,
        "mean_output_tokens": OUTPUT,
        "links": {"bandwidth": "10Gbps", "latency": "1ms", "activation_bytes": 2 * model.hidden},
    }


def node_type(gpu: GpuType, model: ModelSpec, count: int) -> dict[str, Any]:
    """Return ``count`` nodes with one GPU each."""
    kv_bytes = 2 * model.kv_heads * model.head_dim * 2
    weights = 2 * layer_parameters(model)
    room = {k: (0.9 * gpu.memory_bytes - 2**30 - k * weights) / kv_bytes for k in range(1, model.num_layers + 1)}
    kept = {k: entries for k, entries in room.items() if entries >= 0.1 * gpu.memory_bytes / kv_bytes}
    return {
        "count": count,
        "tokens_per_s": [round(rate(gpu, model, k, entries), 2) for k, entries in kept.items()],
        "kv_token_layers": [int(entries) for entries in kept.values()],
        "layer_ms": {
            "prompt": [[n, round(1e3 * prompt_s(gpu, model, n), 4)] for n in PROMPTS],
            "decode": [[b, round(1e3 * decode_s(gpu, model, b), 4)] for b in SEQUENCES],
        },
    }


def layer_parameters(model: ModelSpec) -> int:
    """Return the number of weights of one layer: attention and a gated MLP."""
    heads = 2 * model.q_heads + 2 * model.kv_heads
    return model.hidden * (heads * model.head_dim + 3 * model.intermediate)


def prompt_s(gpu: GpuType, model: ModelSpec, tokens: float) -> float:
    """Return the seconds of one layer for a prompt."""
    parameters = layer_parameters(model)
    return 2e-5 + max(2 * parameters / (0.8 * gpu.mem_bytes_per_s), tokens * 2 * parameters / (0.5 * gpu.fp16_flops))


def decode_s(gpu: GpuType, model: ModelSpec, sequences: float) -> float:
    """Return the seconds of one layer for a decode step."""
    kv_bytes = sequences * (PROMPT + OUTPUT) * 2 * model.kv_heads * model.head_dim * 2
    return prompt_s(gpu, model, sequences) + kv_bytes / (0.8 * gpu.mem_bytes_per_s)


def rate(gpu: GpuType, model: ModelSpec, held: int, entries: float) -> float:
    """Return the tokens per second of a node with this number of layers and KV entries."""
    batch = max(1.0, entries / (model.num_layers * (PROMPT + 2 * OUTPUT)))
    request_s = held * (prompt_s(gpu, model, PROMPT) + OUTPUT * decode_s(gpu, model, batch) / batch)
    return (PROMPT + OUTPUT) / request_s


if __name__ == "__main__":
    main()
