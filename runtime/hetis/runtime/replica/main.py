"""``hetis-launch``: the processes of a plan's replica, shown, or started by what runs processes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from hetis.runtime.launch.errors import LayoutError
from hetis.runtime.server.errors import ServeError

if TYPE_CHECKING:
    from hetis.runtime.replica.asking import Asked
    from hetis.runtime.replica.commands import Addresses

EXIT_FAILED, EXIT_INVALID, EXIT_NOT_POSSIBLE = 1, 2, 3
_STORE_PORT, _KV_PORT = 8500, 8700
_EXAMPLES = """Examples:

hetis-launch show --plan plan.json --model models/Llama-3.2-1B

hetis-launch show --plan plan.json --model /models/Llama-3.2-1B --node-address gpu1=10.0.0.1
--node-address gpu2=10.0.0.2

hetis-launch kubernetes --plan plan.json --model models/Llama-3.2-1B --image registry.example/hetis:1
--model-claim models --api-key-secret hetis-key | kubectl apply -f -

hetis-launch processes --plan plan.json --model models/Llama-3.2-1B --all-here --worker-device cpu -- --port 8080

srun --ntasks-per-node 1 hetis-launch processes --plan plan.json --model /models/Llama-3.2-1B

hetis-launch ray --plan plan.json --model /models/Llama-3.2-1B --address auto

