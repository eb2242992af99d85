"""Predictions against measurements of real engines: TPOT and TTFT of public serving points.

    python -m benchmarks.accuracy.silicon [--points FILE] [--json] [--only TEXT] [--quick] [--markdown]
        [--peer-python PYTHON]

Every row of the table (`benchmarks.accuracy.serving_points`) is one engine on some GPUs with a constant number of
requests in flight. What the cost model can express is predicted from the catalogue and shipped profiles, or modelled
ones for GPUs without measurements; the rest is counted with its reason. Profiles are made of tables of single
operators, and engine settings are those of published scripts. An engine's host times are fitted to two models on one
GPU, whose rows are marked in ``split`` and are in no total.

A row is one (GPU, engine, model, kind, mode). ``..._mape`` is the mean absolute error over its points, ``..._bias`` the
mean of predicted / measured - 1 (negative: predicted too fast), and ``tpot_p90`` the error that nine in ten points stay
below. ``warmed_n`` and ``warmed_ttft_mape`` leave out the runs in which engines were not warmed up
(`ServingPoint.is_warmed`). The last rows count what is ``covered`` and what is ``skipped``. ``--peer-python`` is a
Python with aiconfigurator, which answers the same rows; ``both_...`` compare the two where both answer. ``--markdown``
writes docs/accuracy.md.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.accuracy import published_points
from benchmarks.accuracy.aisimulate import beside_aisimulate
from benchmarks.accuracy.closed_loop import CopyTime, Engine, Load, balanced_copies, closed_loop
from benchmarks.accuracy.published_points import FOLDER, NotPosedError
from benchmarks.accuracy.published_settings import ACCEPTANCE, Graphs, eager_layer_s
from benchmarks.accuracy.serving_points import COLUMNS, MIXES, NODE_GPUS, ServingPoint, posed
from benchmarks.measuring import rows
from benchmarks.measuring.instances import NO_LIMITS, fleet
from benchmarks.measuring.rows import Cell, Row
from hetis.formats import catalogue
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.engines import for_engine
from hetis.profiler.roofline import modelled_profile
from hetis.simulator.kv_memory import rank_room_bytes
from hetis.simulator.timing import StageTiming
from hetis.solver.check.replica_shapes import StageShape
from hetis.solver.check.setting import Setting, head_groups_per_rank
from hetis.solver.cost import intra_link
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Profile
from hetis.solver.workload import LengthBin, Workload

POINTS = FOLDER / "serving_points.csv.gz"
PEER = Path(__file__).parent / "aiconfigurator_peer.py"
PEER_ABSENT = "aiconfigurator was not asked: --peer-python names a Python that has it."
ROUNDS = 10  # requests of a run per request in flight, as in InferenceX
LEAST_DECODING = 0.5  # share of the seats in memory, below which something not in the row held requests back
READINGS_S = (0.0, 2e-6, 4e-6, 6e-6, 8e-6, 10e-6, 14e-6)  # time in which the server reads one token of a prompt
ANSWERS_S = tuple(0.005 * k for k in range(41))  # way to the server and back
# Both, for a table without models of the other kind under the same engine: the fits to those in serving_points.csv.gz.
USUAL_S: Mapping[tuple[str, str], tuple[float, float]] = {
    ("vllm", "moe"): (10e-6, 0.015),
    ("vllm", "dense"): (14e-6, 0.015),
    ("trtllm", "moe"): (4e-6, 0.0),
    ("trtllm", "dense"): (6e-6, 0.0),
    ("sglang", "moe"): (0.0, 0.145),
    ("sglang", "dense"): (10e-6, 0.11),
}
QUICK_ROUNDS, QUICK_STRIDE = 2, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A point and its prediction."""

    point: ServingPoint
    ttft_s: float  # without the way to the server and back, until `answered` adds it
    tpot_s: float
    seats: int  # requests whose KV fits

    @property
    def tpot_error(self) -> float:
        """Return predicted / measured - 1."""
        return self.tpot_s / self.point.tpot_s - 1.0

    @property
    def ttft_error(self) -> float:
        """Return predicted / measured - 1."""
        return self.ttft_s / self.point.ttft_s - 1.0


