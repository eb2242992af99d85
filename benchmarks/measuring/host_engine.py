"""A vLLM engine whose attention computes nothing, to time the plugin's own work on the host. Run by vLLM's Python.

For each line of JSON on stdin it makes an engine in a fork of this process, which imports vLLM once, and answers one
line: the microseconds of the plugin in a layer (the median of a step's) and in a step besides, each the least of the
decode steps, because other processes only add to it; and the transfers that a GPU's host would wait for. Kernels and
metadata of vLLM's own backend are replaced or subtracted. Workers are stubs behind real channels that answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np

from benchmarks.measuring.pretend_gpu import PretendGpu
from hetis.runtime.transport.channel import Channel
from hetis.runtime.transport.frames import (
    Frame,
    FrameKind,
    Hello,
    bytes_of,
    header_of,
    pack_welcome,
    read_header,
)
from hetis.runtime.transport.keys import NONCE_BYTES, read_key

HETIS = {"kv_connector": "HetisConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
PAGES = 1 << 20
COUNTED_STEPS = 4  # steps whose transfers are counted, which takes long


class AnsweringPipe:
    """The engine's end of a pipe to a worker that takes no time: what is written is answered at once."""

    name = "stub"

    def __init__(self, key: bytes) -> None:
        self._key, self._answers = key, bytearray()

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        left = 0
        body = bytearray()
        for buffer in buffers:
            if not left:
                frame, into = read_header(bytes(buffer))
                left, body = len(into), bytearray()
            else:
                left -= len(buffer)
                body += b"" if frame.kind is FrameKind.ATTEND else buffer
            if not left:
                self._answer(frame, body)

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        came = min(len(buffer), len(self._answers))
        buffer[:came] = self._answers[:came]
        del self._answers[:came]
        return came

    def close(self) -> None:
        """Do nothing: there is no other end."""

    def _answer(self, frame: Frame, body: bytearray) -> None:
        match frame.kind:
            case FrameKind.CHALLENGE:
                self._send(frame.answered(FrameKind.NONCE, parts=(np.zeros(NONCE_BYTES, np.uint8),)))
            case FrameKind.HELLO:
                hello = Hello.read(frame._replace(parts=(np.frombuffer(body, np.uint8),)))
                self._shape = hello.shape
                parts = pack_welcome(PAGES, "stub", key=self._key, nonce=hello.nonce)
                self._send(frame.answered(FrameKind.WELCOME, parts=parts))
            case FrameKind.ATTEND:
                rows, shape = frame.counts[0], self._shape
                out = np.zeros((rows, shape.queries_per_group, shape.head_dim), shape.numpy_dtype)
                self._send(frame.answered(FrameKind.OUT, counts=(rows, 0, 0), dtype=shape.dtype, parts=(out,)))

    def _send(self, frame: Frame) -> None:
        self._answers += header_of(frame) + b"".join(bytes(bytes_of(part)) for part in frame.parts)


