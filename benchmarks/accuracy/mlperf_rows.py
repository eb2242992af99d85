"""Rows of MLPerf Inference v5.1, and how each is posed to the planner, or why it cannot be.

A row is one submission: the output tokens/s of a system in a scenario. What the table does not state is taken from the
submitters' configurations and logs in mlcommons/inference_results_v5.1 (``configs/`` of NVIDIA, Dell, HPE, Cisco and
others, ``harness_llm/models`` of AMD, ``code/llama3.1-8b`` of RedHat, ``pytorch-xpu`` of Intel) and not from rates
that were measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.accuracy.published_points import NotPosedError
from hetis.profiler.importers.reading import catalogue_name
from hetis.solver.plan import Objective, ObjectiveKind
from hetis.solver.workload import LengthBin, Workload

COLUMNS = (
    "Submitter", "Category", "Suite", "Platform", "UsedModel", "Scenario", "Accelerator", "a#", "Nodes",
    "weight_data_types", "Software", "Accuracy", "Performance_Result", "Performance_Units",
)  # fmt: skip
# Accelerators whose name in the table is unknown to the importers: the catalogue's name, and GPUs per card.
ACCELERATORS = {
    "AMD Instinct MI300X 192GB HBM3": ("MI300X-192GB", 1),
    "AMD Instinct MI325X 256GB HBM3e": ("MI325X-256GB", 1),
    "AMD Instinct MI355X 288GB HBM3e": ("MI355X-288GB", 1),
    "Virtualized NVIDIA H200-SXM-141GB": ("H200-SXM-141GB", 1),
    "[MAXSUN] MS-Intel Arc Pro B60 Dual 48G Turbo": ("Arc-Pro-B60-24GB", 2),
}
WEIGHTS = {"fp8": "fp8", "fp4": "nvfp4", "mxfp4": "mxfp4", "UINT4": "int4"}
ENGINES = {"TensorRT": "trtllm", "vLLM": "vllm"}
# vLLM as AMD runs it handles tokens after `num_scheduler_steps` iterations (7 to 19), RedHat's and Intel's after each.
# So does TensorRT-LLM's PyTorch backend, which runs DeepSeek-R1 (``moe_backend``, ``enable_attention_dp``). Its engines
# in C++ hand over whole answers, after their first tokens.
AMD_STEPS = 7
PYTORCH = ("deepseek-r1",)
_TOKENS = re.compile(r"TOKENS_PER_SAMPLE: ([\d.]+)")
_VLLM = re.compile(r"vLLM v?(\d+)\.(\d+)")
SCHEDULES_AHEAD = (0, 14)  # version from which on vLLM's iterations do not wait for the host; v5.1 has 0.6 to 0.10
OFFLINE, SCENARIOS = "Offline", ("Offline", "Server", "Interactive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A model of MLPerf with its data set.

    Attributes:
        model: the name in the catalogue.
        lengths: mean prompt and output tokens of equal shares of the data set.
        seats: the submitters' ``gpu_batch_size`` and ``max_num_seqs`` for a replica.
        output_tokens: tokens of every answer; None: the table has their mean.
        limits: p99 TTFT and TPOT in seconds by scenario (``loadgen/mlperf.conf`` of mlcommons/inference).
    """

    model: str
    lengths: tuple[tuple[float, float], ...]
    seats: int
    limits: Mapping[str, tuple[float, float]]
    output_tokens: float | None = None


