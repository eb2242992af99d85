"""Answers of dispatch, re-dispatch and their steps on random stages: ``python -m tests.solver.recorded`` writes them.

Properties cannot distinguish a good heuristic from one that a mistake made a little worse, or that searches in another
order; recorded answers can. An intended change of a heuristic changes the file, too, and the diff shows which answers
became better and which worse. Times are kept rather than placements, which may differ if two are equally good.

For the steps, on their own inputs (`tests.solver.dispatch.steps`, `tests.solver.redispatch.steps`), a few numbers are
kept that change with every element of the outputs.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hetis.solver.dispatch.problem import Path
from hetis.solver.dispatch.solve import Dispatcher, solve_dispatch
from hetis.solver.redispatch.solve import solve_redispatch
from hetis.solver.redispatch.triggers import triggers
from tests.solver.dispatch import instances as dispatch
from tests.solver.dispatch.steps import STEPS as DISPATCH_STEPS
from tests.solver.redispatch import instances as redispatch
from tests.solver.redispatch.steps import STEPS as REDISPATCH_STEPS

Answer = dict[str, Any]
FILE = pathlib.Path(__file__).with_name("recorded.json")
STEPS_FILE = FILE.with_name("recorded_steps.json")
NUM_DISPATCHES, NUM_REDISPATCHES = 240, 150
PROVED = 1e-4  # gap of a plan that further search would not have improved


def is_same(name: str, before: Any, now: Any) -> bool:
    """Return whether a value is the recorded one, exactly or approximately, depending on its name."""
    if not isinstance(now, float):
        return bool(now == before)
    return math.isclose(now, before, rel_tol=5e-3 if name.startswith("about") else 1e-6, abs_tol=1e-9)


def dispatched(seed: int) -> Answer:
    """Dispatch on a random stage of any kind, with short memory in two of three cases."""
    rng = np.random.default_rng(seed)
    problem = dispatch.random_problem(
        rng,
        num_devices=int(rng.integers(2, 13)),
        num_requests=int(rng.integers(1, 10)),
        pieces=int(rng.integers(1, 4)),
        head_groups=int(rng.choice([1, 2, 4, 8])),
        load=rng.choice(["level", "uneven", "idle"]),
        tp=[None, 1, 2, 4][int(rng.integers(4))],
        nic_share=float(rng.choice([0.0, 0.5, 1.2])),
        free_ratio=[None, 3.0, 1.3, 1.1, 1.03, 0.7][int(rng.integers(6))],
        equal_growth=bool(rng.integers(2)),
    )
    plan = solve_dispatch(problem)
    answer = {
        "path": plan.path.value,
        "bound_us": plan.bound_s * 1e6,
        "relaxed_us": plan.relaxed_s * 1e6,
        "unplaced": [str(one) for one in plan.unplaced],
    }
    # If HiGHS or ruin and recreate took part, the last digits decide which of several good plans is found.
    if plan.path is not Path.LP and plan.gap < PROVED:
        answer |= {"makespan_us": plan.makespan_s * 1e6, "groups": sorted(plan.groups.sum(axis=0).tolist())}
    else:
        answer["about_us"] = plan.makespan_s * 1e6
    return answer


def redispatched(seed: int) -> Answer:
    """Re-dispatch on a random stage of any kind, and why it was due."""
    rng = np.random.default_rng(seed)
    head_groups = int(rng.choice([1, 2, 4, 8]))
    is_large = rng.random() < 0.12  # so large that the integer program considers only some requests
    problem = redispatch.random_problem(
        seed,
        num_devices=int(rng.integers(6, 17) if is_large else rng.integers(2, 6)),
        num_requests=int(rng.integers(20, 60) if is_large else rng.integers(1, 13)),
        head_groups=head_groups,
        pieces=int(rng.integers(1, 3)),
        tp=[None, 1, min(2, head_groups)][int(rng.integers(3))],
        slack=float(rng.choice([0.0, 0.05, 0.3, 2.0])),
        draining=bool(rng.random() < 0.3),
        budget_share=float(rng.choice([0.1, 0.3, np.inf, np.inf])),
        least_gain=float(rng.choice([0.0, 0.0, 0.05])),
        high_water=float(rng.choice([0.5, 0.9, 1.0])),
    )
    if rng.random() < 0.25:
        problem = replace(problem, snapshot=redispatch.with_moves_under_way(problem.snapshot, rng))
    if rng.random() < 0.2:
        problem = replace(problem, full=frozenset({int(rng.integers(len(problem.snapshot.devices)))}))
    plan = solve_redispatch(problem)
    return {
        "objective_us": plan.objective_s * 1e6,
        "bound_us": plan.bound_s * 1e6,
        "makespan_us": plan.makespan_after_s * 1e6,
        "short": plan.short_after,
        "copied_mb": plan.num_bytes / 1e6,
        "moves": [f"{move.request} {move.groups} {move.reason.value} {move.wave}" for move in plan.moves],
        "seconds": sum(move.seconds for move in plan.moves),
        "payback_steps": sum(move.payback_steps or 0.0 for move in plan.moves),
        "refused": len(plan.refused),
        "due": [f"{one.device}: {one}" for one in triggers(problem.snapshot, Dispatcher(problem.snapshot.stage))],
    }


KINDS: dict[str, tuple[int, Callable[[int], Answer]]] = {
    "dispatch": (NUM_DISPATCHES, dispatched),
    "redispatch": (NUM_REDISPATCHES, redispatched),
}
# Seeds of large stages that take about 1 s each; the other large ones remain.
SLOW = {"redispatch": {80, 142}}
STEPS = {"dispatch": DISPATCH_STEPS, "redispatch": REDISPATCH_STEPS}
DIGITS = 9  # digits of every number of a step


def recorded(kind: str) -> list[Answer]:
    """Return the recorded answers by seed."""
    answers: list[Answer] = json.loads(FILE.read_text(encoding="utf-8"))[kind]
    return answers


def recorded_step(kind: str, step: str) -> list[list[float]]:
    """Return the recorded numbers of a step by seed."""
    rows: list[list[float]] = json.loads(STEPS_FILE.read_text(encoding="utf-8"))[kind][step]
    return rows


def main() -> None:
    if sys.argv[1:] == ["steps"]:
        _record_steps()
        return
    answers = {kind: [answer(seed) for seed in range(number)] for kind, (number, answer) in KINDS.items()}
    _write(FILE, {kind: _list(rows) for kind, rows in answers.items()})
    plain = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-m", "tests.solver.recorded", "steps"], env=plain, check=True)


def _record_steps() -> None:
    """Write the numbers of all steps, with kernels as plain Python, which the compiled ones must agree with."""
    rows = {
        kind: {step: [answer(seed) for seed in range(number)] for step, (number, answer) in of_kind.items()}
        for kind, of_kind in STEPS.items()
    }
    short = {
        kind: {step: [[_short(x) for x in row] for row in of_step] for step, of_step in of_kind.items()}
        for kind, of_kind in rows.items()
    }
    _write(
        STEPS_FILE, {kind: _object({step: _list(of) for step, of in steps.items()}) for kind, steps in short.items()}
    )


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _list(rows: list[Any]) -> str:
    lines = ",\n".join(json.dumps(row, default=str) for row in rows)
    return f"[\n{lines}\n]"


def _object(texts: dict[str, str]) -> str:
    lines = ",\n".join(f'"{name}": {text}' for name, text in texts.items())
    return f"{{\n{lines}\n}}"


def _write(file: pathlib.Path, texts: dict[str, str]) -> None:
    file.write_text(f"{_object(texts)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
