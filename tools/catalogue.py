"""Make the catalogue files from reference tables: ``python -m tools.catalogue --data DIR``.

The tables belong to others and stay outside the repository. Only the facts that hetis uses are committed, each row with
its source. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.layers import described_in_short, model_in_short
from hetis.formats.models import dtypes
from hetis.formats.models.document import load_model
from hetis.formats.traces import length_bins
from hetis.solver.cluster import GpuType
from hetis.solver.model import ModelSpec
from tools import further_gpus

GIB = 2**30
_ORDER = ("name", "num_layers", "hidden", "intermediate", "q_heads", "kv_heads", "head_dim", "vocab", "attention")
_CONFIGS = Path(__file__).parents[1] / "tests" / "formats" / "huggingface"
# Billions of all and of active parameters, as the model cards state.
_PUBLISHED_B = {
    "deepseek-ai/DeepSeek-V3.2": (671, 37),
    "zai-org/GLM-4.5": (355, 32),
    "zai-org/GLM-5": (744, 40),
    "zai-org/GLM-5.2": (744, 40),
    "moonshotai/Kimi-K2.5": (1026, 32),
    "MiniMaxAI/MiniMax-M2.5": (229, 10),
    "MiniMaxAI/MiniMax-M2.7": (229, 10),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (480, 35),
    "Qwen/Qwen3.5-27B": (27.4, 27.4),
    "Qwen/Qwen3.5-35B-A3B": (35, 3),
    "Qwen/Qwen3.5-122B-A10B": (122, 10),
    "Qwen/Qwen3.5-397B-A17B": (397, 17),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (31.1, 3),
    "google/gemma-3-1b-it": (1.0, 1.0),
    "google/gemma-3-27b-it": (27.4, 27.4),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (108, 17),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (400, 17),
    "mistralai/Mistral-Large-3-675B-Instruct-2512": (675, 41),
}
MAX_BINS = 600
# Boards of an architecture that reach other shares of their peaks than its data-centre boards (`tools.efficiency`).
_ARCHITECTURES = {
    "RTX-4090": "Ada GeForce",
    "RTX-5090": "RTX Blackwell",
    "RTX-PRO-6000-Server-96GB": "RTX Blackwell",
}
# Memory of boards whose GB are not GiB: what drivers report (aiconfigurator-core 0.12.0, b300_sxm.yaml: 288,400,343,040
# bytes; nvidia-smi on a GB300 NVL72: 284,208 MiB).
_MEMORY_MIB = {"B300-SXM-288GB": 275_040, "GB300-per-GPU": 284_208}
# Boards whose GPUs are all connected by NVLink, Infinity Fabric or RoCE; on PCIe boards a bridge connects only two.
_SWITCHED = re.compile(r"SXM|^GB\d|^GH\d|^H20(-3e|$)|^MI\d|^Gaudi|^Ascend|^TPU")
# In these models every second layer has a sliding window; in the others all do.
_ALTERNATING_WINDOW = re.compile(r"gemma-2|gpt-oss")


def build(data: Path) -> dict[str, str]:
    """Return the text of every catalogue file by its name below ``catalogue/data``."""
    files = {
        "gpus.json": _rows("gpus", [_gpu(row) for row in (*_table(data / "gpus.csv"), *further_gpus.rows())]),
        "models.json": _rows("models", [*(_model(row) for row in _table(data / "models.csv")), *_of_configs()]),
    }
    names = []
    for row in _table(data / "traces" / "index.csv"):
        name = row["file"].removesuffix(".csv.gz")
        names.append(name)
        files[f"workloads/{name}.json"] = _workload(row, data / "traces" / row["file"])
    files["workloads.json"] = json.dumps({"workloads": names}, indent=1) + "\n"
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the catalogue files from reference tables.")
    parser.add_argument("--data", type=Path, required=True, help="folder with gpus.csv, models.csv and traces/")
    ours = Path(catalogue.__file__).parent / "data"
    parser.add_argument("--out", type=Path, default=ours, help="default: the package's own")
    arguments = parser.parse_args()
    for name, text in build(arguments.data).items():
        path = arguments.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {len(text)} bytes")


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _rows(name: str, rows: list[dict[str, Any]]) -> str:
    """Return JSON with one row per line, so that changing one fact changes one line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"{name}": [\n{lines}\n]}}\n'


def _number(text: str) -> float | None:
    return float(text) if text else None


def _scaled(text: str, scale: float) -> float | None:
    return float(text) * scale if text else None


def _gpu(row: dict[str, str]) -> dict[str, Any]:
    both_directions = _scaled(row["nvlink_gbs"], 1e9)
    switched = both_directions is not None and _SWITCHED.search(row["name"])
    gpu = GpuType(
        name=row["name"],
        architecture=_ARCHITECTURES.get(row["name"], row["architecture"]),
        memory_bytes=_memory_bytes(row),
        mem_bytes_per_s=float(row["mem_bw_gbs"]) * 1e9,
        fp16_flops=float(row["fp16_dense_tflops"]) * 1e12,
        fp8_flops=_scaled(row["fp8_dense_tflops"], 1e12),
        pcie_bytes_per_s=float(row["pcie_gbs"]) * 1e9,
        nvlink_bytes_per_s=both_directions / 2 if switched and both_directions else None,
        usd_per_hour=_number(row["usd_per_hour"]),
        vendor=row["vendor"],
    )
    return {
        "gpu": dataclasses.asdict(gpu),
        "tdp_w": _number(row["tdp_w"]),
        "price_source": row["price_source"] or None,
        "spec_source": row["spec_source"],
        "note": row["note"] or None,
    }


