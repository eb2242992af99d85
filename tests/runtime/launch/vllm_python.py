"""vLLM's own virtual environment, which `make vllm` makes: its Python, and the variables that a run there needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.processes import ON_CPUS, kernel_cache

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HETIS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
ROOTS = ("engines", "formats", "planner", "profiler", "proto", "runtime", "simulator", "solver")
PYTHONPATH = os.pathsep.join(str(ROOT / name) for name in ROOTS)  # this tree's, even in the environment of another
needs_vllm = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"NOT TESTED: vLLM is not installed in {PYTHON.parents[1]} (make vllm)"
)
VARIABLES = (
    {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    | ON_CPUS
    | kernel_cache(PYTHON)
)
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "HETIS_VLLM_CONFIG"} | VARIABLES
