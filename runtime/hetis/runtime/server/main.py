"""``hetis-serve``: a model behind OpenAI's HTTP interface, its heads on several devices."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from hetis.runtime.server.errors import ServeError

EXIT_FAILED, EXIT_INVALID, EXIT_NOT_POSSIBLE, EXIT_ADDRESS = 1, 2, 3, 4
_EXAMPLES = """Examples:

hetis-serve --model models/Llama-3.2-1B

hetis-serve --model models/Llama-3.2-1B --device cpu:2GiB --device cpu:1GiB --dtype bfloat16 --seats 16

hetis-serve --model models/Llama-3.2-1B --device cuda:0:8GiB --device cuda:1

hetis-serve --model models/Llama-3.2-1B --plan plan.json --replica 0 --kv-tokens 20000 --compute cpu

hetis-serve --model models/Llama-3.2-1B --store 127.0.0.1:8500 --worker w1, and for each worker
python -m hetis.runtime.worker --name w1 --store 127.0.0.1:8500 --kv-memory 2GiB

hetis-serve --model models/Llama-3.2-1B --plan plan.json --store 127.0.0.1:8500 --stage s1=1, and for each stage
python -m hetis.runtime.stages --name s1 --store 127.0.0.1:8500 --model models/Llama-3.2-1B

hetis-serve --model models/Llama-3.2-1B --plan plan.json --replica 0 --kv-listen 127.0.0.1:8700, and for decode replicas
hetis-serve --model models/Llama-3.2-1B --plan plan.json --replica 1 --prefill 127.0.0.1:8700 --port 8001

hetis-serve --model models/Llama-3.2-1B --plan plan.json --executor unix:/run/hetis/engine.sock, and beside it
hetis-agent --server planner:8470 --node clusters/C/nodes/N --engine unix:///run/hetis/engine.sock

HETIS_API_KEY=... hetis-serve --model models/Llama-3.2-1B --host 0.0.0.0 --port 8080

curl localhost:8000/v1/chat/completions -d '{"model": "Llama-3.2-1B", "messages": [{"role": "user", "content": "Hi"}]}'