def main() -> None:
    """Print a row per (GPU, engine, model, kind, mode), and the numbers of covered and skipped rows."""
    parser = published_points.parser("benchmarks.accuracy.silicon", __doc__, POINTS)
    parser.add_argument("--peer-python", metavar="PYTHON", help="a Python with aiconfigurator, to answer the same rows")
    arguments = parser.parse_args()
    table = published_points.asked_rows(arguments, COLUMNS)
    if table is None:
        return
    outcomes, skipped = predicted(table, quick=arguments.quick, only=arguments.only)
    peer = None if arguments.peer_python is None else peer_answers(arguments.peer_python, [o.point for o in outcomes])
    groups = list(group_rows(outcomes, peer))
    covered = list(published_points.coverage("covered", len(outcomes), skipped))
    if arguments.markdown:
        write_document(groups, covered)
    if arguments.json:
        for row in (*groups, *covered):
            print(json.dumps(row), flush=True)
        return
    print(rows.table(groups))
    published_points.print_coverage(covered, "points")
    if peer is None:
        print(PEER_ABSENT)


def write_document(groups: Sequence[Row], covered: Sequence[Row]) -> None:
    """Write the tables of docs/accuracy.md."""
    whole = [row for row in groups if row["model"] == "all"]
    single = [row for row in groups if row["model"] != "all"]
    published_points.write_skipped("silicon", covered, "points")
    rows.keep("silicon aisimulate", in_percent(beside_aisimulate(single)))
    rows.keep("silicon", in_percent([*whole, *single]))


def in_percent(groups: Sequence[Row]) -> list[Row]:
    """Return the errors as percentages, to one decimal."""
    return [
        {
            key: f"{v:+.1%}" if key.endswith("bias") else f"{v:.1%}" if isinstance(v, float) else v
            for key, v in row.items()
        }
        for row in groups
    ]


def predicted(
    table: list[dict[str, str]], *, quick: bool = False, only: str = ""
) -> tuple[list[Outcome], Counter[str]]:
    """Return the predictions, and the number of rows without one by reason."""
    found, skipped = list[Readings](), Counter[str]()
    for number, point in enumerate(posed(table)):
        if quick and number % QUICK_STRIDE:
            continue
        if not isinstance(point, ServingPoint):
            skipped[point[1]] += 1
            continue
        if only not in f"{point.gpu} {point.engine} {point.label}":
            continue
        how = {"rounds": QUICK_ROUNDS if quick else ROUNDS}
        try:
            found.append(tuple(predict(point, reading_s=s, **how) for s in READINGS_S))
        except NotPosedError as error:
            skipped[str(error)] += 1
    return answered(found), skipped


Readings = tuple[Outcome, ...]  # outcomes of one point, one for each of `READINGS_S`


def answered(found: Sequence[Readings]) -> list[Outcome]:
    """Return the outcomes with the part of a first token's time outside of iterations, fitted per engine and source.

    The server reads one prompt after another, and there is a way to it and back; neither is in any table, and neither
    loads a GPU. For models with experts both are the values with the least error of TTFT on the dense models of the
    same engine and source (or, without any, of the same engine), and the other way around: no point has a part in its
    own prediction. If the table has no such models, both are the usual ones.
    """
    groups = defaultdict[tuple[str, str, str], list[Readings]](list)
    for outcomes in found:
        point = outcomes[0].point
        groups[point.engine, point.source, point.kind].append(outcomes)
    finished = list[Outcome]()
    for (engine, source, kind), members in groups.items():
        other = "dense" if kind == "moe" else "moe"
        of_engine = [one for key, group in groups.items() if (key[0], key[2]) == (engine, other) for one in group]
        fitted_to = groups.get((engine, source, other)) or of_engine
        if fitted_to:
            place, more_s = outside_iterations(fitted_to)
        else:
            reading_s, more_s = USUAL_S[engine, kind]
            place = READINGS_S.index(reading_s)
        finished += [replace(one[place], ttft_s=one[place].ttft_s + more_s) for one in members]
    return finished


def outside_iterations(found: Sequence[Readings]) -> tuple[int, float]:
    """Return the place in `READINGS_S` and the seconds to add with the least mean error of TTFT."""
    measured_s = np.array([one[0].point.ttft_s for one in found])
    predicted_s = [np.array([one[place].ttft_s for one in found]) for place in range(len(READINGS_S))]
    choices = ((place, more_s) for place in range(len(READINGS_S)) for more_s in ANSWERS_S)
    return min(choices, key=lambda one: float(np.abs((predicted_s[one[0]] + one[1]) / measured_s - 1.0).mean()))


