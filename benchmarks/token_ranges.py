"""Attention workers that hold ranges of tokens against workers that hold head groups, by the cost model.

    python -m benchmarks.token_ranges [--quick] [--json]

One layer of decode attention on a stage and eight workers, L4 or RTX 3090, each alone on a link of 100 or 25 Gb/s.
Models: Llama-2-13B (40 head groups; a stage of one A100), Llama-3.1-70B (8; four H100), Qwen3-235B-A22B (4; four H100)
and DeepSeek-V3 (latent attention, one group; eight H200, or one of them, as if attention were data parallel). A
micro-batch of b requests has equal contexts, and half of their KV is on the workers, or what is nearest: head groups
are whole ones per rank, so that the only one of DeepSeek-V3 on one GPU is given away altogether; a split by tokens then
gives away all, too. On eight GPUs every rank has it, and none can be given away.

``alone_us`` is attention on the stage alone, ``heads_us`` and ``tokens_us`` with workers, in microseconds, exchange
included; by tokens also the time of weighing partial outputs. ``card_heads`` and ``card_tokens`` are the share of a
layer's KV on the fullest card. ``ratio`` is heads_us over tokens_us: above 1, the split by tokens is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from benchmarks.measuring.token_ranges import TokenRangeCost
from hetis.formats.catalogue import find_gpu
from hetis.formats.documents import load_model, load_workload
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import Link
from hetis.solver.cost import DeviceCost, PoolCost, intra_link, rank_shape
from hetis.solver.model import ModelSpec

STAGES = (
    ("Llama-2-13B", "A100-SXM-80GB", 1),
    ("Llama-3.1-70B", "H100-SXM-80GB", 4),
    ("Qwen3-235B-A22B", "H100-SXM-80GB", 4),
    ("DeepSeek-V3", "H200-SXM-141GB", 8),
    ("DeepSeek-V3", "H200-SXM-141GB", 1),
)
WORKERS = ("L4", "RTX-3090")
LINKS = (Link(bytes_per_s=12.5e9, latency_s=2e-5), Link(bytes_per_s=3.125e9, latency_s=2e-5))
CARDS = 8
CONTEXTS = (2000, 8000, 32_000, 128_000)
MICRO_BATCHES = (1, 4, 16, 64)
OUTPUT = 100  # tokens, half of which are in the mean context
TIE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A stage and its workers under load."""

    model: ModelSpec
    gpu: str
    tp: int
    worker: str
    link: Link
    context: int
    micro_batch: int

    @property
    def name(self) -> str:
        link = f"{self.link.bytes_per_s * 8e-9:g} Gb/s"
        requests = f"{self.micro_batch} x {self.context // 1000}k"
        return (
            f"{self.model.name.split('/')[-1]}, {self.tp} {self.gpu.split('-')[0]}, {self.worker}, {link}, {requests}"
        )


def main() -> None:
    """Print one row per model, worker, link, context and micro-batch."""
    parser = rows.parser("benchmarks.token_ranges", __doc__)
    arguments = parser.parse_args()
    chosen = (case for case in cases(quick=arguments.quick) if arguments.only in case.name)
    rows.show(map(compare, chosen), arguments, name="token_ranges")


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield every combination within the context of the model; with ``quick``, those of the first model and worker."""
    for name, gpu, tp in STAGES[:1] if quick else STAGES:
        model = load_model(name)
        for worker in WORKERS[:1] if quick else WORKERS:
            for link in LINKS[:1] if quick else LINKS:
                for context in CONTEXTS:
                    if context + OUTPUT > model.max_position:
                        continue
                    for b in MICRO_BATCHES:
                        yield Case(
                            model=model, gpu=gpu, tp=tp, worker=worker, link=link, context=context, micro_batch=b
                        )  # fmt: skip


def compare(case: Case) -> Row:
    """Return the times of one layer, and how full the cards are."""
    stage, worker = _device(case, case.gpu, case.tp), _device(case, case.worker, 1)
    by_token, by_head = TokenRangeCost(stage, worker, case.link), PoolCost(stage, worker, case.link)
    b, held, splits = case.micro_batch, stage.shape.groups, stage.shape.splits_groups
    given = max(1, held // 2)
    share = given / held if splits else 0.5
    tokens_s = by_token.attention_s(b, share, CARDS)
    heads_s = float(_by_heads_s(by_head, b, given)) if splits else None
    pairs = b * case.model.head_groups
    return {
        "name": case.name,
        "context": case.context,
        "micro_batch": b,
        "share": share,
        "alone_us": 1e6 * by_token.own_s(b, 0.0),
        "heads_us": None if heads_s is None else 1e6 * heads_s,
        "tokens_us": 1e6 * tokens_s,
        "ratio": None if heads_s is None else heads_s / tokens_s,
        "faster": _faster(heads_s, tokens_s),
        "card_heads": float(by_head.load(b, given, CARDS)) / pairs if splits else None,
        "card_tokens": share / CARDS,
        "exchange_us": 1e6 * by_token.exchange_s(b, CARDS),
    }


def _by_heads_s(pool: PoolCost, b: int, given: int) -> float:
    shape = pool.primary.shape
    own_s = pool.primary.decode_attention_s(float(b * (shape.groups - given)), shape.queries_per_group)
    return max(float(own_s), float(pool.attention_s(float(b), float(given), float(CARDS))))


def _faster(heads_s: float | None, tokens_s: float) -> str:
    if heads_s is None:
        return "only tokens"
    if abs(heads_s / tokens_s - 1.0) <= TIE:
        return "alike"
    return "tokens" if tokens_s < heads_s else "heads"


def _device(case: Case, gpu: str, tp: int) -> DeviceCost:
    board = find_gpu(gpu).gpu
    shape = rank_shape(case.model, tp)
    assert shape is not None, "the stages above are valid"
    moments = load_workload(f"{case.context}/{OUTPUT}").moments()
    return DeviceCost(case.model, modelled_profile(board), moments, shape, intra_link(board, None))


if __name__ == "__main__":
    main()
