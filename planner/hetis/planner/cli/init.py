"""``hetis-plan init``: sample files to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import RenderableType

CLUSTER = """\
# The fleet. `hetis-plan schema cluster` has every field, `hetis-plan catalog gpus` every GPU type.
apiVersion: hetis/v1
kind: Cluster
name: my-fleet
nodes:
  # `count` equal nodes are called l4-0, l4-1, ...; a node may hold several GPU types.
  - {name: h100, gpus: [{type: H100-SXM-80GB, count: 2}]}
  - {name: l4, count: 2, gpus: [{type: L4, count: 4}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""

WORKLOAD = """\
# The traffic: here mean lengths. A `histogram` or the path of a CSV `trace` tells more, and `hetis-plan catalog
# workloads` lists traces that need no file at all.
apiVersion: hetis/v1
kind: Workload
name: my-traffic
mean_prompt_tokens: 2000
mean_output_tokens: 300
"""

SAMPLES = {"cluster.yaml": CLUSTER, "workload.yaml": WORKLOAD}
EXAMPLE_MODEL = "Llama-2-70B"


@verb()
def init(
    terminal: Terminal,
    directory: Annotated[Path, typer.Argument(help="Folder to write into; made if missing.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> ExitCode:
    """Write a sample cluster and workload file."""
    from hetis.formats.errors import DocumentError, Problem, single_problem
    from hetis.formats.files import write_atomically

    targets = {directory / name: text for name, text in SAMPLES.items()}
    there = [path for path in targets if path.exists()]
    if there and not force:
        raise DocumentError(Problem(file=str(path), message="exists already; --force overwrites it") for path in there)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise single_problem(str(directory), f"cannot be made: {error.strerror}") from None
    for path, text in targets.items():
        write_atomically(path, text)

    def table() -> RenderableType:
        from rich.text import Text

        return Text("\n".join(str(path) for path in targets))

    terminal.emit(lambda: [str(path) for path in targets], table)
    cluster, workload = targets
    terminal.say(f"next: hetis-plan place --cluster {cluster} --model {EXAMPLE_MODEL} --workload {workload}")
    return ExitCode.OK
