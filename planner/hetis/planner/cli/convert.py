"""``hetis-plan convert TRACE --out FILE``: a trace in hetis' form, from common logs and data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli import quantities
from hetis.planner.cli.exit_codes import ExitCode

CONVERT_EXAMPLES = """Examples:

hetis-plan convert profile_export.jsonl --out trace.csv

hetis-plan convert ShareGPT_V3_unfiltered_cleaned_split.json --tokenizer /models/llama --rate 4 --out trace.jsonl.gz

hetis-plan convert vllm-server.log --out trace.csv
"""


@verb(prints_data=False)
def convert(
    terminal: Terminal,
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="A .csv, .jsonl, .json or .log file, .gz behind it if compressed; its form is seen by its columns.",
        ),
    ],
    *,
    out: Annotated[
        str,
        typer.Option("--out", metavar="FILE|-", help="A .csv or .jsonl file, or with .gz; -: CSV on stdout."),
    ] = "-",
    characters_per_token: Annotated[
        float | None,
        typer.Option(
            "--characters-per-token", min=0.1, max=100.0, show_default="4", help="For texts without numbers of tokens."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FILE|DIR", help="Counts tokens of texts: a tokenizer.json or its folder."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", parser=quantities.rate, metavar="RPS", help="Of requests without times, per second."),
    ] = None,
) -> ExitCode:
    """Write a trace in hetis' form, of what engines, benchmarks, gateways and data sets have."""
    from hetis.formats.files import write_atomically
    from hetis.planner.use_cases import convert as use_case

    if tokenizer is not None and characters_per_token is not None:
        raise typer.BadParameter("--tokenizer counts tokens: it goes without --characters-per-token")
    found = use_case.convert(trace, characters_per_token=characters_per_token, tokenizer=tokenizer, rate_rps=rate)
    content = use_case.trace_file(found.trace, "trace.csv" if out == "-" else out)
    for line in found.warnings:
        terminal.warn(line)
    requests = found.trace
    per_second = f"{requests.rate_rps:.4g} requests/s" if requests.rate_rps is not None else "all at once"
    means = f"{requests.prompt_tokens.mean():.0f}/{requests.output_tokens.mean():.0f}"
    terminal.say(
        f"{trace}: {len(requests.arrival_s)} requests, {per_second}, {means} tokens on average (form: {requests.form})"
    )
    if out == "-":
        terminal.write(content.decode("ascii"))
    else:
        write_atomically(out, content)
    return ExitCode.OK
