"""vLLM's server, whose engine and ranks are forks, as on GPUs. A forked engine ends with exit code 1 now and then.

On CPUs vLLM starts each as a new process, and importing vLLM takes longer than all requests of a test.
"""

from __future__ import annotations

import multiprocessing
import runpy

from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor

utils.get_mp_context = multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
