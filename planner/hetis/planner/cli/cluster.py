"""``hetis-plan cluster discover``: a cluster file from what tools print, this host's driver, or a planner's agents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import Terminal
from hetis.formats.discovery import FleetSource
from hetis.formats.files import file_label, write_atomically
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.files import EXAMPLE_LENGTHS, EXAMPLE_MODEL
from hetis.planner.cli.outputs import STDOUT, refuse_overwriting
from hetis.planner.cli.parameters import values
from hetis.planner.cli.parameters.options import given_in, group, option, refuse_without, verb
from hetis.planner.cli.server.server_verb import PlannerOptions, chosen_cluster, cluster_name_option, fetched
from hetis.planner.report.figures import plural

if TYPE_CHECKING:
    from hetis.formats.discovery.fleet import Discovered
    from hetis.formats.discovery.found import Inventory
    from hetis.planner.client import Client
    from hetis.solver.cluster import Link

DISCOVER_EXAMPLES = """Examples:\n
kubectl get nodes,pods -A -o json | hetis-plan cluster discover --out cluster.yaml\n
nvidia-smi -q -x > $(hostname).xml; hetis-plan cluster discover *.xml --out cluster.yaml\n
scontrol show nodes --json | hetis-plan cluster discover --gpu a100=A100-SXM-80GB\n
ray list nodes --detail --format json --limit 1000 | hetis-plan cluster discover --gpu H100=H100-SXM-80GB\n
hetis-plan cluster discover --from agents --server planner:8470 --out cluster.yaml"""

_MOST_SHOWN = 50  # sentences on stderr; the file contains all of them

cluster = typer.Typer(
    name="cluster",
    help="Create a cluster file from the output of the fleet's own tools.",
    no_args_is_help=True,
    add_completion=False,
)


@group
class DiscoveryOptions:
    source: FleetSource = option(
        "--from: Tool that wrote the files; auto detects it from their contents. file: CSV of nodes. nvml: "
        "the driver of this host. "
        "agents: those of a planner.",
        FleetSource.AUTO,
    )
    out: str = option("--out FILE|-: Cluster file to write; - writes to standard output.", "-")
    force: bool = option("--force: Overwrite an existing file.", False)
    name: str | None = option("--name: Name of the cluster.", shown="discovered; from agents: that of --cluster")
    gpu: list[str] | None = option(
        "--gpu NAME=TYPE: Map a GPU name that the tool reports to a type of `catalog gpus`, or to none to "
        "leave these GPUs out. Repeatable.",
    )
    with_busy: bool = option("--with-busy: Include GPUs that are in use.", False)
    bandwidth: float | None = option(
        "--bandwidth RATE: Bandwidth between nodes.", parser=values.bandwidth, shown="100Gbps"
    )
    latency: float | None = option("--latency TIME: Latency between nodes.", shown="20us")
    cluster: str | None = cluster_name_option()

    def link(self) -> Link | None:
        """Return the link between nodes, or None for the default one."""
        from hetis.formats.discovery.fleet import DEFAULT_LINK

        given = {"bytes_per_s": self.bandwidth, "latency_s": self.latency}
        changed = {name: value for name, value in given.items() if value is not None}
        return replace(DEFAULT_LINK, **changed) if changed else None


@cluster.command(epilog=DISCOVER_EXAMPLES)
@verb(prints_data=False)
def discover(
    terminal: Terminal,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Output of the tool; several files are allowed for kubectl and nvidia-smi. Default: standard "
            "input, also given as -.",
        ),
    ] = None,
    *,
    requested: DiscoveryOptions,
    planner: PlannerOptions,
) -> ExitCode:
    """Create a cluster file from kubectl, nvidia-smi, Slurm or Ray, this host's driver, or a planner's agents.

    It lists what is left out, and why.
    """
    from hetis.formats.discovery.fleet import discovered, said_types, unmatched
    from hetis.formats.discovery.nvml import read_nvml
    from hetis.formats.discovery.reading import read_inventory

    name, source, with_busy = requested.name, requested.source, requested.with_busy
    said, wrong = said_types(requested.gpu or ())
    if wrong:
        raise typer.BadParameter("; ".join(wrong))
    if name is not None and not (name.strip() and name.isprintable() and len(name) <= 200):
        raise typer.BadParameter(f"--name: {name[:40]!r} is not a name: 1 to 200 printable characters")
    of_agents = source is FleetSource.AGENTS
    refuse_without("--from agents", requested, "cluster", is_given=of_agents)
    refuse_without("--from agents", planner, is_given=of_agents)
    if files and source in (FleetSource.NVML, FleetSource.AGENTS):
        raise typer.BadParameter(f"--from {source.value} reads no files: leave out {files[0]}")

    if (out := Path(requested.out)) != STDOUT and out.is_file():  # a pipe or a device keeps nothing that could be lost
        refuse_overwriting(out, force=requested.force)

    def written(inventory: Inventory, sources: Sequence[str], otherwise_named: str = "discovered") -> ExitCode:
        # Defaults may be about several fleets.
        if "gpu" in given_in(requested) and (wrong := unmatched(inventory, said)):
            raise typer.BadParameter("; ".join(f"--gpu: {what}" for what in wrong))
        found = discovered(inventory, name=name or otherwise_named, link=requested.link(), said=said)
        return _write(terminal, found, sources, requested.out)

    if of_agents:

        def from_agents(client: Client) -> ExitCode:
            from hetis.planner.convert.names import last_part

            parent = chosen_cluster(client, requested.cluster)
            return written(_of_agents(client, parent, with_busy), [f"agents of {parent}"], last_part(parent))

        return planner.use(terminal, from_agents)
    if source is FleetSource.NVML:
        return written(read_nvml(with_busy=with_busy), ["NVML"])
    paths = files or ["-"]
    return written(read_inventory(paths, source, with_busy=with_busy), [file_label(path) for path in paths])


def _of_agents(client: Client, parent: str, with_busy: bool) -> Inventory:
    """Return what a planner's agents report. Nodes are read one by one, because lists leave out inventories."""
    from hetis.planner.convert.agent_nodes import agents_inventory
    from hetis.planner.convert.documents import read_document
    from hetis.solver.cluster import Cluster
    from hetis.v1 import cluster_pb2

    declared = fetched(client, "clusters", parent).document
    nodes = [
        node if node.state == cluster_pb2.NODE_STATE_EXPECTED else fetched(client, "nodes", node.name)
        for node in client.list_nodes(parent)
    ]
    return agents_inventory(parent, nodes, read_document(declared, Cluster), with_busy=with_busy)


def _write(terminal: Terminal, found: Discovered, sources: Sequence[str], out: str) -> ExitCode:
    """Write the cluster file, and report what is left out of it, what is renamed and what is assumed."""
    from hetis.formats.discovery.fleet import file_text

    text = file_text(found, sources=sources)
    for what, lines in (("left out", found.left_out), ("renamed", found.renamed)):
        for line in lines[:_MOST_SHOWN]:
            terminal.say(f"{what}: {line}")
        if len(lines) > _MOST_SHOWN:
            terminal.say(f"{what}: {len(lines) - _MOST_SHOWN} more, listed in the file")
    for line in found.assumed:
        terminal.say(f"assumed: {line}")
    if out == "-":
        terminal.write(text)
        return ExitCode.OK
    write_atomically(out, text)
    fleet = found.cluster
    num_nodes = sum(group.count for group in fleet.node_groups)
    terminal.say(f"{out}: {plural(fleet.num_gpus(), 'GPU')} in {plural(num_nodes, 'node')}")
    terminal.say(f"next: hetis-plan place --cluster {out} --model {EXAMPLE_MODEL} --workload {EXAMPLE_LENGTHS}")
    return ExitCode.OK