Exit codes: 0 stopped by SIGTERM or SIGINT · 1 failed · 2 invalid options, plan or model · 3 the plan or the memory of
this machine does not allow it · 4 cannot listen there
"""

app = typer.Typer(
    name="hetis-serve",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=_EXAMPLES)
def serve(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Folder of the model, of Hugging Face's form. Required.")
    ] = None,
    served_name: Annotated[
        str, typer.Option(help="How clients call the model. Default: as its folder is called.")
    ] = "",
    plan: Annotated[Path | None, typer.Option(help="A plan of `hetis-plan place`: its devices and sizes.")] = None,
    replica: Annotated[int, typer.Option(help="Which replica of the plan, from 0.")] = 0,
    kv_tokens: Annotated[
        int | None, typer.Option(help="KV room in tokens, in place of the plan's, for a smaller machine.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="[NAME=]cpu:SIZE or [NAME=]cuda:N[:SIZE], a device and its memory for KV; repeatable, the first is "
            "the primary. Default: one device."
        ),
    ] = None,
    compute: Annotated[
        str,
        typer.Option(
            help="What a plan's devices here, or the one device, compute on: cuda (each on a GPU of its own), cpu. "
            "auto: cuda where there are as many GPUs."
        ),
    ] = "auto",
    worker: Annotated[
        list[str] | None,
        typer.Option(help="An attention worker in a process of its own, by its name; repeatable. Needs --store."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=NUMBER, a process that runs this stage of the plan, counted from 0, copies one after another; "
            "repeatable. The others run here. Needs --store."
        ),
    ] = None,
    store: Annotated[
        str, typer.Option(help="HOST:PORT that is opened here, where workers and stages say where they are.")
    ] = "",
    worker_timeout: Annotated[float, typer.Option(help="Seconds until a silent worker is given up.")] = 30.0,
    absence_timeout: Annotated[
        float, typer.Option(help="Seconds that requests wait for lost devices they cannot do without, then 503.")
    ] = 60.0,
    start_timeout: Annotated[
        float | None, typer.Option(help="Seconds until a worker or stage has come. Default: as --worker-timeout.")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="unix:PATH or HOST:PORT of the loopback, where a hetis-agent steers this engine.")
    ] = "",
    redispatch: Annotated[
        str,
        typer.Option(
            help="Who moves heads of running requests: own (the solver in here), planner (through the agent), off. "
            "auto: planner with --executor, else own where there are several devices."
        ),
    ] = "auto",
    kv_listen: Annotated[
        str,
        typer.Option(
            help="HOST:PORT where this engine computes prompts for those that decode, and sends them the KV. Not "
            "with --prefill."
        ),
    ] = "",
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT, the --kv-listen of an engine that computes prompts for this one; repeatable. What none of "
            "them does is computed here. Not with --kv-listen."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, float64, bfloat16, float16.")] = "auto",
    context_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt with output. Default: the model's.")
    ] = None,
    seats: Annotated[int | None, typer.Option(help="Requests that run at a time. Default: the plan's, or 64.")] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens per step. Default: the plan's, or 1024.")
    ] = None,
    page_tokens: Annotated[int, typer.Option(help="Token slots of a KV page.")] = 16,
    threads: Annotated[int | None, typer.Option(help="Of torch. Default: torch's own choice.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one, which is told on stderr.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Holds the key that clients must say; or set HETIS_API_KEY.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="No key, though other machines can reach the server.")] = False,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait beyond the seats; more are answered with 429.")
    ] = 256,
    body_limit: Annotated[str, typer.Option(help="Largest body of a request.")] = "4MiB",
    answer_timeout: Annotated[float, typer.Option(help="Seconds for a whole answer.")] = 600.0,
    write_timeout: Annotated[float, typer.Option(help="Seconds after which a slow reader is cut off.")] = 30.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for open answers after SIGTERM.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model over HTTP as OpenAI does, the KV of each attention head on a device of its own choice."""
    from hetis.runtime.server import options

    checking = options.Checking()
    get, within = checking.get, options.checked_range
    get(lambda: _set_up_logs(log_level))
    get(lambda: options.checked_folder(model))
    rooms = get(lambda: options.checked_devices(device or []))
    chosen_compute = get(lambda: options.checked_compute(compute, has_devices=bool(device)))
    chosen_dtype = get(lambda: options.checked_dtype(dtype))
    name = get(lambda: options.checked_name(served_name, model))
    key = get(lambda: options.api_key(api_key_file))
    body_bytes = get(lambda: options.checked_size("--body-limit", body_limit))
    get(lambda: _check_plan_options(plan, device, replica, kv_tokens))
    stages = get(lambda: options.checked_stages(stage or [], has_plan=plan is not None))
    others = [name for name, _ in stages or ()]
    get(lambda: options.checked_workers(worker or [], store, rooms or (), stages=others))
    executor_address = get(lambda: options.checked_executor(executor))
    mode = get(lambda: options.checked_redispatch(redispatch, executor))
    get(lambda: _check_exposed(host, key, insecure))
    prompts = get(lambda: options.checked_prompts(kv_listen, prefill or [], has_key=key is not None, insecure=insecure))
    for option, value, least, most in (
        ("--kv-tokens", kv_tokens, 1, 2**31),
        ("--context-tokens", context_tokens, 2, 2**31),
        ("--seats", seats, 1, 65_536),
        ("--chunk-tokens", chunk_tokens, 1, 2**20),
        ("--page-tokens", page_tokens, 1, 4096),
        ("--threads", threads, 1, 1024),
        ("--port", port, 0, 65_535),
        ("--max-waiting", max_waiting, 0, 10**6),
        ("--answer-timeout", answer_timeout, 0.001, 10**6),
        ("--write-timeout", write_timeout, 0.001, 10**6),
        ("--worker-timeout", worker_timeout, 0.1, 10**6),
        ("--start-timeout", start_timeout, 0.1, 10**6),
        ("--absence-timeout", absence_timeout, 0, 10**6),
        ("--drain-timeout", drain_timeout, 0, 10**6),
    ):
        if value is not None:
            get(lambda o=option, v=value, low=least, high=most: within(o, v, least=low, most=high))  # type: ignore[misc]
    try:
        checking.finish()
    except ServeError as error:
        _fail(error.messages, EXIT_INVALID)
    assert model is not None
    assert rooms is not None
    assert chosen_compute is not None
    assert name is not None
    assert body_bytes is not None
    assert prompts is not None

    try:
        listening = options.bound_socket(host, port, write_s=write_timeout)
    except ServeError as error:
        _fail(error.messages, EXIT_ADDRESS)

    from hetis.runtime.server.assembly import Asked, run_server

    asked = Asked(
        folder=model,
        name=name,
        plan=plan,
        replica=replica,
        kv_tokens=kv_tokens,
        rooms=rooms,
        compute=chosen_compute,
        workers=tuple(worker or ()),
        stages=stages or (),
        store=store,
        worker_s=worker_timeout,
        start_s=start_timeout if start_timeout is not None else worker_timeout,
        absence_s=absence_timeout,
        executor=executor_address,
        prompts=prompts,
        redispatch=mode,
        dtype=chosen_dtype,
        context_tokens=context_tokens,
        seats=seats,
        chunk_tokens=chunk_tokens,
        page_tokens=page_tokens,
        threads=threads,
        api_key=key,
        max_waiting=max_waiting,
        body_bytes=body_bytes,
        answer_s=answer_timeout,
        write_s=write_timeout,
        drain_s=drain_timeout,
        version=version("hetis"),
    )
    _run(run_server(asked, listening), listening)


