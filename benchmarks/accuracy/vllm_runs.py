"""Latencies of vLLM under load against measured ones: mean end-to-end, TTFT and inter-token latency at a stated rate.

    python -m benchmarks.accuracy.vllm_runs [--points FILE] [--json] [--only TEXT] [--quick] [--markdown] [--fit]

A row of the table is one load stage: a model on some GPUs, mean lengths, and the rate at which requests arrived. It is
simulated as an open loop of one engine with Poisson arrivals, iteration by iteration; the cost model gives the seconds
of each (`StageTiming`) with the default profile. Prompts share long prefixes: 98% of their tokens hit the cache.

Errors are predicted / measured - 1. ``blis`` and ``aic`` are the errors of two other simulators, whose predictions the
table has for the same rows. Rows that cannot be posed are skipped and counted. ``--fit`` fits the time of the host to
the rows of one model, that with the most, and tries it on the others.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean, median

import numpy as np

from benchmarks.accuracy import published_points
from benchmarks.accuracy.published_points import FOLDER, NotPosedError
from benchmarks.measuring import rows
from benchmarks.measuring.instances import fleet
from benchmarks.measuring.rows import Cell, Row
from hetis.formats import catalogue
from hetis.formats.errors import DocumentError
from hetis.profiler.defaults import default_profile
from hetis.profiler.engines import ENGINES, UNHIDDEN
from hetis.simulator.timing import StageTiming
from hetis.solver.check.replica_shapes import StageShape
from hetis.solver.cost import intra_link
from hetis.solver.errors import HetisError
from hetis.solver.plan import Objective
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op, Piece, Profile
from hetis.solver.workload import LengthBin, Workload

POINTS = FOLDER / "vllm_runs.csv"
MEASURED = ("e2e_mean_ms", "ttft_mean_ms", "itl_mean_ms")
COLUMNS = (
    "run",
    "gpu",
    "model",
    "tp",
    "max_num_batched_tokens",
    "rate_rps",
    "prompt_tokens",
    "output_tokens",
    *MEASURED,
)
OTHERS = ("blis", "aic")
GPUS = {"H100": "H100-SXM-80GB", "A100": "A100-SXM-80GB", "L40S": "L40S"}
HIT_RATE = 0.98  # about 100 distinct prompts in runs of thousands (README of the table)
REQUESTS, WARM, QUICK_REQUESTS = 600, 100, 60
SEATS = 256  # vLLM's default of ``--max-num-seqs`` in that version is at least this, and no row has as many
STEPS_S = tuple(1e-4 * k for k in range(2, 17, 2))
SEQUENCES_S = tuple(1e-6 * k for k in range(5, 46, 5))
SYNCHRONOUS = UNHIDDEN.step_s, UNHIDDEN.sequence_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load stage, and the latencies that were measured in it, in seconds: end to end, TTFT, between tokens."""

    run: str
    gpu: str
    model: str
    tp: int
    chunk_tokens: int
    rate_rps: float
    prompt_tokens: int
    output_tokens: int
    measured_s: tuple[float, float, float]
    others_s: Mapping[str, tuple[float, float, float]]

    @property
    def name(self) -> str:
        short = self.model.rpartition("/")[2]
        return (
            f"{self.run}, {short}, TP{self.tp}, {self.prompt_tokens}/{self.output_tokens}, {self.rate_rps:g} requests/s"
        )


def main() -> None:
    """Print a row per load stage, and the totals."""
    parser = published_points.parser("benchmarks.accuracy.vllm_runs", __doc__, POINTS)
    parser.add_argument("--fit", action="store_true", help="fit the host's time to a half, and try it on the other")
    arguments = parser.parse_args()
    table = published_points.asked_rows(arguments, COLUMNS)
    if table is None:
        return
    runs, skipped = posed(table)
    runs = [run for run in runs if arguments.only in run.name][: 2 if arguments.quick else None]
    requests = QUICK_REQUESTS if arguments.quick else REQUESTS
    found = list[Row]()

    def each() -> Iterator[Row]:
        for run in runs:
            found.append(compared(run, predict(run, requests=requests)))
            yield found[-1]
        yield from totals(found)

    rows.show((_in_percent(row) for row in each()), arguments, name="vllm_runs")
    covered = list(published_points.coverage("covered", len(found), skipped))
    published_points.print_coverage(covered, "load stages")
    if arguments.fit:
        print(fitted(runs))


def _in_percent(row: Row) -> Row:
    return {key: f"{value:+.1%}" if isinstance(value, float) else value for key, value in row.items()}