def _memory_bytes(row: dict[str, str]) -> int:
    if (mib := _MEMORY_MIB.get(row["name"])) is not None:
        return mib * 2**20
    return int(float(row["memory_gb"]) * GIB)  # vendors print GiB of GPU memory as GB


def _model(row: dict[str, str]) -> dict[str, Any]:
    def whole(column: str) -> int:
        return int(float(row[column]))

    mla, moe = None, None
    if row["attention"] == "mla":
        mla = {
            "kv_lora_rank": whole("kv_lora_rank"),
            "qk_rope_head_dim": whole("qk_rope_head_dim"),
            "qk_nope_head_dim": whole("qk_nope_head_dim"),
            "v_head_dim": whole("v_head_dim"),
            "q_lora_rank": whole("q_lora_rank") if row["q_lora_rank"] else None,
        }
    if row["moe_experts"]:
        moe = {
            "num_experts": whole("moe_experts"),
            "active_experts": whole("moe_active"),
            "expert_intermediate": whole("moe_intermediate"),
            "shared_experts": whole("moe_shared_experts"),
            "first_dense_layers": whole("first_dense_layers"),
        }
    model = model_in_short(
        name=row["model"],
        num_layers=whole("layers"),
        hidden=whole("hidden"),
        intermediate=whole("intermediate"),
        q_heads=whole("q_heads"),
        kv_heads=whole("kv_heads"),
        head_dim=whole("head_dim"),
        vocab=whole("vocab"),
        activation_bytes=dtypes.base_bytes(row["dtype"]),
        embedding_bytes=dtypes.base_bytes(row["dtype"]),
        gated_mlp=row["gated_mlp"] == "True",
        tie_embeddings=row["tie_embeddings"] == "True",
        max_position=whole("max_position"),
        sliding_window=whole("sliding_window") if row["sliding_window"] else None,
        sliding_layers=-(-whole("layers") // 2) if _ALTERNATING_WINDOW.search(row["model"]) else None,
        float16="gemma-2" not in row["model"],
        mla=mla,
        moe=moe,
    )
    model = dataclasses.replace(model, weight_bytes=dtypes.layer_weight_bytes(row["dtype"], model))
    model = dataclasses.replace(model, weights=row["dtype"].partition("+")[2])
    return {
        "model": _row(model),
        "dtype": row["dtype"],
        "params_b": float(row["params_b"]),
        "active_params_b": float(row["active_params_b"]),
        "source": row["source"],
    }


def _of_configs() -> Iterator[dict[str, Any]]:
    """Yield the models that the tables lack, from the ``config.json`` published with them."""
    for name, (params_b, active_params_b) in _PUBLISHED_B.items():
        path = _CONFIGS / f"{name.replace('/', '__')}.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        model = dataclasses.replace(load_model(path), name=name)
        if not abs(model.params() / 1e9 - params_b) <= 0.01 * params_b:
            raise ValueError(f"{path}: {model.params() / 1e9:.1f} billion parameters, published are {params_b}")
        yield {
            "model": _row(model),
            "dtype": "+".join(filter(None, (config.get("torch_dtype", "bfloat16"), model.weights))),
            "params_b": params_b,
            "active_params_b": active_params_b,
            "source": "config.json and model card",
        }


def _row(model: ModelSpec) -> dict[str, Any]:
    """Return the fields of a model in short that differ from their defaults."""
    short = described_in_short(model.layers)
    assert short is not None, f"{model.name} has layers of unlike shape"
    usual = {"gated_mlp": True, "shared_experts": 0, "first_dense_layers": 0, "every": 1, "gated_attention": False}

    def unusual(shape: dict[str, Any]) -> dict[str, Any]:
        return {
            name: unusual(v) if isinstance(v, dict) else v
            for name, v in shape.items()
            if v not in (None, usual.get(name))
        }

    given = {name: value for name, value in _given(model).items() if name not in ("name", "layers")}
    found = {"name": model.name, "attention": model.attention.name, **unusual(short), **given}
    return {name: found[name] for name in (*_ORDER, *found) if name in found}


def _given(shape: Any) -> dict[str, Any]:
    """Return the fields that a dataclass was given and that differ from their defaults."""
    values = ((field, getattr(shape, field.name)) for field in dataclasses.fields(shape) if field.init)
    return {
        field.name: _given(value) if dataclasses.is_dataclass(value) else value
        for field, value in values
        if value != field.default
    }


def _workload(row: dict[str, str], path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        requests = [(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)]
    lengths = np.array(requests, dtype=np.int64)
    bins = length_bins(lengths[:, 0], lengths[:, 1], max_bins=MAX_BINS)
    recorded = row["arrivals"] == "recorded"
    head = {
        "num_requests": len(requests),
        "arrivals": row["arrivals"],
        "rate_rps": float(row["mean_rate_rps"]) if recorded else None,  # a synthetic rate says nothing about the source
        "source": row["source"],
        "licence": row["licence"],
        "note": row["note"],
    }
    lines = ",\n".join(json.dumps([b.prompt_tokens, b.output_tokens, b.weight]) for b in bins)
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "bins": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
