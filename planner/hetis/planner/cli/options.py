"""Options of `hetis-plan` with long definitions, or shared by several verbs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hetis.planner.cli import families, quantities, words
from hetis.solver.plan import ObjectiveKind, Role

MOST_SETTING = 10**9  # of `EngineSettings`, whose module loads numpy: too slow for --help

# --- of verbs that read a plan

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file, or - for standard input.")]

# --- inputs

_INPUTS = "Inputs"


class Survived(StrEnum):
    """A loss that the demand must survive."""

    NODE = "node"
    ZONE = "zone"


ClusterOption = Annotated[
    str, typer.Option("--cluster", "-c", metavar="FILE", rich_help_panel=_INPUTS, help="The fleet.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FILE",
        autocompletion=words.model_names,
        rich_help_panel=_INPUTS,
        help="A name of `catalog models`, a ModelSpec file, or a Hugging Face config.json.",
    ),
]
WorkloadOption = Annotated[
    str,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME|FILE|P/O",
        autocompletion=words.workload_names,
        rich_help_panel=_INPUTS,
        help="A name of `catalog workloads`, a Workload file, a trace, or mean lengths such as 8000/300.",
    ),
]
PrefixHitRateOption = Annotated[
    Any,  # a share or "trace", which typer's types cannot say; the parser returns nothing else
    typer.Option(
        "--prefix-hit-rate",
        parser=quantities.prefix_hit_rate,
        metavar="SHARE|trace",
        rich_help_panel=_INPUTS,
        show_default="the workload's, or 0",
        help="Prompt tokens that prefix caches have: 0.4, 40%, or trace, counted by a Mooncake trace's hash ids.",
    ),
]
ProfilesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        rich_help_panel=_INPUTS,
        show_default=False,
        help="Profile of a GPU type; repeatable. Others use the one shipped for them, or are modelled.",
    ),
]

WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        parser=families.weights,
        metavar="P[,GPU=P...]",
        rich_help_panel=_INPUTS,
        show_default="the checkpoint's",
        help="Of the model's weights, everywhere and on GPU types: bf16, fp8, int8, awq-int4, gptq-int4, mxfp4, nvfp4.",
    ),
]
KvOption = Annotated[
    str | None,
    typer.Option(
        "--kv",
        parser=families.kv,
        metavar="P[,GPU=P...]",
        rich_help_panel=_INPUTS,
        show_default="bf16, or the file's",
        help="Of the KV cache, everywhere and on GPU types: bf16 or fp8.",
    ),
]

MtpOption = Annotated[
    str | None,
    typer.Option(
        "--mtp",
        parser=families.mtp,
        metavar="K:RATE",
        rich_help_panel=_INPUTS,
        show_default="no drafts",
        help="Multi-token prediction by layers that the model has: K drafts per step, accepted at a rate: 1:0.85.",
    ),
]

# --- goal

_GOAL = "Goal"

ObjectiveOption = Annotated[
    ObjectiveKind,
    typer.Option(
        "--objective",
        metavar="GOAL",
        rich_help_panel=_GOAL,
        help=f"What the plan is good for: {', '.join(ObjectiveKind)}.",
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate",
        parser=quantities.rate,
        metavar="R",
        rich_help_panel=_GOAL,
        show_default=False,
        help="Demanded requests/s; objectives cost and gpus need it.",
    ),
]
TtftOption = Annotated[
    float | None,
    typer.Option(
        "--ttft",
        parser=quantities.ttft_limit,
        metavar="TIME|none",
        rich_help_panel=_GOAL,
        show_default="2s; throughput: none",
        help="Limit of the p95 time to first token.",
    ),
]
TpotOption = Annotated[
    float | None,
    typer.Option(
        "--tpot",
        parser=quantities.tpot_limit,
        metavar="TIME|none",
        rich_help_panel=_GOAL,
        show_default="100ms; throughput: none",
        help="Limit of the mean time per output token.",
    ),
]

PinsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="CONSTRAINT",
        rich_help_panel=_GOAL,
        show_default=False,
        help="node=|type=|zone= and :use=N (at least so many GPUs in use) or :as=worker, primary, prefill, decode, "
        "unified (nothing else); replicas=N or N..M; usd=..N per hour; gpus=..N. Repeatable.",
    ),
]
ForbidsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--forbid",
        metavar="CONSTRAINT",
        rich_help_panel=_GOAL,
        show_default=False,
        help="gpu=NODE/INDEX, node=, type=, zone= (not used, or not :as=worker, ...); tp=N; workers; "
        "shared-experts. Repeatable.",
    ),
]

PricePinsOption = Annotated[
    bool,
    typer.Option(
        "--price-pins",
        rich_help_panel=_GOAL,
        help="Solve again without each pin and forbidden thing: what the objective would gain.",
    ),
]

# --- search

_SEARCH = "Search"


DEFAULT_STRATEGY = families.DEFAULT_STRATEGY

StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        parser=families.strategy,
        metavar="NAME",
        autocompletion=words.strategy_names,
        rich_help_panel=_SEARCH,
        help="Family of plans to search, a name of `catalog strategies`.",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        parser=families.engine,
        metavar="NAME",
        autocompletion=words.engine_names,
        rich_help_panel=_SEARCH,
        show_default="vllm-hetis; any for published heuristics",
        help="Plan only what this engine runs: vllm-hetis (with attention workers), vllm, sglang, or any.",
    ),
]
MaxStagesOption = Annotated[
    int | None,
    typer.Option(
        "--max-stages",
        min=1,
        max=16,
        rich_help_panel=_SEARCH,
        show_default="8",
        help="Stages of a replica, of an engine's plans.",
    ),
]
MaxGpusOption = Annotated[
    int | None,
    typer.Option(
        "--max-gpus",
        min=1,
        rich_help_panel=_SEARCH,
        show_default=False,
        help="GPUs of a replica, attention workers included, of an engine's plans.",
    ),
]
MinLayersOption = Annotated[
    int | None,
    typer.Option(
        "--min-layers-per-stage",
        min=1,
        rich_help_panel=_SEARCH,
        show_default=False,
        help="Layers that a stage holds at least, of an engine's plans.",
    ),
]
MaxNodesOption = Annotated[
    int | None,
    typer.Option(
        "--max-nodes-per-replica",
        min=1,
        rich_help_panel=_SEARCH,
        show_default=False,
        help="Nodes that a replica may lie on, attention workers included, of an engine's plans.",
    ),
]
MaxNumSeqsOption = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        min=1,
        max=MOST_SETTING,
        metavar="N",
        rich_help_panel=_SEARCH,
        show_default=False,
        help="Requests that an engine runs at once (a replica, or each of its copies that share experts).",
    ),
]
ChunkTokensOption = Annotated[
    families.Chunks | None,
    typer.Option(
        "--chunk-tokens",
        parser=families.chunks,
        metavar="N[,N...]",
        rich_help_panel=_SEARCH,
        show_default="256,512,2048",
        help="Prompt tokens of an iteration: vLLM's --max-num-batched-tokens less --max-num-seqs.",
    ),
]
KvBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--kv-blocks",
        min=1,
        max=MOST_SETTING,
        metavar="N",
        rich_help_panel=_SEARCH,
        show_default="as memory allows",
        help="KV blocks of 16 tokens that an engine has at most (each of copies that share experts), such as its "
        "--num-gpu-blocks-override.",
    ),
]
SimplestWithinOption = Annotated[
    float,
    typer.Option(
        "--simplest-within",
        parser=quantities.error,
        metavar="SHARE",
        rich_help_panel=_SEARCH,
        help="What the plan may lose of the best for replicas on fewer nodes, then of fewer shapes; 2%.",
    ),
]
SurviveOption = Annotated[
    Survived | None,
    typer.Option(
        "--survive",
        rich_help_panel=_GOAL,
        show_default=False,
        help="Serve --rate when any one node, or zone, is lost, with --objective cost or gpus.",
    ),
]
RolesOption = Annotated[
    frozenset[Role] | None,
    typer.Option(
        "--roles",
        parser=families.roles,
        metavar="ROLE,...",
        rich_help_panel=_SEARCH,
        show_default="all of the strategy",
        help="What replicas may do: unified, or prefill,decode, or all three.",
    ),
]
EnginesOption = Annotated[
    families.Engines | None,
    typer.Option(
        "--engine",
        parser=families.engines,
        metavar="NAME,...",
        rich_help_panel=_SEARCH,
        show_default="any",
        help="Plan only what this engine runs; with several (or all), their plans side by side.",
    ),
]
StrategiesOption = Annotated[
    families.Strategies | None,
    typer.Option(
        "--strategies",
        parser=families.strategies,
        metavar="NAME,...",
        rich_help_panel=_SEARCH,
        show_default="all; hetis where engines are compared",
        help="Families of plans to search, names of `catalog strategies`, or all.",
    ),
]
TimeLimitOption = Annotated[
    float,
    typer.Option(
        "--time-limit",
        parser=quantities.positive_duration,
        metavar="TIME",
        rich_help_panel=_SEARCH,
        help="Return the best plan found by then.",
    ),
]
GapOption = Annotated[
    float,
    typer.Option(
        "--gap",
        parser=quantities.ratio,
        metavar="GAP",
        rich_help_panel=_SEARCH,
        help="Stop when the plan is proven this close to the best; 0.5% or 0.005.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, rich_help_panel=_SEARCH, help="Same seed, same plan.")]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, rich_help_panel=_SEARCH, help="Solver threads; 0 uses every core.")
]
ProfileErrorOption = Annotated[
    float | None,
    typer.Option(
        "--profile-error",
        parser=quantities.error,
        metavar="ERROR",
        rich_help_panel=_SEARCH,
        show_default=False,
        help="Also show how the plan fares when every coefficient is off by up to this: 20% or 0.2.",
    ),
]

# --- result

_RESULT = "Result"

OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        rich_help_panel=_RESULT,
        show_default=False,
        help="Also save the plan; .yaml or .yml for YAML, anything else is JSON; - prints it, and no table.",
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        rich_help_panel=_RESULT,
        show_default=False,
        help="Also save one page of HTML that needs no network; see `report`.",
    ),
]
PlansFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        rich_help_panel=_RESULT,
        show_default=False,
        help="Also save every plan there, as STRATEGY.json.",
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        rich_help_panel=_RESULT,
        help="Exit 5 when the gap, the demanded rate or, simulated, a latency limit is missed.",
    ),
]
OtherEnginesOption = Annotated[
    bool,
    typer.Option(
        "--other-engines/--no-other-engines",
        rich_help_panel=_RESULT,
        help="Say what plans for other engines reach, found in a tenth of the time limit.",
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        rich_help_panel=_RESULT,
        help="Simulate the plan at the rate it promises, and say whether the limits are kept.",
    ),
]
