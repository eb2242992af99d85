"""vLLM with the plugin on an emulated primary. Runs in vLLM's Python and answers each line of JSON on stdin with one.

The first line configures the engine and names the files for the workers' paces. Each further line is a traffic, the
rule that places its heads, and the paces of all GPUs, including those they change to after half of the tokens. The
primary is slowed down by waiting, like the workers: its attention ends when the emulated GPU's would.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measuring.dispatch_rules import EqualSplit, PaperRule, PrimaryOnly
from hetis.solver.dispatch.problem import Stage

if TYPE_CHECKING:
    from benchmarks.measuring.emulated_worker import Pace


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


class EmulatedEngine:
    """The engine, its primary's pace, and the files with the workers' paces."""

    def __init__(self, llm: Any, files: list[Path]) -> None:
        # Load compiled code only here, because vLLM inspects all loaded modules while it starts.
        from benchmarks.measuring.emulated_worker import Pace, wait_until
        from hetis.solver.dispatch.solve import Dispatcher
        from hetis.solver.redispatch.solve import compile_redispatch

        compile_redispatch()  # otherwise it takes a minute of the first traffic on a new machine
        self._make_pace, self._wait_until = Pace, wait_until
        self._rules = {"paper": PaperRule, "equal": EqualSplit, "primary only": PrimaryOnly, "hetis": Dispatcher}
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
        allocator.rule = self._rules[asked["rule"]]
        allocator.change_costs(self._costs(paces))
        self._side._redispatch = self._redispatch if asked["rule"] == "hetis" else None
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