def main() -> None:
    """The command ``hetis-serve``."""
    # Before anything is imported or loaded, for which a process 1 would otherwise hear nothing of them.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    app()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at once: nothing is served yet, or no more, and threads that load or compile cannot be told."""
    with suppress(OSError):  # nobody may read it
        os.write(2, f"hetis-serve: stopped by {signal.Signals(number).name}\n".encode())  # a log may be being written
    os._exit(0)


def _run(work: Coroutine[Any, Any, bool], listening: socket.socket) -> None:
    """Runs the server; errors become lines and an exit code."""
    from hetis.formats.errors import DocumentError
    from hetis.runtime.kv.errors import DeviceError
    from hetis.runtime.launch.errors import LayoutError
    from hetis.runtime.model.errors import ModelError
    from hetis.runtime.transport.errors import ChannelError

    try:
        went_well = asyncio.run(work)
    except (DocumentError, ModelError) as error:
        _fail(str(error).splitlines(), EXIT_INVALID)
    except LayoutError as error:
        _fail(error.messages, EXIT_NOT_POSSIBLE)
    except ServeError as error:
        _fail(error.messages, EXIT_ADDRESS)
    except (ChannelError, DeviceError, OSError) as error:
        _fail([str(error)], EXIT_FAILED)
    finally:
        listening.close()
    if not went_well:
        _fail(["the engine has failed; the log says why"], EXIT_FAILED)


def _check_plan_options(plan: Path | None, device: list[str] | None, replica: int, kv_tokens: int | None) -> None:
    wrong = []
    if plan is not None and device:
        wrong.append("--device and --plan: a plan says which devices there are; give one of the two")
    if plan is None and kv_tokens is not None:
        wrong.append("--kv-tokens is in place of a plan's, and needs --plan")
    if plan is None and replica:
        wrong.append("--replica needs --plan")
    if wrong:
        raise ServeError(*wrong)


def _check_exposed(host: str, key: str | None, insecure: bool) -> None:
    from hetis.runtime.server.options import is_loopback

    if not is_loopback(host) and key is None and not insecure:
        raise ServeError(
            f"--host {host} can be reached from other machines: give --api-key-file or HETIS_API_KEY, or --insecure"
        )


def _set_up_logs(level: str) -> None:
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        raise ServeError(f"--log-level is {level!r}, must be debug, info, warning or error")
    logging.basicConfig(
        level=known[level.upper()], stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(max(known[level.upper()], logging.WARNING))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _fail(messages: Iterable[str], code: int) -> NoReturn:
    for message in messages:
        print(f"hetis-serve: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
