"""Processes that start at once compile a kernel once: the first one does it, and the others load the result.

Nor is a kernel compiled again for each constant that another kernel passes to it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

from hetis.solver.dispatch.dispatcher import compile_dispatch
from hetis.solver.redispatch.redispatcher import compile_redispatch

ROOT = Path(__file__).parents[2]

KERNELS = """
import sys
from pathlib import Path
import numpy as np
from hetis.solver.backends.compiled import kernel_of

kernel = kernel_of(Path(__file__).parent)

@kernel
def inner(values, at):
    return np.sort(values)[at]

@kernel
def outer(values):
    return inner(values, 0) + inner(values, 1) - inner(values, -1) + np.argsort(values)[0]

if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    assert outer(np.array([2.0, 1.0])) == 2.0
    print(sum(outer.stats.cache_misses.values()), sum(outer.stats.cache_hits.values()), len(inner.signatures))
"""

TYPED = """
import sys
from pathlib import Path
from typing import NamedTuple
from hetis.solver.backends.compiled import kernel_of

sys.path.insert(0, str(Path(__file__).parent))
kernel = kernel_of(Path(__file__).parent)

class Pair(NamedTuple):
    one: float
    other: float

@kernel
def total(pair):
    return pair.one + pair.other

if __name__ == "__main__":
    import typed  # so that types are found under the name of the module
    print(typed.total(typed.Pair(1.0, 2.0)), sum(typed.total.stats.cache_misses.values()))
"""


def test_a_kernel_is_compiled_by_one_process_and_loaded_by_the_others(tmp_path: Path) -> None:
    file = tmp_path / "kernels.py"
    file.write_text(KERNELS, encoding="utf-8")
    counts = []
    processes = [
        subprocess.Popen([sys.executable, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            out, _ = process.communicate(timeout=300)
            counts.append(tuple(map(int, out.split())))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(counts) == [(0, 1, 0), (0, 1, 0), (1, 0, 1)]  # one `inner` for all three constants


SIMPLE = """
from pathlib import Path
from hetis.solver.backends.compiled import kernel_of

@kernel_of(Path(__file__).parent)
def twice(value):
    return value + value

assert twice(1.5) == 3.0
print(sum(twice.stats.cache_misses.values()), sum(twice.stats.cache_hits.values()))
"""


def _run(file: Path, *, most_kib: int | str = "unlimited") -> tuple[int, ...]:
    """Return how often `twice` was compiled and loaded in a process that may write files of at most ``most_kib``."""
    limited = ["bash", "-c", f'ulimit -f {most_kib}; exec "$@"', "bash", sys.executable, str(file)]
    run = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")
    return tuple(map(int, run.stdout.split()))


def test_a_kernel_is_used_although_it_cannot_be_saved(tmp_path: Path) -> None:
    file = tmp_path / "simple.py"
    file.write_text(SIMPLE, encoding="utf-8")
    assert _run(file, most_kib=0) == (1, 0)
    assert _run(file, most_kib=2) == (1, 0)  # room for the index, but not for the code
    assert [found.suffix for found in tmp_path.rglob("*.nb?")] == [".nbi"]
    assert _run(file) == (1, 0)
    assert _run(file) == (0, 1)


def test_cached_code_that_was_cut_off_is_compiled_anew(tmp_path: Path) -> None:
    file = tmp_path / "simple.py"
    file.write_text(SIMPLE, encoding="utf-8")
    assert _run(file) == (1, 0)
    for ending, share in itertools.product(("nbi", "nbc"), (0.0, 0.5)):
        (cached,) = tmp_path.rglob(f"*.{ending}")
        os.truncate(cached, int(share * cached.stat().st_size))
        assert _run(file) == (1, 0)
    assert _run(file) == (0, 1)


def test_cached_code_of_a_type_that_has_another_name_now_is_compiled_anew(tmp_path: Path) -> None:
    """An upgrade in place leaves the machine code of the previous version, whose types are looked up by name."""
    file = tmp_path / "typed.py"
    for name in ("Before", "After"):
        file.write_text(TYPED.replace("Pair", name), encoding="utf-8")
        run = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False, timeout=300)
        assert (run.stdout, run.stderr) == ("3.0 1\n", "")


WITHOUT_SCIPY = """
import sys
from hetis.solver.backends.compiled import kernel_of  # before numba itself is asked for anything
import numpy as np
from numba import njit
print("scipy.linalg" in sys.modules)
product = njit(lambda a, b: a @ b)  # of somebody else
print(product(np.eye(2), np.full((2, 2), 3.0))[0, 1], "scipy.linalg" in sys.modules)
"""


def test_numba_imports_scipy_only_for_those_who_multiply_matrices() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_SCIPY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3.0", "True"]


WARM = """
import traceback
import numpy as np
from hetis.solver.backends.search_clock import reporting_compilations
from hetis.solver.dispatch.dispatch_problem import Path
from hetis.solver.dispatch.dispatcher import compile_dispatch, solve_dispatch
from hetis.solver.redispatch.redispatcher import compile_redispatch, solve_redispatch
from tests.solver.dispatch import instances as dispatch
from tests.solver.redispatch import instances as redispatch

compile_dispatch()
compile_redispatch()
rng, paths, moves = np.random.default_rng(1), set(), 0
with reporting_compilations(lambda begins: traceback.print_stack() if begins else None):
    for seed in range(150):
        problem = dispatch.random_problem(
            rng, num_devices=1 + seed % 7, num_requests=seed % 9, pieces=1 + seed % 3, tp=(None, 1, 4)[seed % 3],
            nic_share=(0.0, 1.0)[seed % 2], free_ratio=(None, 1.3, 0.7, 1.05)[seed % 4],
        )
        paths.add(solve_dispatch(problem).path)
    for seed in range(40):
        problem = redispatch.random_problem(
            seed, num_devices=2 + seed % 3, num_requests=1 + seed % 6, tp=(None, 2)[seed % 2], slack=0.1 * (seed % 4)
        )
        moves += len(solve_redispatch(problem).moves)
print(*sorted(path.name for path in paths), moves > 0)
"""


def test_nothing_is_compiled_or_loaded_after_the_warm_up() -> None:
    """Dispatch answers in an event loop, which would wait for any thread that compiles at that moment."""
    compile_dispatch()  # so that the other process only has to load
    compile_redispatch()
    done = subprocess.run([sys.executable, "-c", WARM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("CHAIN LP MIXED True\n", "")
