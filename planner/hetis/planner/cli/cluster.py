"""``hetis-plan cluster discover``: a cluster file from the output of kubectl, nvidia-smi, Slurm or Ray."""

from __future__ import annotations

from typing import Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.formats.discovery.sources import Source
from hetis.planner.cli import quantities
from hetis.planner.cli.exit_codes import ExitCode

DISCOVER_EXAMPLES = """Examples:

kubectl get nodes,pods -A -o json | hetis-plan cluster discover --out cluster.yaml

nvidia-smi -q -x > $(hostname).xml; hetis-plan cluster discover *.xml --out cluster.yaml

scontrol show nodes --json | hetis-plan cluster discover --gpu a100=A100-SXM-80GB

ray list nodes --detail --format json --limit 1000 | hetis-plan cluster discover --gpu H100=H100-SXM-80GB
"""

_MOST_SHOWN = 50  # sentences on stderr; the file has all

cluster = typer.Typer(
    name="cluster", help="Describe a fleet from what its own tools print.", no_args_is_help=True, add_completion=False
)


@cluster.callback()
def cluster_verbs() -> None:
    """Describe a fleet from what its own tools print."""


@cluster.command(epilog=DISCOVER_EXAMPLES)
@verb(prints_data=False)
def discover(
    terminal: Terminal,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE...]",
            show_default=False,
            help="What the tool printed; several of kubectl and nvidia-smi. Default: standard input, which - is, too.",
        ),
    ] = None,
    *,
    source: Annotated[
        Source, typer.Option("--from", help="What wrote the files; auto: seen by what is in them. file: CSV of nodes.")
    ] = Source.AUTO,
    out: Annotated[str, typer.Option("--out", metavar="FILE|-", help="The cluster file; -: standard output.")] = "-",
    name: Annotated[str, typer.Option("--name", help="Of the cluster.")] = "discovered",
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME=TYPE",
            show_default=False,
            help="What a name of the tool means: a type of `catalog gpus`, or none to leave them out. Repeatable.",
        ),
    ] = None,
    with_busy: Annotated[bool, typer.Option("--with-busy", help="GPUs that are in use are part of the fleet.")] = False,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", parser=quantities.bandwidth, metavar="RATE", show_default="100Gbps", help="Between nodes."
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency", parser=quantities.positive_duration, metavar="TIME", show_default="20us", help="Between nodes."
        ),
    ] = None,
) -> ExitCode:
    """Make a cluster file of what kubectl, nvidia-smi, Slurm or Ray say, and tell what is left out and why."""
    from hetis.formats.discovery.boards import said_types
    from hetis.formats.discovery.fleet import DEFAULT_LINK, discovered, file_text
    from hetis.formats.discovery.reading import read_inventory
    from hetis.formats.files import file_label, write_atomically
    from hetis.solver.cluster import Link

    said, wrong = said_types(gpu or ())
    if wrong:
        raise typer.BadParameter("; ".join(wrong))
    if not (name.strip() and name.isprintable() and len(name) <= 200):
        raise typer.BadParameter(f"--name: {name[:40]!r} is not a name: 1 to 200 printable characters")
    link = None
    if bandwidth is not None or latency is not None:
        link = Link(
            bytes_per_s=DEFAULT_LINK.bytes_per_s if bandwidth is None else bandwidth,
            latency_s=DEFAULT_LINK.latency_s if latency is None else latency,
        )
    paths = files or ["-"]
    found = discovered(read_inventory(paths, source, with_busy=with_busy), name=name, link=link, said=said)
    text = file_text(found, sources=[file_label(path) for path in paths])
    for line in found.left_out[:_MOST_SHOWN]:
        terminal.say(f"left out: {line}")
    if len(found.left_out) > _MOST_SHOWN:
        terminal.say(f"left out: {len(found.left_out) - _MOST_SHOWN} more; the file has them")
    for line in found.assumed:
        terminal.say(f"assumed: {line}")
    if out == "-":
        terminal.write(text)
        return ExitCode.OK
    write_atomically(out, text)
    fleet = found.cluster
    num_nodes = sum(group.count for group in fleet.node_groups)
    terminal.say(f"{out}: {fleet.num_gpus()} GPUs in {num_nodes} nodes; next: hetis-plan place --cluster {out}")
    return ExitCode.OK
