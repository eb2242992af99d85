"""Make the demos' model, and print transformers' answer: ``python -m examples.demo_serve.model FOLDER [QUESTION N]``.

Run by the Python that has vLLM, which brings transformers along. The answer is one line of JSON with the text of N
tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from examples.demo_serve.checkpoint import Sizes, make_checkpoint

SIZES = Sizes(head_dim=256)  # attention heavy enough that moving heads pays on a fast CPU


def greedy_text(model: Path, question: str, tokens: int) -> str:
    """Return the answer of ``tokens`` tokens to a question, in one process without hetis."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.generation_config.eos_token_id = None  # chat requests ignore it, too
    length = prompt["input_ids"].shape[1]
    with torch.inference_mode():
        found = loaded.generate(**prompt, do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(found[0, length:], skip_special_tokens=True))


if __name__ == "__main__":
    folder = make_checkpoint(Path(sys.argv[1]), sizes=SIZES)
    if len(sys.argv) > 2:
        print(json.dumps({"text": greedy_text(folder, sys.argv[2], int(sys.argv[3]))}))