def predict(
    point: ServingPoint, *, rounds: int = ROUNDS, reading_s: float = 0.0
) -> Outcome:  # fmt: skip
    """Return the mean TTFT, without the way to the server and back, and the mean TPOT of a point.

    The server takes ``reading_s`` for each token of a prompt.

    Raises:
        NotPosedError: none of its requests fits in memory, or the engine ran far fewer than fit.
    """
    settings = point.settings
    timing, room = stage_of(point, settings.chunk_tokens)
    seats = min(room, settings.seats or room)
    if point.decoding < LEAST_DECODING * min(point.requests, seats):
        raise NotPosedError("most requests waited though their KV fits: the engine's own limit is not recorded")
    load = Load(
        in_flight=point.requests, total=rounds * point.requests, prompt_tokens=point.prompt_tokens,
        output_tokens=point.output_tokens, shortest=point.shortest,
    )  # fmt: skip
    engine = engine_of(point, seats, reading_s)
    seconds = iteration_time(point, timing)
    if settings.balance_iterations:
        of_all = replace(load, in_flight=point.copies * load.in_flight, total=point.copies * load.total)
        ttft_s, tpot_s = balanced_copies(of_all, engine, seconds, point.model.attended_tokens)
    else:

        def alike(
            decoding: int, attended: float, chunk_tokens: int, chunk_pairs: float, chunk_read: float, rows: int, /
        ) -> float:
            """Return the seconds of an iteration in which every copy has the same work."""
            others = (point.copies - 1) * (decoding + chunk_tokens)
            return seconds(decoding, attended, chunk_tokens, chunk_pairs, chunk_read, rows, others)

        ttft_s, tpot_s = closed_loop(load, engine, alike, point.model.attended_tokens)
    return Outcome(point=point, ttft_s=ttft_s, tpot_s=tpot_s, seats=seats)


def engine_of(point: ServingPoint, seats: int, reading_s: float) -> Engine:
    """Return the engine as it was started for a point."""
    settings = point.settings
    return Engine(
        chunk_tokens=settings.chunk_tokens, seats=seats, mixes=MIXES[point.engine],
        keeps_whole=settings.keeps_whole, poll_iterations=settings.poll_iterations,
        wait_iterations=settings.wait_iterations, wait_tokens=settings.wait_tokens, copies=point.copies,
        balance_iterations=settings.balance_iterations, gather_iterations=settings.gather_iterations,
        draft_tokens=settings.draft_tokens, tokens_per_iteration=1.0 + accepted(point),
        layers=point.model.num_layers, reading_s=reading_s, schedules_ahead=settings.schedules_ahead,
    )  # fmt: skip


def iteration_time(point: ServingPoint, timing: StageTiming) -> CopyTime:
    """Return the time of a copy's iterations, with the host launching what is not in CUDA graphs."""
    graphs, graph_tokens, layers = point.settings.graphs, point.settings.graph_tokens, point.model.num_layers

    def seconds(
        decoding: int, attended: float, chunk_tokens: int, chunk_pairs: float, chunk_read: float, rows: int,
        others: int, /,
    ) -> float:  # fmt: skip
        kernels_s = timing.seconds(decoding, attended, chunk_tokens, chunk_pairs, chunk_read, rows, others)
        if graphs is not Graphs.NONE and (not chunk_tokens or decoding + chunk_tokens <= graph_tokens):
            return kernels_s
        mixes, has_pieces = decoding > 0 < chunk_tokens, graphs is Graphs.ALL
        host_s = eager_layer_s(point.engine, point.model, mixes=mixes, attention_only=has_pieces)
        return max(kernels_s, layers * host_s)

    return seconds


