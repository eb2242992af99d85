"""The command line of a stage process.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetis.runtime.stages.options import StageOptions, read_options
from hetis.runtime.worker.process import StartError, run_process, serve_core


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the stage that an engine says, until SIGTERM or SIGINT; returns the exit code."""
    return run_process("stage", arguments, read_options, _serve)


def _serve(options: StageOptions) -> int:
    from hetis.runtime.attention.device import AttentionDevice
    from hetis.runtime.kv.shape import KvShape
    from hetis.runtime.launch.compute import torch_devices
    from hetis.runtime.launch.errors import LayoutError
    from hetis.runtime.launch.meetings import Meetings
    from hetis.runtime.model.config import read_config
    from hetis.runtime.model.errors import ModelError
    from hetis.runtime.stages.core import StageCore
    from hetis.runtime.stages.setup import StageBuilder
    from hetis.runtime.transport.connecting import look_up, open_store
    from hetis.runtime.transport.frames import Kind

    def store() -> Any:
        return open_store("{}:{}".format(*options.store), is_master=False, timeout_s=options.timeout_s)

    workers = Meetings(store, timeout_s=options.timeout_s)  # each engine opens the store anew

    def join_worker(worker: str, shape: KvShape, epoch: int) -> AttentionDevice:
        where = look_up(store(), worker, timeout_s=options.timeout_s)
        return workers.join(worker, where, shape, epoch=epoch)

    def make_core(key: bytes) -> StageCore:
        try:
            torch_devices(options.device, 1)  # at once, rather than when an engine comes
            read_config(options.model)
        except (LayoutError, ModelError) as error:
            raise StartError(str(error)) from error
        build = StageBuilder(options.model, join_worker, compute=options.device)
        return StageCore(options.name, build, workers, key=key)

    return serve_core("stage", options, make_core, greeting=Kind.SETUP)
