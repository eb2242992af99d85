"""Small random checkpoints of every family, with heads that vLLM's CPU kernels support, and transformers' answers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "qwen3_moe"),
    *("phi3", "cohere2", "granite"),
)
WINDOW = 48  # tokens; shorter than most prompts of the tests


def make_checkpoint(family: str, folder: Path) -> Path:
    """A float32 model of four layers with 8 query and 4 KV heads. Returns ``folder``."""
    import torch
    import transformers

    common = {
        "vocab_size": 997,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        # Large weights: a wrong head or block changes the text at once.
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": WINDOW}),
        # Every second layer has a sliding window. vLLM's Gemma2 has no separate output layer: embeddings are tied.
        "gemma2": (
            transformers.Gemma2Config,
            transformers.Gemma2ForCausalLM,
            {
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 32,
                "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 15.0,
                "tie_word_embeddings": True,
                "initializer_range": 0.1,
            },
        ),
        "gemma3": (
            transformers.Gemma3TextConfig,
            transformers.Gemma3ForCausalLM,
            {
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 32,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "tie_word_embeddings": True,
            },
        ),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {}),
        "cohere2": (
            transformers.Cohere2Config,
            transformers.Cohere2ForCausalLM,
            {
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "tie_word_embeddings": True,
                "logit_scale": 1.0,
            },
        ),
        "granite": (
            transformers.GraniteConfig,
            transformers.GraniteForCausalLM,
            {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        ),
        "qwen3_moe": (
            transformers.Qwen3MoeConfig,
            transformers.Qwen3MoeForCausalLM,
            {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
        ),
    }
    make_config, make_model, own = kinds[family]
    if family in ("qwen2", "phi3", "granite"):
        del common["head_dim"]  # the config has no head_dim: it is hidden size over heads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = make_model(make_config(**(common | own))).float()
        if family == "gemma3":  # which multiplies them by 16: with large ones a token would be followed by itself
            model.get_input_embeddings().weight.data *= 0.02
        for parameter in model.parameters():  # biases and norms begin at 0 and 1, which would prove nothing
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def said_by_transformers(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return greedy continuations in float32, computed one request at a time."""
    import torch
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type == "cohere2":  # whose layers see one token more in vLLM, as they were trained to
            config.sliding_window += 1
        made = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        model: Any = made.eval()
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
            answers.append(out[0, len(prompt) :].tolist())
    return answers