Exit codes: 0 ended as it was told · 1 failed · 2 invalid options, plan or model · 3 the plan does not allow it, or its
nodes are not there · 4 the server cannot listen where it was told
"""

app = typer.Typer(
    name="hetis-launch",
    help="Start the processes of a plan's replica: the engine (hetis-serve) and its attention workers.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Form(StrEnum):
    """How processes are shown."""

    SHELL = "shell"
    JSON = "json"


class Device(StrEnum):
    """What processes compute on."""

    CUDA = "cuda"
    CPU = "cpu"


PlanOption = Annotated[Path | None, typer.Option("--plan", help="A plan of `hetis-plan place`. Required.")]
ModelOption = Annotated[
    Path | None, typer.Option("--model", "-m", help="Folder of the model, the same on every node. Required.")
]
ReplicaOption = Annotated[int, typer.Option("--replica", help="Which replica of the plan, from 0.")]
KvTokensOption = Annotated[
    int | None, typer.Option("--kv-tokens", help="KV room in tokens, in place of the plan's, for smaller machines.")
]
PageTokensOption = Annotated[int, typer.Option("--page-tokens", help="Token slots of a KV page.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (the checkpoint's), float32, float64, bfloat16, float16.")
]
WorkerDeviceOption = Annotated[
    Device, typer.Option("--worker-device", help="What engine, stages and workers compute on.")
]
AddressOption = Annotated[
    list[str] | None,
    typer.Option(
        "--node-address", help="NODE=HOST, where a node of the plan is reached; repeatable. Default: by its own name."
    ),
]
StorePortOption = Annotated[int, typer.Option("--store-port", help="On the engine's node, where workers are found.")]
KvPortOption = Annotated[
    int, typer.Option("--kv-port", help="Of replica 0, where prompts are computed for decode replicas; N has N more.")
]
AllHereOption = Annotated[
    bool, typer.Option("--all-here", help="Every process on this one machine, to try the plan; on the loopback.")
]
ServeOptions = Annotated[list[str] | None, typer.Argument(help="After --, options of hetis-serve.", show_default=False)]


@app.command(epilog=_EXAMPLES)
def show(
    plan: PlanOption = None,
    model: ModelOption = None,
    replica: ReplicaOption = 0,
    kv_tokens: KvTokensOption = None,
    page_tokens: PageTokensOption = 16,
    dtype: DtypeOption = "auto",
    worker_device: WorkerDeviceOption = Device.CUDA,
    node_address: AddressOption = None,
    store_port: StorePortOption = _STORE_PORT,
    kv_port: KvPortOption = _KV_PORT,
    all_here: AllHereOption = False,
    form: Annotated[Form, typer.Option(help="Lines for shells, by node; or JSON.")] = Form.SHELL,
    serve_options: ServeOptions = None,
) -> None:
    """Show what runs where: a command line for every process."""
    from hetis.runtime.replica.showing import as_json, as_shell

    addresses = _addresses(node_address, store_port, kv_port, all_here)
    asked = _read(plan, model, replica, kv_tokens, page_tokens, dtype, serve_options)
    commands = asked.commands(addresses, worker_device=worker_device)
    print(as_json(commands) if form is Form.JSON else as_shell(commands))


@app.command(epilog=_EXAMPLES)
def processes(
    plan: PlanOption = None,
    model: ModelOption = None,
    replica: ReplicaOption = 0,
    kv_tokens: KvTokensOption = None,
    page_tokens: PageTokensOption = 16,
    dtype: DtypeOption = "auto",
    worker_device: WorkerDeviceOption = Device.CUDA,
    node_address: AddressOption = None,
    store_port: StorePortOption = _STORE_PORT,
    kv_port: KvPortOption = _KV_PORT,
    all_here: AllHereOption = False,
    node: Annotated[str, typer.Option(help="This machine's name in the plan. Default: its host name.")] = "",
    serve_options: ServeOptions = None,
) -> None:
    """Run the processes whose node this machine is, and start again what fails. Started on every node alike."""
    from hetis.runtime.replica.here import names_of_this_machine, run_here

    addresses = _addresses(node_address, store_port, kv_port, all_here)
    asked = _read(plan, model, replica, kv_tokens, page_tokens, dtype, serve_options)
    names = (node,) if node else names_of_this_machine()
    commands = asked.commands(addresses, worker_device=worker_device)
    ours = [command for command in commands if all_here or command.process.node in names]
    if not ours:
        nodes = ", ".join(dict.fromkeys(command.process.node for command in commands))
        raise LayoutError(f"this machine is {names[0]}, the replica is on {nodes}: give --node or --all-here")
    _set_up_logs()
    raise SystemExit(run_here(ours))


@app.command(epilog=_EXAMPLES)
def ray(
    plan: PlanOption = None,
    model: ModelOption = None,
    replica: ReplicaOption = 0,
    kv_tokens: KvTokensOption = None,
    page_tokens: PageTokensOption = 16,
    dtype: DtypeOption = "auto",
    worker_device: WorkerDeviceOption = Device.CUDA,
    node_address: AddressOption = None,
    store_port: StorePortOption = _STORE_PORT,
    kv_port: KvPortOption = _KV_PORT,
    all_here: AllHereOption = False,
    address: Annotated[
        str, typer.Option(help="Of the Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local for one of its own.")
    ] = "auto",
    start_timeout: Annotated[float, typer.Option(help="Seconds for Ray to set the resources apart.")] = 60.0,
    serve_options: ServeOptions = None,
) -> None:
    """Run the processes in a placement group of Ray, and start again what fails. Needs pip install 'hetis[ray]'."""
    addresses = _addresses(node_address, store_port, kv_port, all_here)
    asked = _read(plan, model, replica, kv_tokens, page_tokens, dtype, serve_options)
    _set_up_logs()
    try:
        from hetis.runtime.replica.on_ray import run_on_ray
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise ServeError("Ray is not installed here: pip install 'hetis[ray]'") from None
    raise SystemExit(run_on_ray(asked, addresses, address=address, start_s=start_timeout, worker_device=worker_device))


@app.command(epilog=_EXAMPLES)
def kubernetes(
    plan: PlanOption = None,
    model: ModelOption = None,
    replica: ReplicaOption = 0,
    kv_tokens: KvTokensOption = None,
    page_tokens: PageTokensOption = 16,
    dtype: DtypeOption = "auto",
    worker_device: WorkerDeviceOption = Device.CUDA,
    name: Annotated[str, typer.Option(help="Of the replica; names of objects begin with it.")] = "hetis",
    namespace: Annotated[str, typer.Option(help="Default: kubectl's.")] = "",
    image: Annotated[str, typer.Option(help="That has hetis[runtime]. Required.")] = "",
    model_path: Annotated[
        str, typer.Option(help="The model in the pod. Default: /models/ and the folder's name.")
    ] = "",
    model_claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim with the models. Default: the image has the model.")
    ] = "",
    api_key_secret: Annotated[str, typer.Option(help="Secret whose api-key clients must say.")] = "",
    insecure: Annotated[bool, typer.Option(help="No key: everybody in the cluster may call.")] = False,
    replica_name: Annotated[
        list[str] | None,
        typer.Option(
            help="NUMBER=NAME, the --name of a replica that prefills for this one, which must decode; repeatable."
        ),
    ] = None,
    serve_options: ServeOptions = None,
) -> None:
    """Print objects for `kubectl apply -f -`: a pod per process on the plan's node, and Services."""
    import yaml

    from hetis.runtime.replica.asking import checked_replica_names
    from hetis.runtime.replica.kubernetes import SET_HERE, Deployment, manifests_of

    deployment = Deployment(
        name=name,
        image=image,
        model_path=model_path or f"/models/{model.resolve().name if model else 'model'}",
        model_claim=model_claim,
        key_secret=api_key_secret,
        is_open=insecure,
        namespace=namespace,
        gpus=worker_device is Device.CUDA,
        replica_names=checked_replica_names(replica_name or []),
    )
    asked = _read(
        plan, model, replica, kv_tokens, page_tokens, dtype, serve_options, set_here=SET_HERE, wrong=deployment.wrong()
    )
    plan_text = json.dumps(json.loads(asked.plan.read_bytes()), separators=(",", ":"))
    yaml.safe_dump_all(manifests_of(asked, deployment, plan_text=plan_text), sys.stdout, sort_keys=False)


