"""aiconfigurator's answers to rows of its own table: reads JSON rows and prints one JSON answer per line.

`benchmarks.accuracy.silicon` runs this file in a Python that has aiconfigurator but not hetis, so it imports nothing
else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import sys
from collections import defaultdict

# aiconfigurator ships the same shapes under these names; it would download others.
GPT_OSS_EXPERTS = defaultdict(lambda: "w4a16_mxfp4", b200="w4a8_mxfp4_mxfp8", b300="w4a8_mxfp4_mxfp8")
NAMES = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
}


def main() -> None:
    logging.disable(logging.CRITICAL)
    remember_yaml()
    from aiconfigurator.cli.api import cli_estimate  # type: ignore[import-not-found]

    for line in sys.stdin:
        row = json.loads(line)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                name = NAMES.get(row["model_path"], row["model_path"])
                found = cli_estimate(name, row["system"], **asked(row))
            answer = {"id": row["id"], "ttft_ms": float(found.ttft), "tpot_ms": float(found.tpot)}
        except Exception as error:  # any exception means that it has no answer to this row
            answer = {"id": row["id"], "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)


def remember_yaml() -> None:
    """Parse each small YAML file once; aiconfigurator would read the same hundreds of files for every row."""
    import yaml

    parse, known = yaml.safe_load, dict[object, object]()

    def safe_load(stream: object) -> object:
        text = stream if isinstance(stream, str | bytes) else stream.read()  # type: ignore[attr-defined]
        if text not in known:
            known[text] = parse(text)
        return copy.deepcopy(known[text])

    yaml.safe_load = safe_load


def asked(row: dict[str, str]) -> dict[str, object]:
    """Return the row as arguments of ``cli_estimate``: requests of one replica, its sizes and formats, its drafts."""
    whole = {name: int(float(row[name])) for name in ("tp_size", "isl", "osl", "batch_size") if row[name]}
    for name in ("attention_dp_size", "moe_tp_size", "moe_ep_size"):
        if row[name] and float(row[name]) >= 1:
            whole[name] = int(float(row[name]))
    formats = {name: row[name] for name in ("gemm_quant_mode", "moe_quant_mode", "kvcache_quant_mode") if row.get(name)}
    if "gpt-oss" in row["model_path"]:  # the table calls its experts' format nvfp4 or fp8
        formats |= {"gemm_quant_mode": "bfloat16", "moe_quant_mode": GPT_OSS_EXPERTS[row["system"].partition("_")[0]]}
    drafts = {"nextn": row["nextn"], "nextn_accepted": row["nextn_accepted"]} if row.get("nextn") else {}
    return {"mode": "agg", "backend_name": row["backend"], "backend_version": None, **whole, **formats, **drafts}


if __name__ == "__main__":
    main()
