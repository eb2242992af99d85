"""Engines of others, in their own environment: `python -m benchmarks.measuring.engine_peers NAME MODEL MOST_TOKENS`.

MODEL is a Llama's folder, MOST_TOKENS the longest context. Nothing of ours but `engine_answering` is imported.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring.engine_answering import Generate, answer


def vllm(model: Path, most_tokens: int, *, eager: bool = False) -> Generate:
    """vLLM for CPUs as it comes, but for its cache of prefixes: the same prompts are asked again and again."""
    package: Any = importlib.import_module("vllm")
    engine = package.LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=most_tokens,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = package.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(found.outputs[0].token_ids) for found in engine.generate(asked, params, use_tqdm=False)]

    return generate


def vllm_eager(model: Path, most_tokens: int) -> Generate:
    """The same without its compiler."""
    return vllm(model, most_tokens, eager=True)


def ctranslate2(model: Path, most_tokens: int) -> Generate:
    """CTranslate2 in float32. Its converter wants a tokenizer, of which nothing but the list of tokens is used."""
    package: Any = importlib.import_module("ctranslate2")
    with tempfile.TemporaryDirectory(prefix="hetis-ctranslate2-") as folder:
        copy, converted = Path(folder) / "model", Path(folder) / "converted"
        shutil.copytree(model, copy)
        vocab = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        _write_tokenizer(copy, vocab)
        package.converters.TransformersConverter(str(copy)).convert(str(converted), quantization="float32")
        engine = package.Generator(str(converted), device="cpu", compute_type="float32", intra_threads=1)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        found = engine.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            min_length=tokens,
            max_length=tokens,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
        )
        return [list(one.sequences_ids[0]) for one in found]

    return generate


def transformers(model: Path, most_tokens: int) -> Generate:
    """transformers' own `generate`, the batch at once: the text that the others must give."""
    import torch

    package: Any = importlib.import_module("transformers")
    torch.set_num_threads(1)
    engine = package.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            out = engine.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    return generate


def _write_tokenizer(folder: Path, vocab: int) -> None:
    vocabulary = {f"t{i}": i for i in range(vocab)}
    whole: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole["version"], whole["added_tokens"], whole["pre_tokenizer"] = "1.0", [], {"type": "Whitespace"}
    whole["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    # The converter hands these on, and its reader takes no null; none of them is looked at when tokens are given.
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict.fromkeys(
        ("bos_token", "eos_token", "unk_token"), "t0"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


PEERS = {
    "vllm": vllm,
    "vllm-eager": vllm_eager,
    "ctranslate2": ctranslate2,
    "transformers": transformers,
}

if __name__ == "__main__":
    name, folder, most = sys.argv[1:]
    answer(lambda: PEERS[name](Path(folder), int(most)))
