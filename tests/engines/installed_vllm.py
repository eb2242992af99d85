"""The installed vLLM's answers about GPUs, checkpoints and command lines, all from one process.

vLLM takes ten seconds to import, longer than all questions here.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from tests.runtime.launch.vllm_python import ENVIRONMENT, PYTHON

# Reads {"lines": command lines, "configs": quantization configs, "at": capabilities}, and prints vLLM's reading of
# each. Lines are parsed as `vllm serve` does.
_PROGRAM = """
import json, sys, types
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("kernels of CUDA, which nothing here calls")
from transformers import Gemma3Config
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.model_executor.layers.quantization import (
    DEPRECATED_QUANTIZATION_METHODS, QUANTIZATION_METHODS, get_quantization_config
)
from vllm.platforms.cuda import _get_backend_priorities
from vllm.platforms.interface import DeviceCapability
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase
)
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string
from vllm.v1.attention.backends.registry import AttentionBackendEnum

# A CPU without AVX-512 has loaded _C_AVX2, and dies if a backend for other devices loads the same kernels again.
sys.modules.setdefault("vllm._C", types.ModuleType("kernels of another CPU"))
asked = json.load(sys.stdin)
parser = FlexibleArgumentParser()
serve = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
said = {"parsed": [], "capabilities": {}, "runs": {}, "options": [one.option_strings for one in serve._actions]}
for words in asked["lines"]:
    args = parser.parse_args(words)
    said["parsed"].append({
        "model": args.model_tag, "tp": args.tensor_parallel_size, "pp": args.pipeline_parallel_size,
        "nodes": args.nnodes, "rank": args.node_rank, "headless": args.headless, "seats": args.max_num_seqs,
        "tokens": args.max_num_batched_tokens, "backend": args.attention_backend,
        "connector": args.kv_transfer_config and args.kv_transfer_config.kv_connector,
        "executor": args.distributed_executor_backend, "kv": args.kv_cache_memory_bytes, "dtype": args.dtype,
        "context": args.max_model_len, "kv_dtype": args.kv_cache_dtype,
        "hybrid_off": args.disable_hybrid_kv_cache_manager,
        "sharing": [args.data_parallel_size, args.enable_expert_parallel],
        "deprecated": args.allow_deprecated_quantization,
        "drafts": args.speculative_config
        and [args.speculative_config["method"], args.speculative_config["num_speculative_tokens"]],
    })
said["kv"] = [get_kv_cache_quant_algo_string(one) for one in asked["configs"]]
said["image"] = Gemma3Config().mm_tokens_per_image
for kind in ("gemma3", "gemma3_text", "llama4", "mistral3", "qwen3_vl"):
    config = types.SimpleNamespace(model_type=kind)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(kind, ModelArchConfigConvertorBase)(config, config)
    said.setdefault("undivided", {})[kind] = convertor.is_mm_prefix_lm()
said |= {"methods": QUANTIZATION_METHODS, "deprecated": DEPRECATED_QUANTIZATION_METHODS}
for name in ("fp8", "mxfp4", "modelopt_fp4", "awq", "gptq", "fbgemm_fp8"):
    try:
        said["capabilities"][name] = get_quantization_config(name).get_min_capability()
    except Exception:
        pass
at = [DeviceCapability(int(one), round(one % 1 * 10)) for one in asked["at"]]
said["order"] = [[[one.name for one in _get_backend_priorities(mla, c)] for c in at] for mla in (False, True)]
for one in AttentionBackendEnum:
    try:
        said["runs"][one.name] = [one.get_class().supports_compute_capability(c) for c in at]
    except Exception:
        pass  # what it imports is not installed
print("SAID", json.dumps(said))
"""


def said_by_vllm(
    lines: Sequence[Sequence[str]], configs: Sequence[dict[str, Any]], at: Sequence[float]
) -> dict[str, Any]:
    """Return its answers about the words after ``vllm``, quantization configs, and compute capabilities."""
    done = subprocess.run(
        [str(PYTHON), "-c", _PROGRAM],
        input=json.dumps({"lines": lines, "configs": configs, "at": at}),
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    said: dict[str, Any] = json.loads(line.removeprefix("SAID "))
    return said