def posed(table: Sequence[Mapping[str, str]]) -> tuple[list[Run], Counter[str]]:
    """Return the runs of a table, and the number of rows that are none by reason."""
    found, skipped = list[Run](), Counter[str]()
    for row in table:
        try:
            run = _run_of(row)
            timing(run)
        except NotPosedError as error:
            skipped[str(error)] += 1
        else:
            found.append(run)
    return found, skipped


def _run_of(row: Mapping[str, str]) -> Run:
    """Return the run of a row. Raises NotPosedError: a value is missing or out of its range, or the GPU is unknown."""

    def seconds(prefix: str = "") -> tuple[float, float, float]:
        end_to_end, first, between = (
            1e-3 * float(row[f"{prefix}{name}_ms"])
            for name in (("e2e", "ttft", "itl") if prefix else ("e2e_mean", "ttft_mean", "itl_mean"))
        )
        return end_to_end, first, between

    try:
        run = Run(
            run=row["run"], gpu=GPUS[row["gpu"]], model=row["model"], tp=int(row["tp"]),
            chunk_tokens=int(row["max_num_batched_tokens"]), rate_rps=float(row["rate_rps"]),
            prompt_tokens=round(float(row["prompt_tokens"])), output_tokens=round(float(row["output_tokens"])),
            measured_s=seconds(), others_s={of: seconds(f"{of}_") for of in OTHERS if row.get(f"{of}_itl_ms")},
        )  # fmt: skip
    except KeyError as error:
        raise NotPosedError(f"unknown GPU or column {error}") from None
    except ValueError:
        raise NotPosedError("a value is no number") from None
    if min(run.tp, run.chunk_tokens, run.rate_rps, run.prompt_tokens, run.output_tokens - 1, *run.measured_s) <= 0:
        raise NotPosedError("a value is not above 0")
    return run


@cache
def _shape(model: str, tp: int, gpu: str) -> tuple[PlacementProblem, StageShape]:
    try:
        spec = catalogue.find_model(model).model
    except (catalogue.UnknownNameError, DocumentError):
        raise NotPosedError(f"model {model} is not in the catalogue") from None
    kind = catalogue.find_gpu(gpu).gpu
    problem = PlacementProblem(
        cluster=fleet("node", (1, 8, gpu)), model=spec, profiles={gpu: default_profile(kind)[1]},
        workload=Workload(name="run", bins=(LengthBin(prompt_tokens=100.0, output_tokens=100.0, weight=1.0),)),
        objective=Objective(ttft_limit_s=None, tpot_limit_s=None),
    )  # fmt: skip
    if not spec.divides(tp):
        raise NotPosedError(f"{tp} ranks do not divide {model}")
    link = intra_link(kind, None)
    return problem, StageShape(
        gpu=gpu, tp=tp, copies=1, layers=spec.num_layers - spec.prefix_layers, intra_link=link, hop_link=link
    )


def timing(run: Run, host: tuple[float, float] | None = None) -> StageTiming:
    """Return the seconds of iterations, with the host's time per iteration and sequence, or that of the profile.

    Raises:
        NotPosedError: the model is unknown, or not divided by so many ranks.
    """
    problem, shape = _shape(run.model, run.tp, run.gpu)
    lengths = LengthBin(prompt_tokens=float(run.prompt_tokens), output_tokens=float(run.output_tokens), weight=1.0)
    problem = replace(problem, workload=Workload(name="run", bins=(lengths,)))
    if host is not None:
        problem = replace(problem, profiles={run.gpu: _hosted(problem.profiles[run.gpu], *host)})
    try:
        return StageTiming(problem, shape, is_first=True, is_last=True)
    except HetisError as error:
        raise NotPosedError(str(error)) from None


def _hosted(profile: Profile, step_s: float, sequence_s: float) -> Profile:
    own = {Op.STEP: (Piece(fixed_s=step_s),), Op.SAMPLE: (Piece(token_s=sequence_s),)}
    return replace(
        profile, fits=tuple(replace(fit, pieces=own[fit.op]) if fit.op in own else fit for fit in profile.fits)
    )


def predict(
    run: Run, *, requests: int = REQUESTS, host: tuple[float, float] | None = None, outside_s: float | None = None
) -> tuple[float, float, float]:
    """Return mean end-to-end latency, TTFT and inter-token latency in seconds.

    A first token also takes ``outside_s`` outside of iterations, by default that of vLLM's server.
    """
    outside_s = ENGINES["vllm"].outside_s if outside_s is None else outside_s
    stage = timing(run, host)
    gaps = np.random.default_rng(0).exponential(1.0 / run.rate_rps, requests)
    first_s, last_s = open_loop(run, np.cumsum(gaps).tolist(), stage.seconds, stage.cost.model.attended_tokens)
    whole, first = float(np.mean(last_s)) + outside_s, float(np.mean(first_s)) + outside_s
    return whole, first, (whole - first) / (run.output_tokens - 1)


