"""Simulated runs against whole engines that others measured: Splitwise's end-to-end table.

    python -m benchmarks.whole_engine [--quick] [--json] [--only TEXT] [--data FOLDER]

The table has Llama-2-70B on 2, 4 and 8 GPUs of a DGX-A100 and a DGX-H100 (vLLM of 2023), with batches of 1 to 64 equal
requests at once and prompts of 128 to 8192 tokens. Here the same requests arrive together at one replica of these GPUs
with the shipped profile, and all prompts form one chunk, as in that engine.

A row is one (GPU, TP). ``ttft``, ``tpot`` and ``e2e`` are mean absolute errors of the simulated times over all points,
and ``..._bias`` means of simulated / measured - 1. The rows *with its host* add one number to the profile, charged to
every iteration: the seconds by which the predicted token step of one request with a prompt of 512 is below the measured
one. It is fitted to that point alone, which is left out of the row; all others are predicted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import fleet
from benchmarks.measuring.rows import Row
from hetis.formats.documents import load_model
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.importers import import_tables
from hetis.simulator.simulate import simulate
from hetis.simulator.values import Request
from hetis.solver.plan import Objective, ObjectiveKind, Plan, ReplicaPlan, SolveResult, StagePlan, Status
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op, Piece, Profile
from hetis.solver.workload import LengthBin, Workload
from tools.whole_engine import EngineTime, engine_times

MODEL = "meta-llama/Llama-2-70b-hf"
GPUS = ("A100-SXM-80GB", "H100-SXM-80GB")
TABLE = "splitwise_e2e.csv.gz"
DATA = Path(__file__).parents[2] / "shared" / "data" / "profiles"
CALIBRATED_AT = (1, 512)  # batch and prompt of the point that gives the host's time


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of the table: equal simultaneous requests, with seconds to the first token and per later token."""

    gpu: str
    tp: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    prompt_s: float
    token_s: float

    @property
    def end_to_end_s(self) -> float:
        return self.prompt_s + (self.output_tokens - 1) * self.token_s


def main() -> None:
    """Print two rows per GPU type and TP size."""
    parser = rows.parser("benchmarks.whole_engine", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help=f"where {TABLE} is")
    arguments = parser.parse_args()
    if not (arguments.data / TABLE).is_file():
        message = f"{arguments.data / TABLE}: no such file; --data says where the table is"
        if not arguments.quick:
            raise SystemExit(message)
        print(message, file=sys.stderr)  # --quick must run everywhere, but we may not ship the table
        return
    rows.show(engine_rows(arguments.data, quick=arguments.quick, only=arguments.only), arguments, name="whole_engine")


def engine_rows(data: Path, *, quick: bool, only: str) -> Iterator[Row]:
    """Yield a row for every GPU type and TP size, with the profile as it is and with the host's time."""
    profiles = {gpu: _shipped(gpu) for gpu in GPUS}
    times, _ = engine_times(import_tables("splitwise", [data / TABLE]), profiles, MODEL)
    points = points_of(times)
    for gpu in GPUS[:1] if quick else GPUS:
        for tp in (2,) if quick else (2, 4, 8):
            here = [one for one in points if (one.gpu, one.tp) == (gpu, tp)]
            name = f"{gpu} TP {tp}"
            host_s = _host_s(profiles[gpu], here)
            for label, added_s in ((name, 0.0), (f"{name}, with its host", host_s)):
                if only in label:
                    yield _row(label, with_host(profiles[gpu], added_s), here, added_s)


def points_of(times: Sequence[EngineTime]) -> list[Point]:
    """Return the runs with at least two output tokens for which both phases are known."""
    prompts = {_key(time): time for time in times if time.phase == "prompt"}
    return [
        Point(
            gpu=time.gpu,
            tp=time.tp,
            batch=time.batch,
            prompt_tokens=time.prompt_tokens,
            output_tokens=time.output_tokens,
            prompt_s=prompts[_key(time)].measured_s,
            token_s=time.measured_s,
        )
        for time in times
        if time.phase == "token" and _key(time) in prompts
    ]


def simulated(profile: Profile, point: Point) -> Point | None:
    """Return the same run in virtual time, or None if not all of its requests fit at once."""
    problem, plan = _alone(profile, point)
    run = simulate(plan, problem, _AtOnce(point))
    if run.rejected or run.num_preemptions or run.admitted_s.max() > 0:
        return None
    decode_s = float((run.finished_s - run.first_token_s).max())
    return replace(point, prompt_s=float(run.first_token_s.max()), token_s=decode_s / (point.output_tokens - 1))


