"""``hetis-launch`` as tests run it, and real vLLM with the answers of the model itself."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from examples.demo_serve.checkpoint import Sizes
from examples.processes import free_ports
from tests.command_line import command_of, environment
from tests.runtime.launch.vllm_python import PYTHON, PYTHONPATH, VARIABLES

COMMAND = command_of("hetis.runtime.launch")
FAKE = f"{sys.executable} {Path(__file__).parent / 'fake_vllm.py'} serve"


class Launched:
    """A running `hetis-launch`, seen through its log and its front end's answers."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process, self.url, self._log = process, url, log

    def pids(self, name: str) -> list[int]:
        """Return the ids that a process had, the current one last."""
        return [int(found) for found in re.findall(rf" {re.escape(name)}: process (\d+)", self.log())]

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_until(self, holds: Callable[[], bool], *, limit_s: float = 600) -> None:
        deadline_s = time.monotonic() + limit_s
        while not holds():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.2)

    def serves(self) -> bool:
        return answers(self.url)

    def completes(self, prompt: list[int], tokens: int) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=300)
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found


@contextmanager
def launched(folder: Path, vllm: str, *options: str, ports: int, log: Path) -> Iterator[Launched]:
    """Start the plan in a folder, entirely on this machine, on free ports."""
    port = free_ports(ports + 2)
    command = [*COMMAND, "processes", "--plan", "plan.json", "--model", "models/tiny", "--all-here", "--device", "cpu"]
    command += ["--vllm", vllm, "--worker-port", str(port + 2), "--master-port", str(port + 1), "--kv-tokens", "4000"]
    command += ["--dtype", "float32", "--", "--port", str(port), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment(OMP_NUM_THREADS="1"))
    try:
        yield Launched(process, log, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.terminate()
        process.wait(60)


def is_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # the latter: it ended between opening and reading
        return True
    # A zombie whose parent is gone, too: no process has collected its exit code yet.
    return stat.rpartition(")")[2].split()[0] == "Z"


def answers(url: str) -> bool:
    """Return whether a server is healthy. `httpx.get` would read all certificates, which takes 30 ms of CPU time."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def vllm_of(*words: str) -> str:
    """vLLM's program in its own environment, with the sources of this tree."""
    own = [f"{name}={text}" for name, text in (VARIABLES | {"PYTHONPATH": PYTHONPATH}).items()]
    return shlex.join(["env", "-u", "VLLM_CPU_KVCACHE_SPACE", *own, str(PYTHON), *words])


def alone(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return the completions of transformers."""
    import torch
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    how = transformers.GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = whole.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        found.append(out[0, len(prompt) :].tolist())
    return found


PROMPTS = [[5 + (i * 7 + j) % 400 for j in range(20 + 10 * i)] for i in range(3)]
REAL = Sizes(hidden=256, intermediate=320, q_heads=8, kv_heads=4)  # heads that vLLM's CPU kernels support
FEW = ("--max-model-len", "256", "--enforce-eager")


def check_openai_client(url: str) -> None:
    """Check that whole and streamed chats agree for OpenAI's client."""
    import openai  # imported here, as it takes a second and few runs of this file need it

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
    asked |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12
