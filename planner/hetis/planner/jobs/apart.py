"""One call in a process of its own, for searches that threads of the service wait for.

The process is this module: it reads the call from its standard input, and writes the result to its standard output. It
does not inherit the planner's standard error, a pipe whose writes do not wait and may fail (`handshakes`).
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from hetis.planner.jobs.frames import JobFrame
from hetis.planner.jobs.messages import SearchError, answer_from_frame, answer_to_frame
from hetis.planner.jobs.process import crash_of
from hetis.planner.jobs.worker import be_the_first_to_go
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError

_log = logging.getLogger(__name__)
_LAST_BYTES = 8192  # of the standard error of a process that died, for the log; the last line is the error's
T = TypeVar("T")


def call_apart(function: Callable[..., T], *arguments: Any, limit_s: float) -> T:
    """Call a function of a module and return its result; blocks. Raises what a search raises; NoPlanFoundError, too, if
    the process takes longer than ``limit_s`` or dies.
    """
    command = [sys.executable, "-m", "hetis.planner.jobs.apart"]
    try:
        done = subprocess.run(
            command, input=pickle.dumps((function, arguments)), capture_output=True, timeout=limit_s, check=True
        )
    except subprocess.TimeoutExpired:
        raise NoPlanFoundError(f"the search did not end within {limit_s:g} s") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr[-_LAST_BYTES:].decode(errors="replace").strip()
        crashed = crash_of(error.returncode, said.rpartition("\n")[2])
        _log.warning("%s; its last lines:\n%s", crashed.message, said)
        raise NoPlanFoundError(crashed.message) from None
    result, failure = pickle.loads(done.stdout)
    if failure is not None:
        raised = answer_from_frame(failure)
        assert isinstance(raised, SearchError)
        raise raised
    found: T = result
    return found


def main() -> None:
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # libraries that print cannot reach the result
        be_the_first_to_go()
        function, arguments = pickle.load(sys.stdin.buffer)
        found: tuple[Any, JobFrame | None]
        try:
            found = function(*arguments), None
        except (InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError) as error:
            found = None, answer_to_frame(error)
        output.write(pickle.dumps(found))


if __name__ == "__main__":
    main()
