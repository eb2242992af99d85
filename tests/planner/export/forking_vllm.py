"""vLLM's server, whose ranks are forks of the engine's process, as on GPUs.

On CPUs vLLM starts each as a new process, which takes longer to import vLLM than to serve all requests of a test.
"""

from __future__ import annotations

import multiprocessing
import runpy

from vllm.v1.executor import multiproc_executor

# The engine's process is started anew and imports this file, too.
multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
