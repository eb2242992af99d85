"""Random Llamas on which the engines must agree."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The dimensions of a Llama."""

    hidden: int
    middle: int
    layers: int
    q_heads: int
    kv_heads: int
    vocab: int


SMALL = ModelSize(hidden=768, middle=2048, layers=12, q_heads=12, kv_heads=4, vocab=32_000)  # 124M parameters
HALF = ModelSize(hidden=512, middle=1408, layers=8, q_heads=8, kv_heads=4, vocab=16_000)  # 40M, head dimension 64
TINY = ModelSize(hidden=128, middle=256, layers=3, q_heads=8, kv_heads=4, vocab=1_000)


def write_model(folder: Path, size: ModelSize, *, most_tokens: int) -> None:
    """Write a float32 checkpoint with weights so large that a wrong head or block changes the text."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.middle,
        num_hidden_layers=size.layers,
        num_attention_heads=size.q_heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=most_tokens,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
