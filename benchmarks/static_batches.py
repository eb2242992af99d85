"""Predictions against static batches of engines of 2024: the time of a batch from its first prompt to its end.

    python -m benchmarks.static_batches [--points FILE] [--json] [--only TEXT] [--quick] [--markdown]

A row of the table (argonne-lcf/LLM-Inference-Bench) is one batch of equal requests on one replica: as many output
tokens as prompt tokens, all requests at once, and none after them. The prediction is the time of the iterations that
prefill the prompts, as many whole ones at a time as an iteration takes, and of those that decode the rest, one token of
every request each. Profiles are shipped or, for GPUs without measurements, modelled, with the host times of the engine.
Nothing is fitted to these rows.

A row is one (GPU, engine, model), or several of them (``all``): the mean absolute error (``mape``) and the mean
(``bias``, negative: predicted too fast) of predicted / measured - 1 over ``n`` batches, of one request alone and of 16
to 64, and ``p90``, which nine in ten stay below. ``--markdown`` writes docs/accuracy.md.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.measuring import published_points, rows
from benchmarks.measuring.instances import NO_LIMITS, fleet
from benchmarks.measuring.published_points import FOLDER, NotPosedError
from benchmarks.measuring.rows import Cell, Row
from hetis.formats import catalogue
from hetis.formats.documents import load_model
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.engines import for_engine
from hetis.profiler.roofline import modelled_profile
from hetis.simulator.kv_memory import rank_room_bytes
from hetis.simulator.timing import StageTiming
from hetis.solver.check.fleet import StageShape
from hetis.solver.check.setting import Setting, head_groups_per_rank
from hetis.solver.cost import intra_link
from hetis.solver.errors import HetisError
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import LengthBin, Workload

POINTS = FOLDER / "llm_inference_bench.csv.gz"
COLUMNS = ("Hardware", "Num of Hardware", "Framework", "Model", "Input Output Length", "Batch Size", "Latency")
# A row names neither memory nor form factor. Argonne has four A100 of 40 GB in a node of Polaris (ALCF's user
# guide), and in JLSE four H100 of 80 GB and one GH200 of 96 GB (arXiv 2411.00136, "LLM-Inference-Bench").
GPUS = {
    "Nvidia A100 GPU": ("A100-SXM-40GB", 4),
    "Nvidia H100 GPU": ("H100-SXM-80GB", 4),
    "Nvidia GH200 GPU": ("GH200-96GB", 1),
}
ENGINES = {"vLLM": "vllm", "TensorRT-LLM": "trtllm"}
MODELS = {
    "meta-llama/Llama-2-7b-hf": "Llama-2-7B", "meta-llama/Llama-2-70b-hf": "Llama-2-70B",
    "meta-llama/Meta-Llama-3-8B": "Llama-3-8B", "meta-llama/Meta-Llama-3-70B": "Llama-3-70B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B",
}  # fmt: skip
CHUNK_TOKENS = 8192  # prompt tokens per iteration: TensorRT-LLM's max_num_tokens; engines of 2024 did not split prompts
CONTEXTS = 17  # number of contexts at which a decoding iteration is timed
QUICK_STRIDE = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A posed row."""

    gpu: str
    node_gpus: int
    engine: str
    model: str  # name in the catalogue
    tp: int
    requests: int
    tokens: int  # tokens of every prompt, and of every answer
    measured_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A batch and its prediction."""

    batch: Batch
    predicted_s: float

    @property
    def error(self) -> float:
        """Return predicted / measured - 1."""
        return self.predicted_s / self.batch.measured_s - 1.0


def main() -> None:
    """Print a row per (GPU, engine, model), and the numbers of posed and skipped rows."""
    arguments = published_points.parser("benchmarks.static_batches", __doc__, POINTS).parse_args()
    table = published_points.asked_rows(arguments, COLUMNS)
    if table is None:
        return
    outcomes, skipped = predicted(table, quick=arguments.quick, only=arguments.only)
    groups, covered = list(group_rows(outcomes)), list(published_points.coverage("predicted", len(outcomes), skipped))
    if arguments.markdown:
        write_document(groups, covered, arguments.points)
    if arguments.json:
        for row in (*groups, *covered):
            print(json.dumps(row), flush=True)
        return
    print(rows.table(groups))
    published_points.print_coverage(covered, "rows")


def predicted(
    table: list[dict[str, str]], *, quick: bool = False, only: str = ""
) -> tuple[list[Outcome], Counter[str]]:  # fmt: skip
    """Return the predictions, and the number of rows without one by reason."""
    found, skipped = list[Outcome](), Counter[str]()
    for row in table[:: QUICK_STRIDE if quick else 1]:
        try:
            batch = pose(row)
            if only in f"{batch.gpu} {batch.engine} {batch.model}":
                found.append(Outcome(batch=batch, predicted_s=batch_s(batch)))
        except NotPosedError as error:
            skipped[str(error)] += 1
    return found, skipped


def pose(row: Mapping[str, str]) -> Batch:
    """Return the batch of one row.

    Raises:
        NotPosedError: the cost model cannot express it.
    """
    if row["Framework"] not in ENGINES:
        raise NotPosedError(f"the engine {row['Framework']} is not known")
    if row["Hardware"] not in GPUS:
        raise NotPosedError(f"the GPU {row['Hardware']} is not known")
    if row["Model"] not in MODELS:
        raise NotPosedError("another model than Llama-2, Llama-3 and Mistral-7B")
    gpu, node_gpus = GPUS[row["Hardware"]]
    try:
        tp, tokens = int(row["Num of Hardware"]), int(row["Input Output Length"])
        requests, measured_s = int(row["Batch Size"]), float(row["Latency"])
    except ValueError as error:
        raise NotPosedError(f"a number is not recorded: {error}") from None
    if min(tp, tokens, requests) < 1 or not 0.0 < measured_s < float("inf"):
        raise NotPosedError("a number is not above 0")
    return Batch(
        gpu=gpu, node_gpus=node_gpus, engine=ENGINES[row["Framework"]], model=MODELS[row["Model"]], tp=tp,
        requests=requests, tokens=tokens, measured_s=measured_s,
    )  # fmt: skip


def batch_s(batch: Batch) -> float:
    """Return the predicted seconds of a batch.

    Raises:
        NotPosedError: not all of its requests fit in memory at once.
    """
    timing, room_tokens = stage_of(batch.gpu, batch.node_gpus, batch.engine, batch.model, batch.tp)
    model, tokens = timing.cost.model, batch.tokens
    if batch.requests * model.cached_tokens(2.0 * tokens) > room_tokens:
        raise NotPosedError("the weights and the KV of the whole batch do not fit in memory")
    at_once = max(1, CHUNK_TOKENS // tokens)
    whole, rest = divmod(batch.requests, at_once)
    pairs = tokens * model.attended_tokens((tokens + 1) / 2.0)

    def prefill_s(prompts: int) -> float:
        return timing.seconds(0, 0.0, prompts * tokens, prompts * pairs, prompts * tokens / 2.0, prompts)

    def decode_s(context: float) -> float:
        attended = batch.requests * model.attended_tokens(context)
        return timing.seconds(batch.requests, attended, 0, 0.0, 0.0, batch.requests)

    contexts = np.linspace(tokens + 1.0, 2.0 * tokens - 1.0, CONTEXTS)
    decoding_s = (tokens - 1) * float(np.mean([decode_s(float(context)) for context in contexts]))
    return whole * prefill_s(at_once) + (prefill_s(rest) if rest else 0.0) + decoding_s


@cache
def stage_of(gpu: str, node_gpus: int, engine: str, name: str, tp: int) -> tuple[StageTiming, float]:
    """Return a replica of one stage, and the number of tokens for whose KV it has room.

    Raises:
        NotPosedError: the weights do not fit.
    """
    kind, model = catalogue.find_gpu(gpu).gpu, load_model(name)
    # Answers are read when they are complete; vLLM's host handles every token all the same.
    profile = for_engine(shipped_profile(gpu) or modelled_profile(kind), kind, engine)
    lengths = LengthBin(prompt_tokens=1024.0, output_tokens=1024.0, weight=1.0)
    try:
        problem = PlacementProblem(
            cluster=fleet("node", (1, node_gpus, gpu)), model=model, workload=Workload(name="batch", bins=(lengths,)),
            profiles={gpu: profile}, objective=NO_LIMITS,
        )  # fmt: skip
    except HetisError as error:
        raise NotPosedError(str(error)) from None
    link = intra_link(kind, None)
    shape = StageShape(gpu=gpu, tp=tp, copies=1, layers=model.num_layers, intra_link=link, hop_link=link)
    moments = problem.workload.moments(block_tokens=problem.assumptions.block_tokens)
    setting = Setting(problem=problem, moments=moments, micro_batch=64, in_flight=1, chunk_tokens=CHUNK_TOKENS)
    room = rank_room_bytes(setting, shape, is_first=True, is_last=True)
    if room <= 0.0:
        raise NotPosedError("the weights and the KV of the whole batch do not fit in memory")
    per_token = model.num_layers * head_groups_per_rank(model, tp) * model.kv_bytes_per_token_group()
    return StageTiming(problem, shape, is_first=True, is_last=True), room / per_token


def group_rows(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    """Yield a row per (GPU, engine, model), then per (GPU, engine) and engine."""
    for keys in (("gpu", "engine", "model"), ("gpu", "engine"), ("engine",)):
        groups = defaultdict[tuple[str, ...], list[Outcome]](list)
        for outcome in outcomes:
            groups[tuple(getattr(outcome.batch, key) for key in keys)].append(outcome)
        for group, members in sorted(groups.items()):
            names: dict[str, Cell] = {"gpu": "all", "engine": "all", "model": "all"}
            yield names | dict(zip(keys, group, strict=True)) | statistics(members)


def statistics(outcomes: Sequence[Outcome]) -> dict[str, Cell]:
    """Return the errors of a group's batches."""
    errors = np.array([one.error for one in outcomes])
    alone = np.array([one.error for one in outcomes if one.batch.requests == 1])
    many = np.array([one.error for one in outcomes if one.batch.requests > 1])
    return {
        "n": len(outcomes), "mape": _round(np.abs(errors).mean()), "bias": _round(errors.mean()),
        "p90": _round(np.quantile(np.abs(errors), 0.9)),
        "bias_of_1": _round(alone.mean()) if len(alone) else None,
        "bias_of_16_to_64": _round(many.mean()) if len(many) else None,
    }  # fmt: skip


def write_document(groups: Sequence[Row], covered: Sequence[Row], points: Path) -> None:
    """Write the tables of docs/accuracy.md."""
    published_points.write_skipped("static batches", covered, "rows")
    rows.keep("static batches", in_percent(groups))


def in_percent(groups: Sequence[Row]) -> list[Row]:
    """Return the errors as percentages, to one decimal."""
    return [
        {key: f"{v:+.1%}" if "bias" in key and v is not None else f"{v:.1%}" if isinstance(v, float) else v
         for key, v in row.items()}
        for row in groups
    ]  # fmt: skip


def _round(value: float | np.floating) -> float:
    return float(f"{value:.4f}")


if __name__ == "__main__":
    main()
