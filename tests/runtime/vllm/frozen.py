"""Stands in for CUDA graphs of whole steps: what a replay would read is frozen, and what it would find there is fresh.

A graph reads the tensors that it was captured with. Here a "capture" keeps the layers' metadata objects of a step of
some size, and a "replay" runs the model with them, whatever the present step's objects say. Only the base backend's
own schedule, which backends for GPUs keep in a buffer of their own, is the present one.
"""

from __future__ import annotations

from typing import Any

SIZES = (1, 2, 4, 8)


class FrozenGraphs:
    """The model of a runner, with such graphs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: dict[Any, dict[str, Any]] = {}
        self.replays = self.pieces = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        if context.cudagraph_runtime_mode is CUDAGraphMode.PIECEWISE:
            assert (context.batch_descriptor.num_reqs, context.batch_descriptor.uniform) == (None, False)
            self.pieces += 1
        if context.cudagraph_runtime_mode is CUDAGraphMode.FULL:
            fresh = context.attn_metadata
            frozen = self._kept.setdefault(context.batch_descriptor, fresh)
            self.replays += frozen is not fresh
            for name, metadata in frozen.items():
                metadata.base.scheduler_metadata = fresh[name].base.scheduler_metadata
            context.attn_metadata = frozen
        return self._model(*arguments, **inputs)


def freeze(engine: Any, act: dict[str, Any]) -> dict[str, Any]:
    """Give an engine that has made steps such graphs, and have vLLM choose them as it does on a GPU.

    Return how many steps were replayed, and how many were computed between graphs instead.
    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    from hetis.runtime.vllm.ranks.rank import current_rank

    runner = engine.core.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    if isinstance(runner.model, FrozenGraphs):
        return {"replays": runner.model.replays, "pieces": runner.model.pieces}
    determine = runner._determine_batch_execution_and_padding

    def determined(*arguments: Any, **how: Any) -> Any:
        mode, descriptor, *rest = determine(*arguments, **how)
        requests = how["num_reqs"]
        if how["max_num_scheduled_tokens"] == 1 and requests == how["num_tokens"]:
            padded = next(size for size in SIZES if size >= requests)
            mode = CUDAGraphMode.FULL
            descriptor = BatchDescriptor(num_tokens=padded, num_reqs=padded, uniform=True)
        return (mode, descriptor, *rest)

    runner._determine_batch_execution_and_padding = determined
    runner.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    current_rank().capturing()
    runner.model = FrozenGraphs(runner.model)
    return {}
