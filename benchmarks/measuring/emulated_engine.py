"""vLLM with the plugin on an emulated primary. Runs in vLLM's Python and answers each line of JSON on stdin with one.

The first line configures the engine and names the files for the workers' paces. Each further line is a traffic, the
rule that places its heads, and the paces of all GPUs, including those they change to after half of the tokens. The
primary is slowed down by waiting, like the workers: its attention ends when the emulated GPU's would.

Other systems' rules for the heads of a new request replace the dispatcher of `hetis.runtime.vllm.allocator`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hetis.solver.dispatch.problem import DeviceLoad, FloatArray, IntArray, Requests, Stage

if TYPE_CHECKING:
    from benchmarks.measuring.emulated import Pace


_ROUNDS = 60  # steps of bisection, down to the precision of floats


@dataclass(frozen=True, slots=True)
class Placed:
    """Head groups of one request on each device, shape [1, D]. ``unplaced`` names it if it has to wait."""

    groups: IntArray
    unplaced: Sequence[str]


class Rule(Protocol):
    """Places the heads of new requests, as `hetis.solver.dispatch.solve.Dispatcher` does."""

    def __init__(self, stage: Stage) -> None: ...

    @property
    def stage(self) -> Stage: ...

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Any: ...


@dataclass(frozen=True, slots=True)
class EqualSplit:
    """A rule that puts the same share of every request on every device. The remainder goes to the devices in turn."""

    stage: Stage

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Placed:
        num = self.stage.num_devices
        room = _room(self.stage, load, requests)
        counts = np.zeros(num, np.int64)
        # The device with the fewest heads comes first, so that all end up with equal numbers.
        order = np.argsort(load.heads, kind="stable")
        for _ in range(self.stage.heads.head_groups):
            takes = [i for i in order if counts[i] < room[i]]
            if not takes:
                return _waits(num, requests)
            counts[min(takes, key=lambda i: int(counts[i]))] += 1
        return Placed(counts[None], ())


@dataclass(frozen=True, slots=True)
class PrimaryOnly:
    """All heads on the primary, as in engines without attention workers."""

    stage: Stage

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Placed:
        counts = np.zeros(self.stage.num_devices, np.int64)
        counts[0] = self.stage.heads.head_groups
        if counts[0] > _room(self.stage, load, requests)[0]:
            return _waits(len(counts), requests)
        return Placed(counts[None], ())


@dataclass(frozen=True, slots=True)
class PaperRule:
    """Hetis (SC'25): ``min z, z >= tau_i + rho_i`` in fractions, running requests fixed, then rounded to KV groups.

    For one request that linear program is water filling: every device is filled to the same time z, within its memory.
    Constants of devices without heads count as paid. Groups left by rounding down go to the largest fractions.
    """

    stage: Stage

    def dispatch(self, load: DeviceLoad, requests: Requests) -> Placed:
        groups, room = self.stage.heads.head_groups, _room(self.stage, load, requests)
        if room.sum() < groups:
            return _waits(len(room), requests)
        x = self.fractions(load, requests)
        counts = np.floor(x + 1e-9).astype(np.int64)
        for i in np.argsort(counts - x, kind="stable").tolist() * groups:
            if counts.sum() < groups and counts[i] < room[i]:
                counts[i] += 1
        return Placed(counts[None], ())

    def fractions(self, load: DeviceLoad, requests: Requests) -> FloatArray:
        """Return the head groups of the request on each device before rounding, shape [D]. The request must fit."""
        groups, room = self.stage.heads.head_groups, _room(self.stage, load, requests)
        base, slope = self._lines(load, int(requests.context_tokens[0]))
        low, high = 0.0, float((base + slope * groups).max())
        for _ in range(_ROUNDS):
            z = (low + high) / 2
            low, high = (low, z) if _filled(z, base, slope, room).sum() >= groups else (z, high)
        return _filled(high, base, slope, room)

    def _lines(self, load: DeviceLoad, context_tokens: int) -> tuple[FloatArray, FloatArray]:
        """Return the seconds [D] of each device's running load, and those [D] that one more head group would add."""
        stage, heads = self.stage, self.stage.heads
        away = np.array([not stage.has_primary_at(i) for i in range(stage.num_devices)])
        per_head = stage.head_s[:, 0] + away * stage.transfer_byte_s * heads.exchange_bytes_per_head
        base = per_head * load.heads + stage.kv_byte_s[:, 0] * load.kv_bytes + stage.call_s[:, 0]
        base += away * stage.transfer_s
        slope = per_head * heads.queries_per_group
        slope = slope + stage.kv_byte_s[:, 0] * context_tokens * heads.kv_bytes_per_token
        return base, np.maximum(slope, 1e-15)


def _filled(z: float, base: FloatArray, slope: FloatArray, room: IntArray) -> FloatArray:
    filled: FloatArray = np.clip((z - base) / slope, 0.0, room)
    return filled


def _room(stage: Stage, load: DeviceLoad, requests: Requests) -> IntArray:
    """Return the head groups of the request that each device has pages for, shape [D]."""
    room: IntArray = np.maximum(load.free_blocks, 0) // int(requests.blocks(stage.heads.block_tokens)[0])
    return room


def _waits(num: int, requests: Requests) -> Placed:
    return Placed(np.zeros((1, num), np.int64), requests.ids)


def main() -> None:
    """Answer until stdin ends."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    how = json.loads(sys.stdin.readline())
    files = [Path(path) for path in how.pop("pace_files")]
    llm: Any = LLM(
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "HetisConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
        },
        **how,
    )
    emulated = EmulatedEngine(llm, files)
    _tell({})
    for line in sys.stdin:
        _tell(emulated.serve(json.loads(line)))


def use_rule(allocator: Any, rule: type[Rule]) -> None:
    """Have a `HeadAllocator` place heads by a rule from its next costs on, in the place of the solver's dispatcher."""
    module = importlib.import_module(type(allocator).__module__)
    assert hasattr(module, "Dispatcher"), "this is where rules go"
    module.Dispatcher = rule  # type: ignore[attr-defined]


class NoRedispatch:
    """Leaves all heads where they are, as the rules that hetis is compared with do."""

    def advance(self) -> None:
        pass


class EmulatedEngine:
    """The engine, its primary's pace, and the files with the workers' paces."""

    def __init__(self, llm: Any, files: list[Path]) -> None:
        # Load compiled code only here, because vLLM inspects all loaded modules while it starts.
        from benchmarks.measuring.emulated import Pace, wait_until
        from hetis.solver.dispatch.solve import Dispatcher
        from hetis.solver.redispatch.solve import compile_redispatch

        compile_redispatch()  # otherwise it takes a minute of the first traffic on a new machine
        self._make_pace, self._wait_until = Pace, wait_until
        self._rules: dict[str, type[Rule]] = {
            "paper": PaperRule,
            "equal": EqualSplit,
            "primary only": PrimaryOnly,
            "hetis": Dispatcher,
        }
        core = llm.llm_engine.engine_core.engine_core
        self._engine, self._files = llm.llm_engine, files
        self._side = core.scheduler.connector._scheduler
        self._redispatch = self._side._redispatch
        self._pace = Pace()
        context = core.vllm_config.compilation_config.static_forward_context
        self._impls = [layer.impl for layer in context.values()]
        for impl in self._impls:
            impl.attend_here = partial(self._attend_slowly, impl, impl.attend_here)

    def serve(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return tokens and seconds of one traffic."""
        from vllm import SamplingParams

        paces = [self._make_pace(**one) for one in asked["paces"]]
        later = [self._make_pace(**one) for one in asked["later"]] if asked["later"] else None
        self._set_paces(paces)
        allocator = self._side.allocator
        use_rule(allocator, self._rules[asked["rule"]])
        allocator.change_costs(self._costs(paces))  # the next request makes a dispatcher
        self._side._redispatch = self._redispatch if asked["rule"] == "hetis" else NoRedispatch()
        for number, (prompt, tokens) in enumerate(zip(asked["prompts"], asked["tokens"], strict=True)):
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        made: dict[int, list[int]] = {}
        heads, half, moved = [0] * len(paces), sum(asked["tokens"]) // 2, allocator.stats.moved_groups
        begun_s = time.perf_counter()
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                made[int(output.request_id)] = list(output.outputs[0].token_ids)
            for name in allocator.running:
                for device in allocator.devices(name):
                    heads[device] += 1
            if later is not None and sum(map(len, made.values())) >= half:
                self._set_paces(later)
                if asked["followed"]:
                    allocator.change_costs(self._costs(later))
                later = None
        return {
            "wall_s": time.perf_counter() - begun_s,
            "heads": heads,
            "moved": allocator.stats.moved_groups - moved,
            "tokens": [made[number] for number in range(len(made))],
        }

    # --- inside

    def _set_paces(self, paces: list[Pace]) -> None:
        self._pace = paces[0]
        for path, pace in zip(self._files, paces[1:], strict=True):
            pace.write(path)

    def _attend_slowly(self, impl: Any, attend_here: Any, layer: Any, q: Any, *more: Any) -> None:
        begun_s = time.perf_counter()
        attend_here(layer, q, *more)
        metadata = more[-2]
        counts = metadata.query_start_loc.diff()
        tokens = int((metadata.seq_lens - counts + 1).sum())
        heads, item = len(counts) * q.shape[1], q.element_size()
        self._wait_until(begun_s + self._pace.attention_s(heads=heads, kv_bytes=2.0 * q.shape[2] * item * tokens))

    def _costs(self, paces: list[Pace]) -> Stage:
        """Return what calibration would find: the paces themselves. The solver's head is a group of r query heads."""
        stage: Stage = self._side.allocator.state.stage
        queries, head_dim = self._impls[0].num_heads, self._impls[0].head_size
        exchanged = 4.0 * (2 * queries + 2) * head_dim
        away = np.array([0.0] + [1.0] * (len(paces) - 1))
        return replace(
            stage,
            head_s=np.array([[one.slow * one.head_s * queries] for one in paces]),
            kv_byte_s=np.array([[one.slow * one.kv_byte_s] for one in paces]),
            call_s=np.array([[one.slow * one.call_s] for one in paces]),
            transfer_byte_s=np.array(
                [exchanged / stage.heads.exchange_bytes_per_head / p.link_bytes_per_s for p in paces]
            ),
            transfer_s=away * np.array([2 * one.latency_s for one in paces]),
        )


def _tell(answer: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