def open_loop(
    run: Run, arrivals_s: Sequence[float], seconds: Callable[..., float], attended: Callable[[float], float]
) -> tuple[list[float], list[float]]:
    """Return the seconds from arrival to the first and the last token of every request after the first ones.

    An iteration carries all decoding requests, and as many tokens of waiting prompts as fit beside them. It is
    scheduled as the one before it starts: what arrives meanwhile joins the one after it.
    """
    computed = max(1, round((1.0 - HIT_RATE) * run.prompt_tokens))
    coming, waiting = deque(enumerate(arrivals_s)), deque[tuple[int, int]]()  # request, tokens left of its prompt
    decoding: dict[int, int] = {}  # tokens generated
    first_s, last_s, now_s, scheduled_s = dict[int, float](), dict[int, float](), 0.0, 0.0
    while coming or waiting or decoding:
        if not waiting and not decoding:
            now_s = scheduled_s = max(now_s, coming[0][1])
        while coming and coming[0][1] <= scheduled_s:
            waiting.append((coming.popleft()[0], computed))
        num, room = len(decoding), run.chunk_tokens - len(decoding)
        reading = sum(attended(run.prompt_tokens + made) for made in decoding.values())
        tokens, pairs, done = 0, 0.0, list[int]()
        while waiting and room > tokens and num + len(done) < SEATS:
            request, left = waiting.popleft()
            part = min(left, room - tokens)
            end = run.prompt_tokens - left + part
            pairs += part * attended(end - part / 2)
            tokens += part
            if part < left:
                waiting.appendleft((request, left - part))
            else:
                done.append(request)
        read = attended(float(run.prompt_tokens)) * max(1, len(done)) if tokens else 0.0
        scheduled_s, now_s = now_s, now_s + seconds(num, reading, tokens, pairs, read, num + len(done))
        for request in list(decoding):
            decoding[request] += 1
            if decoding[request] >= run.output_tokens:
                del decoding[request]
                last_s[request] = now_s - arrivals_s[request]
        for request in done:
            first_s[request], decoding[request] = now_s - arrivals_s[request], 1
    counted = range(min(WARM, len(arrivals_s) // 4), len(arrivals_s))
    return [first_s[one] for one in counted], [last_s[one] for one in counted]


def compared(run: Run, predicted_s: Sequence[float]) -> Row:
    """Return the errors of a run, ours and those of others."""
    found: dict[str, Cell] = {"name": run.name}
    for of in ("ours", *OTHERS):
        answer = predicted_s if of == "ours" else run.others_s.get(of)
        for place, what in enumerate(("e2e", "ttft", "itl")):
            found[f"{of}_{what}"] = None if answer is None else answer[place] / run.measured_s[place] - 1.0
    return found


def totals(found: Sequence[Row]) -> Iterator[Row]:
    """Yield the mean of absolute errors, their median and the bias over all rows, by column."""
    columns = [key for key in found[0] if key != "name"] if found else []
    errors = {key: [float(value) for row in found if (value := row[key]) is not None] for key in columns}
    yield {"name": "all: mape", **{key: fmean(map(abs, some)) for key, some in errors.items()}}
    yield {"name": "all: median", **{key: median(map(abs, some)) for key, some in errors.items()}}
    yield {"name": "all: bias", **{key: fmean(some) for key, some in errors.items()}}


def fitted(runs: Sequence[Run], requests: int = 150) -> str:
    """Return the host's time with the least error of inter-token latency on one model, and its errors there and on the
    others."""
    model, _ = Counter(run.model for run in runs).most_common(1)[0]
    own, others = ([run for run in runs if (run.model == model) == is_own] for is_own in (True, False))

    def error(some: Sequence[Run], host: tuple[float, float]) -> float:
        errors = [predict(run, requests=requests, host=host)[2] / run.measured_s[2] - 1.0 for run in some]
        return fmean(map(abs, errors)) if errors else 0.0

    best = min(itertools.product(STEPS_S, SEQUENCES_S), key=partial(error, own))
    shipped = ENGINES["vllm"].step_s, ENGINES["vllm"].sequence_s
    lines = [f"error of inter-token latency on {len(own)} rows of {model}, and on the {len(others)} others:"]
    for name, host in (("fitted to the former", best), ("as shipped", shipped), ("without asynchronous", SYNCHRONOUS)):
        step_s, sequence_s = host
        lines.append(
            f"{name}: {1e3 * step_s:.2g} ms + {1e6 * sequence_s:.3g} us per sequence: {error(own, host):.1%}, "
            f"{error(others, host):.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
