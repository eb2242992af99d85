"""Small random checkpoints, and what transformers makes of them: the oracle of the engine's tests."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

VOCAB = 97
# Large weights make a random model's tokens depend on everything: a wrong head or block shows at once.
INITIALIZER_RANGE = 0.3
_FOLDERS: list[Path] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint on disk and the same model in transformers."""

    folder: Path
    config: Any
    model: Any
    answers: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy continuation by transformers, one request at a time."""
        key = tuple(prompt), tokens
        if key not in self.answers:
            ids = torch.tensor([prompt])
            # Said in full: transformers takes tokens equal to its padding for padding.
            mask = torch.ones_like(ids)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                out = self.model.generate(
                    ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
                )
            self.answers[key] = out[0, len(prompt) :].tolist()
        return self.answers[key]


def random_model(
    family: str = "llama", *, q_heads: int = 8, kv_heads: int = 4, dtype: str = "float32", seed: int = 0, **more: Any
) -> Model:
    """A model of three layers; ``more`` are fields of its config. Made once per process."""
    return _random_model(family, q_heads, kv_heads, dtype, seed, json.dumps(more))


@cache
def _random_model(family: str, q_heads: int, kv_heads: int, dtype: str, seed: int, more: str) -> Model:
    import transformers

    sizes = {"vocab_size": VOCAB, "hidden_size": 8 * q_heads, "num_hidden_layers": 3, "num_attention_heads": q_heads}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"max_position_embeddings": 512, "initializer_range": INITIALIZER_RANGE}
    gated = {"intermediate_size": 96, "num_key_value_heads": kv_heads}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, gated),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, gated | {"sliding_window": None}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, gated),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, gated | {"head_dim": 16}),
        "opt": (
            transformers.OPTConfig,
            transformers.OPTForCausalLM,
            {"ffn_dim": 96, "word_embed_proj_dim": 8 * q_heads, "init_std": INITIALIZER_RANGE},
        ),
    }
    make_config, make_model, own = kinds[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = make_config(**(sizes | ids | common | own | json.loads(more)))
        model = make_model(config).eval().to(getattr(torch, dtype))
        for parameter in model.parameters():  # biases and norms begin at 0 and 1: they would prove nothing
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        folder = Path(tempfile.mkdtemp(prefix="hetis-model-"))
        model.save_pretrained(folder)
    _FOLDERS.append(folder)
    return Model(folder=folder, config=config, model=model)


def remove_checkpoints() -> None:
    """What `random_model` made on disk goes."""
    _random_model.cache_clear()
    while _FOLDERS:
        shutil.rmtree(_FOLDERS.pop(), ignore_errors=True)


def random_prompts(seed: int, count: int, *, shortest: int = 3, longest: int = 70) -> list[list[int]]:
    """Prompts of random tokens."""
    chooser = random.Random(seed)
    return [[chooser.randrange(VOCAB) for _ in range(chooser.randint(shortest, longest))] for _ in range(count)]


def rewrite_config(folder: Path, into: Path, **fields: Any) -> Path:
    """A copy of a model folder with other fields in its config.json."""
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text(encoding="utf-8"))
    (into / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return into
