"""The command line of an attention worker.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from hetis.runtime.worker.options import WorkerOptions, read_options
from hetis.runtime.worker.process import StartError, run_process, serve_core


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    return run_process("worker", arguments, read_options, _serve)


def _serve(options: WorkerOptions) -> int:
    from hetis.formats.units import format_bytes
    from hetis.runtime.attention.cuda import cuda_count
    from hetis.runtime.attention.local import LocalDevice
    from hetis.runtime.kv.memory import free_memory_bytes
    from hetis.runtime.kv.shape import KvShape
    from hetis.runtime.transport.frames import Kind
    from hetis.runtime.worker.core import WorkerCore

    name, device = options.name, options.device

    def make_device(shape: KvShape) -> LocalDevice:
        made = LocalDevice(name, shape, options.kv_bytes // shape.page_bytes, device=device)
        made.warm()
        return made

    def make_core(key: bytes) -> WorkerCore:
        if device != "cpu" and int(device.partition(":")[2] or 0) >= cuda_count():
            raise StartError(f"{device} is not there: torch finds {cuda_count()} CUDA devices")
        # Now, and not when pages are first written: then the system would end the process.
        if options.kv_bytes > (free := free_memory_bytes(device)):
            asked = format_bytes(options.kv_bytes)
            raise StartError(f"--kv-memory is {asked}, {device} has {free >> 20}MiB free")
        if device == "cpu" and find_spec("numba"):
            _compile_for_cpu()
        return WorkerCore(name, make_device, key=key)

    return serve_core(
        "worker",
        options,
        make_core,
        greeting=Kind.HELLO,
        key=options.key,
        port_file=options.port_file,
    )


def _compile_for_cpu() -> None:
    """Compiles the kernels before engines may come, once a machine: it can take a minute."""
    from hetis.runtime.attention import paged_compiled
    from hetis.runtime.attention.local import LocalDevice
    from hetis.runtime.kv.shape import KvShape
    from hetis.solver.compiled import is_cached

    kernels: dict[str, Callable[..., None]] = {
        "float32": paged_compiled.attend,
        "bfloat16": paged_compiled.attend_bfloat16,
    }
    for dtype, kernel in kernels.items():
        if not is_cached(kernel):
            sizes = {"layers": 1, "head_dim": 16, "queries_per_group": 1, "page_tokens": 16}
            LocalDevice("none", KvShape(**sizes, dtype=dtype, scale=1.0, windows=(0,)), 1).warm()
