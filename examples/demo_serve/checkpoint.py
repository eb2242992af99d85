"""A tiny model with random weights: config, weights, tokenizer and chat template in a Hugging Face folder.

The tokenizer is a byte-level BPE trained on this repository's licence. The model's answers make no sense, but must be
exactly the same however its heads are distributed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

TEXT = Path(__file__).parents[2] / "LICENSE"  # never changes, and with it neither tokens nor answers
BEGIN, END, MESSAGE = "<|begin|>", "<|end|>", "<|message|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' ~ message.role ~ ' is unknown') }}"
    "{% endif %}"
    "<|message|>{{ message.role }}\n{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|message|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a Llama; r = q_heads / kv_heads. A ``head_dim`` of None means hidden / q_heads."""

    layers: int = 4
    hidden: int = 128
    intermediate: int = 256
    q_heads: int = 16
    kv_heads: int = 8
    vocab: int = 512
    max_tokens: int = 2048
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.q_heads


def make_checkpoint(folder: Path, *, sizes: Sizes | None = None, seed: int = 0) -> Path:
    """Write the model into ``folder``, which is created; the same sizes and seed give the same bytes."""
    sizes = sizes or Sizes()
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, sizes.vocab)
    write_config(folder, sizes)
    _write_weights(folder, sizes, seed)
    return folder


def _write_tokenizer(folder: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, END, MESSAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_config(folder: Path, sizes: Sizes) -> None:
    """Write the model's config.json, which is all that a plan needs of it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.q_heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.max_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_weights(folder: Path, sizes: Sizes, seed: int) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Large weights make every token depend on every head, so that a wrong one shows at once.
        return torch.randn(rows, columns, generator=generator) * 0.3

    def norm() -> torch.Tensor:
        return 1 + 0.3 * torch.randn(sizes.hidden, generator=generator)

    head_dim = sizes.head_size
    tensors = {"model.embed_tokens.weight": matrix(sizes.vocab, sizes.hidden)}
    for layer in range(sizes.layers):
        shapes = {
            "self_attn.q_proj": (sizes.q_heads * head_dim, sizes.hidden),
            "self_attn.k_proj": (sizes.kv_heads * head_dim, sizes.hidden),
            "self_attn.v_proj": (sizes.kv_heads * head_dim, sizes.hidden),
            "self_attn.o_proj": (sizes.hidden, sizes.q_heads * head_dim),
            "mlp.gate_proj": (sizes.intermediate, sizes.hidden),
            "mlp.up_proj": (sizes.intermediate, sizes.hidden),
            "mlp.down_proj": (sizes.hidden, sizes.intermediate),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = norm()
    tensors["model.norm.weight"] = norm()
    tensors["lm_head.weight"] = matrix(sizes.vocab, sizes.hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