class _AtOnce:
    """The requests of a point, each available when it is requested (`hetis.simulator.values.SaturatingSource`)."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._left = iter(range(point.batch))

    def next_request(self, now_s: float) -> Request | None:
        number = next(self._left, None)
        if number is None:
            return None
        prompt, output = self._point.prompt_tokens, self._point.output_tokens
        return Request(id=number, arrival_s=now_s, prompt_tokens=prompt, output_tokens=output)


def with_host(profile: Profile, host_s: float) -> Profile:
    """Return the profile with ``host_s`` added to every iteration."""
    if not host_s:
        return profile
    slower = [
        replace(one, pieces=tuple(_slower(piece, host_s) for piece in one.pieces))
        for one in profile.fits
        if one.op is Op.STEP
    ]
    others = [one for one in profile.fits if one.op is not Op.STEP]
    assert slower, "every shipped profile has a step"
    return replace(profile, fits=(*others, *slower))


def _slower(piece: Piece, seconds: float) -> Piece:
    return replace(piece, fixed_s=piece.fixed_s + seconds)


def _key(time: EngineTime) -> tuple[str, int, int, int, int]:
    return time.gpu, time.tp, time.batch, time.prompt_tokens, time.output_tokens


def _shipped(gpu: str) -> Profile:
    profile = shipped_profile(gpu)
    assert profile is not None, f"{gpu} has a shipped profile"
    return profile


def _host_s(profile: Profile, points: Sequence[Point]) -> float:
    """Return the seconds by which the profile is below the measured token step at `CALIBRATED_AT`."""
    for point in points:
        if _is_calibration(point):
            found = simulated(profile, point)
            assert found is not None, "one request fits"
            return max(0.0, point.token_s - found.token_s)
    raise AssertionError("the table has a run of one request with 512 prompt tokens")


def _is_calibration(point: Point) -> bool:
    return (point.batch, point.prompt_tokens) == CALIBRATED_AT and point.output_tokens == 128


def _row(name: str, profile: Profile, points: Sequence[Point], host_s: float) -> Row:
    pairs = [(one, simulated(profile, one)) for one in points if not (host_s and _is_calibration(one))]
    fitting = [(measured, found) for measured, found in pairs if found is not None]
    row: dict[str, rows.Cell] = {"name": name, "points": len(fitting), "no_room": len(pairs) - len(fitting)}
    row["host_ms"] = host_s * 1e3
    for label, attribute in (("ttft", "prompt_s"), ("tpot", "token_s"), ("e2e", "end_to_end_s")):
        errors = np.array([getattr(found, attribute) / getattr(measured, attribute) - 1 for measured, found in fitting])
        row[f"{label}_error"] = float(np.abs(errors).mean())
        row[f"{label}_bias"] = float(errors.mean())
        row[f"{label}_worst"] = float(errors[np.abs(errors).argmax()])
    return row


def _alone(profile: Profile, point: Point) -> tuple[PlacementProblem, Plan]:
    """Return a one-stage replica that takes a point's prompts in one chunk and its requests in one batch."""
    spec = load_model(MODEL)
    spec = replace(spec, max_position=max(spec.max_position, 2 * (point.prompt_tokens + point.output_tokens)))
    bins = (LengthBin(prompt_tokens=point.prompt_tokens, output_tokens=point.output_tokens, weight=1.0),)
    objective = Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None)
    problem = PlacementProblem(
        cluster=fleet(f"{point.tp} {profile.gpu}", (1, point.tp, profile.gpu)),
        model=spec,
        workload=Workload(name="equal", bins=bins),
        profiles={profile.gpu: profile},
        objective=objective,
    )
    devices = tuple(device.name for device in problem.cluster.devices())
    stage = StagePlan(
        gpu=profile.gpu, tp=point.tp, copies=1, first_layer=0, num_layers=spec.num_layers, devices=devices,
        kv_head_groups_kept=max(1, spec.head_groups // point.tp),
    )  # fmt: skip
    replica = ReplicaPlan(
        rate=1.0, ttft_s=1.0, tpot_s=1.0, micro_batch=point.batch, in_flight=1,
        chunk_tokens=point.batch * point.prompt_tokens, kv_tokens=0, stages=(stage,),
    )  # fmt: skip
    result = SolveResult(
        status=Status.FEASIBLE, objective=objective.kind, value=1.0, bound=1.0, gap=0.0, unit="requests/s", solve_s=0.0
    )
    return problem, Plan(strategy="by hand", family="by hand", result=result, objective=objective, replicas=(replica,))


if __name__ == "__main__":
    main()