def main() -> None:
    """The command ``hetis-launch``."""
    from hetis.formats.errors import DocumentError
    from hetis.runtime.model.errors import ModelError

    try:
        app()
    except ServeError as error:
        _fail(error.messages, EXIT_INVALID)
    except (DocumentError, ModelError) as error:
        _fail(str(error).splitlines(), EXIT_INVALID)
    except LayoutError as error:
        _fail(error.messages, EXIT_NOT_POSSIBLE)
    except ConnectionError as error:
        _fail([str(error)], EXIT_FAILED)


def _read(
    plan: Path | None,
    model: Path | None,
    replica: int,
    kv_tokens: int | None,
    page_tokens: int,
    dtype: str,
    serve_options: list[str] | None,
    *,
    set_here: Sequence[str] = (),
    wrong: Sequence[str] = (),
) -> Asked:
    from hetis.runtime.replica.asking import read_asked

    return read_asked(
        plan=plan,
        model=model,
        replica=replica,
        kv_tokens=kv_tokens,
        page_tokens=page_tokens,
        dtype=dtype,
        serve_options=serve_options or (),
        set_here=set_here,
        wrong=wrong,
    )


def _addresses(node_address: list[str] | None, store_port: int, kv_port: int, all_here: bool) -> Addresses:
    from hetis.runtime.replica.asking import checked_hosts
    from hetis.runtime.replica.commands import Addresses
    from hetis.runtime.server.options import checked_range

    checked_range("--store-port", store_port, least=1, most=65_535)
    checked_range("--kv-port", kv_port, least=1, most=60_000)
    hosts = checked_hosts(node_address or [])
    return Addresses(hosts=hosts, store_port=store_port, kv_port=kv_port, all_here=all_here)


def _set_up_logs() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s hetis-launch: %(message)s"
    )


def _fail(messages: Iterable[str], code: int) -> NoReturn:
    for message in messages:
        print(f"hetis-launch: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
