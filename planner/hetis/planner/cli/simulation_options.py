"""Options of `simulate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hetis.planner.cli import quantities, words
from hetis.planner.cli.options import MOST_SETTING

SIMULATE_EXAMPLES = """\
Examples:

hetis-plan simulate plan.json --seeds 5

hetis-plan simulate plan.json --trace requests.csv --rate 2 --plot run.html

hetis-plan simulate plan.json --sweep --ttft 2s --tpot 100ms

hetis-plan simulate plan.json --saturate -o json | jq .throughput_rps
"""

_TRAFFIC, _GOAL, _RUNS, _FLEET, _RESULT = "Traffic", "Goal", "Runs", "Fleet", "Result"
MAX_REQUESTS = 10_000_000


class Router(StrEnum):
    LEAST_WORK = "least-work"
    WEIGHTED = "weighted"
    FEWEST_REQUESTS = "fewest-requests"
    FEWEST_TOKENS = "fewest-tokens"


def device_at(text: str) -> tuple[str, float]:
    """Parse a device and seconds: ``a100/0@30s``."""
    device, at, time = text.rpartition("@")
    if not at or not device:
        raise typer.BadParameter(f"{text!r} is not a device and a time such as a100/0@30s")
    from hetis.formats.units import parse_duration

    try:
        return device, parse_duration(time)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


TraceOption = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="FILE|NAME|P/O",
        autocompletion=words.workload_names,
        rich_help_panel=_TRAFFIC,
        show_default="the plan's workload",
        help="Requests: a CSV or JSONL trace, or lengths drawn from what `place --workload` takes.",
    ),
]
PrefixHitRateOption = Annotated[
    Any,  # as in `options.PrefixHitRateOption`
    typer.Option(
        "--prefix-hit-rate",
        parser=quantities.prefix_hit_rate,
        metavar="SHARE|trace",
        rich_help_panel=_TRAFFIC,
        show_default="that of the requests' source, or 0",
        help="Prompt tokens that prefix caches have: 0.4, 40%, or trace, counted per request by its hash ids.",
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate",
        parser=quantities.rate,
        metavar="R",
        rich_help_panel=_TRAFFIC,
        show_default="the planned goodput",
        help="Requests/s that arrive.",
    ),
]
GapCvOption = Annotated[
    float,
    typer.Option(
        "--cv",
        min=0.0,
        max=100.0,
        metavar="CV",
        rich_help_panel=_TRAFFIC,
        help="Coefficient of variation of the gaps between arrivals: 0 even, 1 Poisson, above 1 bursts (gamma).",
    ),
]
RecordedOption = Annotated[
    bool,
    typer.Option(
        "--recorded", rich_help_panel=_TRAFFIC, help="Arrivals as in the trace, stretched to --rate if that is given."
    ),
]
SaturateOption = Annotated[
    bool, typer.Option("--saturate", rich_help_panel=_TRAFFIC, help="A request is always waiting: how much is served?")
]
SweepOption = Annotated[
    bool, typer.Option("--sweep", rich_help_panel=_GOAL, help="Find the highest rate within the latency limits.")
]
ToleranceOption = Annotated[
    float,
    typer.Option(
        "--tolerance",
        parser=quantities.share,
        metavar="SHARE",
        rich_help_panel=_GOAL,
        help="How closely --sweep brackets that rate.",
    ),
]
TtftOption = Annotated[
    float | None,
    typer.Option(
        "--ttft",
        parser=quantities.ttft_limit,
        metavar="TIME|none",
        rich_help_panel=_GOAL,
        show_default="the plan's",
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
        show_default="the plan's",
        help="Limit of the mean time per output token.",
    ),
]
NumRequestsOption = Annotated[
    int | None,
    typer.Option(
        "--requests",
        min=1,
        max=MAX_REQUESTS,
        metavar="N",
        rich_help_panel=_RUNS,
        show_default="20 times what the plan holds at once, 2000 at least",
        help="Requests of each run.",
    ),
]
SeedsOption = Annotated[
    int, typer.Option("--seeds", min=1, max=1000, metavar="K", rich_help_panel=_RUNS, help="Runs, each by its seed.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, rich_help_panel=_RUNS, help="The first seed.")]
UntilStableOption = Annotated[
    bool,
    typer.Option(
        "--until-stable",
        rich_help_panel=_RUNS,
        help="Double the requests until the intervals are narrow (--precision).",
    ),
]
PrecisionOption = Annotated[
    float,
    typer.Option(
        "--precision",
        parser=quantities.share,
        metavar="SHARE",
        rich_help_panel=_RUNS,
        help="Half width of a 95% interval over its value that --until-stable wants.",
    ),
]
ProcessesOption = Annotated[
    int, typer.Option("--threads", min=0, rich_help_panel=_RUNS, help="Runs at once, as processes; 0: one per core.")
]
GreedyOption = Annotated[
    bool,
    typer.Option(
        "--greedy", rich_help_panel=_FLEET, help="Stages take whatever waits, instead of keeping micro-batches apart."
    ),
]
PacedOption = Annotated[
    bool,
    typer.Option("--paced", rich_help_panel=_FLEET, help="Chunks of prompts no larger than keep the seats filled."),
]
RouterOption = Annotated[
    Router, typer.Option("--router", rich_help_panel=_FLEET, help="How requests are spread over replicas.")
]
NoDispatchOption = Annotated[
    bool,
    typer.Option(
        "--no-dispatch", rich_help_panel=_FLEET, help="Head groups stay split as planned, request by request."
    ),
]
NoRedispatchOption = Annotated[
    bool, typer.Option("--no-redispatch", rich_help_panel=_FLEET, help="Head groups of running requests never move.")
]
ThetaOption = Annotated[
    float,
    typer.Option(
        "--theta",
        parser=quantities.ratio,
        metavar="SHARE",
        rich_help_panel=_FLEET,
        help="How far a stage may be above its ideal time before head groups move.",
    ),
]
MaxNumSeqsOption = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs", min=1, max=MOST_SETTING, metavar="N", rich_help_panel=_FLEET, show_default="the plan's",
        help="Requests that every engine runs at once, each of copies that share experts.",
    ),
]  # fmt: skip
ChunkTokensOption = Annotated[
    int | None,
    typer.Option(
        "--chunk-tokens", min=1, max=MOST_SETTING, metavar="N", rich_help_panel=_FLEET, show_default="the plan's",
        help="Prompt tokens of an iteration: vLLM's --max-num-batched-tokens less --max-num-seqs.",
    ),
]  # fmt: skip
KvBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--kv-blocks", min=1, max=MOST_SETTING, metavar="N", rich_help_panel=_FLEET, show_default="as memory allows",
        help="KV blocks of 16 tokens that every engine has at most, such as its --num-gpu-blocks-override.",
    ),
]  # fmt: skip
FailOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail", metavar="DEVICE@TIME", rich_help_panel=_FLEET, show_default=False,
        help="A device fails, such as a100/0@30s; repeatable.",
    ),
]  # fmt: skip
JoinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--join", metavar="DEVICE@TIME", rich_help_panel=_FLEET, show_default=False,
        help="A device that failed comes back; repeatable.",
    ),
]  # fmt: skip
FaultsOption = Annotated[
    str | None,
    typer.Option(
        "--faults", metavar="FILE", rich_help_panel=_FLEET, show_default=False,
        help="The same as CSV: at_s,device,event (fail or join).",
    ),
]  # fmt: skip
PerfettoOption = Annotated[
    Path | None,
    typer.Option(
        "--perfetto", metavar="FILE", rich_help_panel=_RESULT, show_default=False,
        help="What every stage did, for ui.perfetto.dev; of the first run.",
    ),
]  # fmt: skip
RequestsCsvOption = Annotated[
    Path | None,
    typer.Option(
        "--requests-csv", metavar="FILE", rich_help_panel=_RESULT, show_default=False,
        help="One row per request of the first run.",
    ),
]  # fmt: skip
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", rich_help_panel=_RESULT, show_default=False,
        help="Pictures of the first run, or of the sweep: .html or .png.",
    ),
]  # fmt: skip