def stage_of(point: ServingPoint, chunk_tokens: int) -> tuple[StageTiming, int]:
    """Return the replica's only stage, and the number of requests for which its KV has room.

    Raises:
        NotPosedError: the stage has room for none.
    """
    model, share = point.model, (1.0 + point.shortest) / 2.0
    lengths = LengthBin(
        prompt_tokens=share * point.prompt_tokens, output_tokens=share * point.output_tokens, weight=1.0
    )  # fmt: skip
    problem = PlacementProblem(
        cluster=fleet("node", (1, NODE_GPUS, point.gpu)),
        model=model,
        workload=Workload(name="point", bins=(lengths,)),
        profiles={point.gpu: profile_of(point)},
        objective=NO_LIMITS,
    )
    link = intra_link(catalogue.find_gpu(point.gpu).gpu, None)
    shape = StageShape(
        gpu=point.gpu, tp=point.tp, copies=point.copies, layers=model.num_layers - model.prefix_layers, intra_link=link,
        hop_link=link,
    )  # fmt: skip
    moments = problem.workload.moments(block_tokens=problem.assumptions.block_tokens)
    setting = Setting(
        problem=problem, moments=moments, micro_batch=point.requests, in_flight=point.copies, chunk_tokens=chunk_tokens,
        attention_dp=point.copies,
    )  # fmt: skip
    timing = StageTiming(problem, shape, is_first=True, is_last=True, attention_dp=point.copies)
    room = room_bytes(point, setting, shape, timing)
    per_token = model.num_layers * head_groups_per_rank(model, point.tp) * model.kv_bytes_per_token_group()
    held = model.cached_tokens(lengths.prompt_tokens + lengths.output_tokens / 2)
    whole = model.cached_tokens(float(point.prompt_tokens + point.output_tokens))
    if room < whole * per_token:
        raise NotPosedError("weights and one request do not fit in memory")
    return timing, max(1, int(room / (held * per_token)))


def room_bytes(point: ServingPoint, setting: Setting, shape: StageShape, timing: StageTiming) -> float:
    """Return the bytes of a rank for KV: by the script that started the engine, or all that is left."""
    settings, memory_bytes = point.settings, catalogue.find_gpu(point.gpu).gpu.memory_bytes
    if settings.static_share is not None:
        cost = timing.cost
        embeddings = cost.embedding_bytes() * (1 if point.model.tie_embeddings else 2)
        weights = shape.layers * cost.layer_bytes() + cost.prefix_bytes() + embeddings
        return settings.static_share * memory_bytes - weights
    room = rank_room_bytes(setting, shape, is_first=True, is_last=True)
    if settings.free_share is None:
        return room
    return settings.free_share * (room + memory_bytes - setting.problem.profiles[shape.gpu].usable_bytes)


def profile_of(point: ServingPoint) -> Profile:
    """Return the shipped profile, or the modelled one if there is none, with the engine applied."""
    settings = point.settings
    is_default = settings.default_experts and (point.copies == 1 or point.engine != "trtllm")
    is_whole, ahead = point.has_whole_experts, settings.schedules_ahead
    return engine_profile(point.gpu, point.engine, settings.stream_interval, is_whole, is_default, ahead)


@cache
def engine_profile(
    gpu: str, engine: str, stream_interval: int, whole_experts: bool, default_backend: bool, schedules_ahead: bool
) -> Profile:  # fmt: skip
    kind = catalogue.find_gpu(gpu).gpu
    return for_engine(
        shipped_profile(gpu) or modelled_profile(kind), kind, engine, stream_interval=stream_interval,
        whole_experts=whole_experts, default_backend=default_backend, schedules_ahead=schedules_ahead,
    )  # fmt: skip


Peer = Mapping[str, tuple[float, float] | str]  # by row id: TTFT and TPOT in seconds, or the reason for no answer