BENCHMARKS = {
    # Prompts: 5,463,976 tokens in the 24,576 of the data set (FlashLab-MBZUAI/HBFSim, h100-llama2-70b calibration
    # protocol; tokens as stored there). Answers of the reference: 294.45 (language/llama2-70b of mlcommons/inference).
    "llama2-70b": Benchmark(
        model="Llama-2-70B",
        lengths=((5_463_976 / 24_576, 294.45),),
        seats=2048,
        limits={"Server": (2.0, 0.2), "Interactive": (0.45, 0.04)},
    ),
    # Prompts: 9,400 on average (MLCommons' article on v5.0, as quoted by others). Answers of the reference: 684.68
    # (language/llama3.1-405b).
    "llama3.1-405b": Benchmark(
        model="Llama-3.1-405B",
        lengths=((9_400.0, 684.68),),
        seats=512,
        limits={"Server": (6.0, 0.175), "Interactive": (4.5, 0.08)},
    ),
    # Prompts: 778 on average (MLCommons' article on v5.1, as quoted by others). Every answer has 128
    # tokens: tokens/s over samples/s in the logs of RedHat, HPE and NVIDIA.
    "llama3.1-8b": Benchmark(
        model="Llama-3.1-8B",
        lengths=((778.0, 128.0),),
        seats=2048,
        output_tokens=128.0,
        limits={"Server": (2.0, 0.1), "Interactive": (0.5, 0.03)},
    ),
    # Tenths of the data set by output, each with its means (openshift-psap/performance-dashboard,
    # datasets/summaries/deepseek-r1.csv, from MLCommons' own file: 804 and 4,043 tokens on average). The seats are
    # those of each GPU.
    "deepseek-r1": Benchmark(
        model="DeepSeek-V3",
        lengths=(
            (934, 487), (995, 741), (1032, 1006), (1008, 1366), (871, 1881), (765, 2604), (727, 3588), (678, 4968),
            (563, 7536), (465, 16247),
        ),
        seats=512,
        limits={"Server": (2.0, 0.08)},
    ),
}  # fmt: skip
REDHAT_SEATS = 1024  # --max-num-seqs of its scripts for Llama-3.1-8B


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What is planned: submissions on equal nodes, of the same model, precision and scenario, by the same engine."""

    gpu: str
    gpus: int  # per node
    benchmark: str
    weights: str
    scenario: str
    engine: str
    schedules_ahead: bool = True

    @property
    def name(self) -> str:
        return f"{self.gpu} {self.benchmark} {self.weights} {self.scenario} {self.engine}"

    @property
    def objective(self) -> Objective:
        """Return the highest rate, or for requests that arrive one by one the goodput under MLPerf's limits.

        The limits are on p99; those of the cost model are on p95 TTFT and mean TPOT.
        """
        if self.scenario == OFFLINE:
            return Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None)
        ttft_s, tpot_s = BENCHMARKS[self.benchmark].limits[self.scenario]
        return Objective(kind=ObjectiveKind.GOODPUT, ttft_limit_s=ttft_s, tpot_limit_s=tpot_s)

    @property
    def seats(self) -> int:
        """Return the most requests that a replica runs at once."""
        is_redhat = self.engine == "vllm" and self.benchmark == "llama3.1-8b"
        return REDHAT_SEATS if is_redhat else BENCHMARKS[self.benchmark].seats

    def stream_interval(self, output_tokens: float) -> int:
        """Return after how many tokens of a request the engine's host handles them."""
        if self.engine == "trtllm":
            return 1 if self.benchmark in PYTORCH else math.ceil(output_tokens)
        return AMD_STEPS if self.gpu.startswith("MI3") else 1

    def workload(self, output_tokens: float) -> Workload:
        """Return the data set with answers of this mean length."""
        lengths = BENCHMARKS[self.benchmark].lengths
        scale = output_tokens * len(lengths) / sum(output for _, output in lengths)
        bins = (LengthBin(prompt_tokens=p, output_tokens=scale * o, weight=1.0) for p, o in lengths)
        return Workload(name=self.benchmark, bins=tuple(bins))


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A posed row."""

    system: System
    run: tuple[str, ...]  # equal for rows of one run under both accuracy targets
    output_tokens: float
    tokens_per_s: float  # per GPU


def pose(row: Mapping[str, str]) -> Submission:
    """Return the submission of one row.

    Raises:
        NotPosedError: the row cannot be planned.
    """
    if row["Suite"] != "datacenter":
        edge = "suite edge: other samples, or one request at a time"
        raise NotPosedError(edge if row["Suite"] == "edge" else "no suite is recorded")
    if row["Scenario"] not in SCENARIOS:
        raise NotPosedError(f"scenario {row['Scenario']} has no throughput")
    if not row["Accelerator"]:
        raise NotPosedError("no accelerator: CPUs")
    gpu, per_card = ACCELERATORS.get(row["Accelerator"], (catalogue_name(row["Accelerator"]), 1))
    if gpu is None:
        raise NotPosedError(f"the catalogue does not know the GPU {row['Accelerator']}")
    label = row["UsedModel"].replace("llama3_1", "llama3.1").removesuffix(".9").removesuffix("-99")
    if label == "mixtral-8x7b":
        raise NotPosedError("mixtral-8x7b: nobody published how long its prompts are")
    if label not in BENCHMARKS:
        raise NotPosedError("open division: another checkpoint than the benchmark's")
    engine = next((ENGINES[name] for name in ENGINES if name in row["Software"]), None)
    if engine is None:
        raise NotPosedError(f"the engine {_words(row['Software'])} is not known")
    if row["weight_data_types"] not in WEIGHTS:
        raise NotPosedError(f"the format of the weights is {row['weight_data_types']}")
    gpus = _number(row, "a#") * per_card
    output_tokens = BENCHMARKS[label].output_tokens or _output_tokens(row)
    return Submission(
        system=System(
            gpu=gpu, gpus=int(gpus), benchmark=label, weights=WEIGHTS[row["weight_data_types"]],
            scenario=row["Scenario"], engine=engine, schedules_ahead=_schedules_ahead(row["Software"]),
        ),
        run=(row["Submitter"], row["Platform"], label, row["Scenario"], row["Performance_Result"]),
        output_tokens=output_tokens,
        # Some rows have Queries/s as their unit, whose logs have the same number as tokens/s.
        tokens_per_s=_number(row, "Performance_Result") / (gpus * _number(row, "Nodes")),
    )  # fmt: skip


def _words(software: str) -> str:
    return re.split(r"[\d,]", software)[0].strip() or software


def _schedules_ahead(software: str) -> bool:
    found = _VLLM.search(software)
    return found is None or (int(found[1]), int(found[2])) >= SCHEDULES_AHEAD


def _output_tokens(row: Mapping[str, str]) -> float:
    found = _TOKENS.search(row["Accuracy"])
    if found is None:
        raise NotPosedError("tokens per sample are not recorded")
    return float(found[1])


def _number(row: Mapping[str, str], column: str) -> float:
    try:
        value = float(row[column] or "nan")
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise NotPosedError(f"{column} is not recorded")
    return value