class Watch:
    """The time that the plugin takes of a step, by the calls into it."""

    def __init__(self) -> None:
        self.layers: list[float] = []
        self.modules: list[float] = []
        self.step_s = self.others_s = 0.0

    def layer(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed(method, self.layers.append)

    def module(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Time vLLM's module of a layer's attention, of which the plugin is a part, or in stock vLLM its backend."""
        return self._timed(method, self.modules.append)

    def step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed(method, self._add_step)

    def other(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Subtract a method of vLLM that the plugin calls."""
        return self._timed(method, self._add_other)

    def _timed(self, method: Callable[..., Any], keep: Callable[[float], None]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            begun_s, others_s = time.perf_counter(), self.others_s
            try:
                return method(*arguments, **more)
            finally:
                taken_s = time.perf_counter() - begun_s
                keep(taken_s - (0.0 if keep == self._add_other else self.others_s - others_s))

        return timed

    def _add_step(self, taken_s: float) -> None:
        self.step_s += taken_s

    def _add_other(self, taken_s: float) -> None:
        self.others_s += taken_s


def watch_plugin(key_file: Path) -> Watch:
    """Time the plugin over a backend that computes nothing, with stubs of workers."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

    from hetis.runtime.vllm import backend, connector
    from hetis.runtime.worker import remote

    key = read_key(key_file, {})
    assert key is not None, "a file was named"
    watch, here = Watch(), backend.HeadGroupImpl
    here.forward = watch.layer(here.forward)  # type: ignore[method-assign]
    for owner, name in (
        (backend.HeadGroupBuilder, "build"),
        (connector.HetisConnector, "handle_preemptions"),
        (connector.HetisConnector, "bind_connector_metadata"),
        (connector.HetisConnector, "wait_for_save"),
        (connector.HetisConnector, "get_block_ids_with_load_errors"),
        (connector.HetisConnector, "build_connector_worker_meta"),
    ):
        setattr(owner, name, watch.step(getattr(owner, name)))
    CPUAttentionMetadataBuilder.build = watch.other(CPUAttentionMetadataBuilder.build)
    Attention.forward = watch.module(Attention.forward)
    CPUAttentionBackendImpl.forward = lambda *_, **__: None
    CPUAttentionBackendImpl.do_kv_cache_update = lambda *_, **__: None
    remote.connect = lambda *_, **__: Channel(AnsweringPipe(key))  # type: ignore[attr-defined]
    return watch


def place_evenly(workers: int) -> None:
    """Place equal parts of each request on the ranks and on every worker."""
    from hetis.runtime.vllm.allocator import HeadAllocator

    def choose(allocator: HeadAllocator, tokens: int, growth: int) -> tuple[tuple[int, ...], str]:
        groups = allocator.heads.head_groups
        return tuple(group * (workers + 1) // groups for group in range(groups)), "policy"

    HeadAllocator._choose = choose  # type: ignore[method-assign,assignment]


def count_transfers(gpu: PretendGpu, layers: list[int], steps: list[int]) -> None:
    """Pass everything that vLLM has on a GPU to the plugin as tensors of ``gpu``, and note the waits of its calls.

    The exchange's fence is one: it is set behind what the GPU computes at that moment. Others are of earlier steps.
    """
    from hetis.runtime.vllm import backend, connector
    from hetis.runtime.vllm.ranks import exchange

    class CountedFence(exchange.Fence):  # type: ignore[misc,name-defined]
        def wait(self) -> None:
            gpu.waits += 1

    exchange.Fence = CountedFence  # type: ignore[attr-defined]

    def counted(method: Callable[..., Any], keep: list[int]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            before = gpu.waits
            with gpu:
                found = method(*map(described, arguments), **{name: described(one) for name, one in more.items()})
            keep.append(gpu.waits - before)
            return found

        return call

    def described(value: Any) -> Any:
        if hasattr(value, "block_table_tensor"):
            on_gpu = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping", "positions")
            kept = {one.name: getattr(value, one.name) for one in fields(value)}
            return type(value)(**kept | {name: gpu.put(kept[name]) for name in on_gpu})
        return gpu.put(value)

    here = backend.HeadGroupImpl
    here.forward = counted(here.forward, layers)  # type: ignore[method-assign]
    for owner, name in (
        (backend.HeadGroupBuilder, "build"),
        (connector.HetisConnector, "handle_preemptions"),
        (connector.HetisConnector, "wait_for_save"),
    ):
        setattr(owner, name, counted(getattr(owner, name), steps))
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    CPUAttentionMetadataBuilder.build = lambda *_, **__: object()


def main() -> None:
    """Answer until stdin ends."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    assert vllm.LLM is not None, "it is imported here, and not in every fork"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer(json.loads(line))
        if status := os.waitpid(child, 0)[1]:
            raise SystemExit(f"an engine ended with {os.waitstatus_to_exitcode(status)}")


def answer(how: dict[str, Any]) -> NoReturn:
    """Run an engine, print the answer and end this process."""
    from vllm import LLM, SamplingParams

    config, is_stock = how.pop("config"), how.pop("is_stock")
    if not is_stock:
        os.environ["HETIS_VLLM_CONFIG"] = config
    workers, requests, steps = how.pop("workers"), how.pop("requests"), how.pop("steps")
    watch = watch_plugin(Path(how.pop("key")))
    llm: Any = LLM(
        dtype="float32",
        skip_tokenizer_init=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        enable_prefix_caching=False,
        enforce_eager=True,
        kv_transfer_config=None if is_stock else HETIS,
        **how,
    )
    if not is_stock:
        place_evenly(workers)  # not earlier: vLLM inspects everything that is loaded while it starts
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=steps + COUNTED_STEPS + 2, ignore_eos=True, detokenize=False)
    for number in range(requests):
        engine.add_request(str(number), {"prompt_token_ids": [3 + number] * 20}, params)
    layer_s, step_s, module_s = [], [], []
    engine.step()  # the prompts
    for _ in range(steps):
        watch.layers.clear()
        watch.modules.clear()
        watch.step_s = 0.0
        engine.step()
        module_s.append(median(watch.modules))
        if is_stock:
            continue
        one_s = median(watch.layers)
        layer_s.append(one_s)
        step_s.append(watch.step_s + watch.layers[0] - one_s)  # what the first layer does for all
    layers = len(watch.modules)
    if is_stock:
        nothing = dict.fromkeys(("layer_us", "step_us", "waits_per_layer", "waits_per_step"), 0.0)
        found = {"layers": layers, "module_us": 1e6 * min(module_s), **nothing}
        print("ANSWER " + json.dumps(found), flush=True)
        os._exit(0)
    by_layer: list[int] = []
    by_step: list[int] = []
    gpu = PretendGpu()
    count_transfers(gpu, by_layer, by_step)
    engine.step()  # what is made once, on the device that it finds
    by_layer.clear()
    by_step.clear()
    for _ in range(COUNTED_STEPS):
        engine.step()
    waits = median(by_layer)
    found = {
        "layers": layers,
        "module_us": 1e6 * min(module_s),
        "layer_us": 1e6 * min(layer_s),
        "step_us": 1e6 * min(step_s),
        "waits_per_layer": waits,
        "waits_per_step": (sum(by_step) + sum(by_layer) - waits * len(by_layer)) / COUNTED_STEPS,
    }
    print("ANSWER " + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