def peer_answers(python: str, points: Sequence[ServingPoint]) -> Peer:
    """Return aiconfigurator's answers for the same rows.

    Raises:
        SystemExit: aiconfigurator cannot be started.
    """
    # Each key loads its tables; parallel sizes as they were, and requests of one copy.
    ordered = sorted(points, key=lambda point: (point.gpu, point.engine, point.label))
    asked = "\n".join(json.dumps(dict(point.row) | beside_row(point)) for point in ordered)
    try:
        done = subprocess.run([python, str(PEER)], input=asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise SystemExit(f"{python}: aiconfigurator did not answer: {detail.strip().splitlines()[-1]}") from None
    answers: dict[str, tuple[float, float] | str] = {}
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        answers[answer["id"]] = answer.get("error") or (answer["ttft_ms"] / 1e3, answer["tpot_ms"] / 1e3)
    return answers


def beside_row(point: ServingPoint) -> dict[str, str | float]:
    """Return the fields of a row that published settings change: 8-bit KV, ranks, drafted and accepted tokens."""
    drafts = point.settings.draft_tokens
    kv: dict[str, str | float] = {"kvcache_quant_mode": "fp8"} if point.model.kv_bytes == 1.0 else {}
    if point.copies > 1 or point.row.get("attention_dp_size") not in ("", "1", None):
        kv |= {"tp_size": str(point.tp), "attention_dp_size": str(point.copies), "batch_size": str(point.requests)}
        kv |= {"moe_tp_size": "1", "moe_ep_size": str(point.tp * point.copies)}
    return kv | ({"nextn": drafts, "nextn_accepted": accepted(point)} if drafts else {})


def accepted(point: ServingPoint) -> float:
    """Return how many of a request's drafts are accepted in an iteration, on average.

    Raises:
        NotPosedError: this is not known for the model.
    """
    drafts = point.settings.draft_tokens
    if not drafts:
        return 0.0
    curve = ACCEPTANCE.get(point.label, ())
    if drafts >= len(curve):
        raise NotPosedError(f"how many of {drafts} drafts of {point.label} are accepted is not known")
    return curve[drafts] - 1.0


def group_rows(outcomes: Sequence[Outcome], peer: Peer | None) -> Iterator[Row]:
    """Yield a row per (GPU, engine, model, kind, mode).

    For held-out points, also yield one without the model, and one per kind.
    """
    for keys in (("gpu", "engine", "model"), ("gpu", "engine"), ("gpu",), ()):
        groups = defaultdict[tuple[str, ...], list[Outcome]](list)
        for outcome in outcomes:
            point = outcome.point
            if point.is_calibration and "model" not in keys:
                continue
            named = {"gpu": point.gpu, "engine": point.engine, "model": point.label}
            groups[(*(named.get(key, "") for key in keys), point.kind, point.mode)].append(outcome)
        for group, members in sorted(groups.items()):
            names = [*group[:-2], *["all"] * (3 - len(keys)), *group[-2:]]
            labels: dict[str, Cell] = dict(zip(("gpu", "engine", "model", "kind", "mode"), names, strict=True))
            split = "calibration" if members[0].point.is_calibration else "held out"
            theirs = {} if peer is None else peer_statistics(members, peer)
            yield labels | {"split": split} | statistics(members) | theirs


def statistics(outcomes: Sequence[Outcome]) -> dict[str, Cell]:
    """Return the errors of a group's points."""
    tpot = np.array([outcome.tpot_error for outcome in outcomes])
    ttft = np.array([outcome.ttft_error for outcome in outcomes])
    warmed = np.array([outcome.point.is_warmed for outcome in outcomes])
    return {
        "n": len(outcomes),
        "tpot_mape": _round(np.abs(tpot).mean()),
        "tpot_bias": _round(tpot.mean()),
        "tpot_p90": _round(np.quantile(np.abs(tpot), 0.9)),
        "ttft_mape": _round(np.abs(ttft).mean()),
        "ttft_bias": _round(ttft.mean()),
        "warmed_n": int(warmed.sum()),
        "warmed_ttft_mape": _round(np.abs(ttft[warmed]).mean()) if warmed.any() else None,
    }


def peer_statistics(outcomes: Sequence[Outcome], peer: Peer) -> dict[str, Cell]:
    """Return the errors of both over the points that both answer."""
    both = [(o, answer) for o in outcomes if not isinstance(answer := peer.get(o.point.row["id"], ""), str)]
    row: dict[str, Cell] = {"both_n": len(both)}
    for name, index in (("ttft", 0), ("tpot", 1)):
        ours = [abs(getattr(o, f"{name}_error")) for o, _ in both]
        theirs = [abs(answer[index] / getattr(o.point, f"{name}_s") - 1.0) for o, answer in both]
        row[f"both_{name}_mape"] = _round(np.mean(ours)) if both else None
        row[f"peer_{name}_mape"] = _round(np.mean(theirs)) if both else None
    return row


def _round(value: float | np.floating) -> float:
    return float(f"{value:.4f}")


if __name__ == "__main__":
    main()
