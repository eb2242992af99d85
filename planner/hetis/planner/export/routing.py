"""Router weights: each replica's share of the requests, in the formats of common routers.

nginx takes turns among replicas that have a free seat (`max_conns`), and among all if none has (`backup`); prefill
replicas behind a router of pairs get a request if they have the fewest by weight (`least_conn`). Plans are simulated
so (`hetis.simulator.routers.Nginx`).

Shares follow the plan's rates, replica by replica. If prefill and decode are disaggregated, a request takes a pair,
and the shares are those of the plan's routes. With classes of requests by prompt length, shares are those of what each
replica would serve if its pool served all of them. nginx has servers for each class then, of which LiteLLM chooses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hetis.engines.versions import Engine
from hetis.formats.documents import yaml_text
from hetis.planner.export.pair_routers import balanced_sides, entry_points, pair_groups
from hetis.planner.export.replicas import Launchable
from hetis.simulator.routers import weight
from hetis.solver.plan import Role

PATH_PORT = 32_000  # of nginx itself, for the first replica that is reached by a path
CLASS_PORT = 33_000  # and for the first class of requests
NOTHING_SERVES = "nothing serves"


def routing_files(
    launchable: Launchable, endpoints: Mapping[int, str], routers: Sequence[str] = (), *, listed: bool = True
) -> dict[str, str]:
    """Return files with the weights of replicas, and the lists of routers that send whole requests somewhere.

    Args:
        launchable: the plan's replicas.
        endpoints: where they serve, by position in the plan.
        routers: endpoints of the routers of `pair_groups`; empty: the target pairs replicas at their own endpoints.
        listed: whether a list by weights does what the plan says; otherwise only the weights are returned.
    """
    files = {"router/weights.json": json.dumps(weights_of(launchable, endpoints), indent=2) + "\n"}
    servers = weighted(entry_points(launchable, endpoints, routers)) if listed else []
    if not servers:
        return files
    served = launchable.settings.served_name or launchable.settings.model
    files["router/nginx.conf"] = nginx_conf(launchable, endpoints, routers)
    if launchable.plan.classes:  # nginx and Envoy do not know the lengths of prompts
        files["router/litellm.yaml"] = litellm_by_classes(launchable, served)
        return files
    files["router/litellm.yaml"] = litellm_list(servers, served)
    if not any("/" in endpoint for endpoint, _ in servers):  # its clusters know hosts and ports, but no paths
        files["router/envoy.yaml"] = envoy_list(servers)
    return files


def weights_of(launchable: Launchable, endpoints: Mapping[int, str]) -> dict[str, Any]:
    """Return endpoints with their rates and shares, and the pairs of prefill and decode replicas with theirs."""
    shares, pairs = shares_of(launchable), launchable.routes()
    classes = {one.name: one.max_prompt_tokens for one in launchable.plan.classes}
    carried = sum(pair.rate for pair in pairs) or 1.0
    return {
        "model": launchable.settings.served_name or launchable.settings.model,
        "endpoints": [
            {
                "replica": one.name,
                "role": one.plan.role.value,
                "endpoint": endpoints[number],
                "requests_per_s": round(rate_of(launchable, number), 6),
                "share": round(shares[number], 6),
                "weight": weight(shares[number]),
                **({"classes": list(one.plan.classes) or list(classes)} if classes else {}),
            }
            for number, one in launchable.replicas.items()
        ],
        "pairs": [
            {
                "prefill": launchable.replicas[pair.prefill].name,
                "decode": launchable.replicas[pair.decode].name,
                "requests_per_s": round(pair.rate, 6),
                "share": round(pair.rate / carried, 6),
            }
            for pair in pairs
        ],
        **({"max_prompt_tokens": classes} if classes else {}),
    }


def shares_of(launchable: Launchable) -> dict[int, float]:
    """Return each replica's share of all requests; the shares of prefill and of decode replicas have the same sum."""
    plan, replicas = launchable.plan, launchable.replicas
    rates = {
        number: rate_of(launchable, number) / plan.pool_share(one.plan.classes) for number, one in replicas.items()
    }
    decoding = sum(rates[number] for number, one in replicas.items() if one.plan.role is not Role.PREFILL)
    whole = (decoding if plan.classes else launchable.rate()) or 1.0
    return {number: rate / whole for number, rate in rates.items()}


def rate_of(launchable: Launchable, number: int) -> float:
    """Return the saturated requests/s of a replica; for prefill and decode replicas, summed over their routes."""
    replica = launchable.replicas[number].plan
    if replica.role is Role.UNIFIED:
        return replica.rate
    return sum(route.rate for route in launchable.routes() if number in (route.prefill, route.decode))


def weighted(rates: Mapping[str, float]) -> list[tuple[str, int]]:
    """Return endpoints with integer weights in proportion to the requests/s of each."""
    whole = sum(rates.values())
    return [(endpoint, weight(rate / whole)) for endpoint, rate in rates.items()]


def nginx_list(
    servers: Sequence[tuple[str, int]], why_none: str = NOTHING_SERVES, *, name: str = "hetis",
    most: Mapping[str, int] | None = None, fewest: bool = False,
) -> str:  # fmt: skip
    """Return nginx's block `upstream`, in which servers take turns by weight, or have the ``fewest`` requests by it.

    It must contain a server, so if there is none it has one marked as down, with ``why_none`` in a comment. ``most``
    are the requests with which each is full, and gets more only if all are; None: that is never so.
    """
    lines = [f"    server {endpoint} weight={share}" for endpoint, share in servers]
    if most is not None and len(servers) > 1:
        limited = (f"{line} max_conns={most[endpoint]}" for line, (endpoint, _) in zip(lines, servers, strict=True))
        lines = [*limited, *(f"{line} backup" for line in lines)]
    if (most is not None or fewest) and len(servers) > 1:  # all processes of nginx count together
        lines = [f"    zone {name} 1m", *(["    least_conn"] if fewest else []), *lines]
    lines = [f"{line};\n" for line in lines] or [f"    server 127.0.0.1:9 down;  # {why_none}\n"]
    return f"upstream {name} {{\n{''.join(lines)}}}\n"


def nginx_conf(
    launchable: Launchable,
    endpoints: Mapping[int, str],
    routers: Sequence[str],
    *,
    sides_at: str = "127.0.0.1:",
    fronts: int = 1,
) -> str:
    """Return nginx's servers: one for clients at port 8080, one before each of `balanced_sides`, and one for each path.

    With classes of requests there is one for each in place of the first, at 127.0.0.1. There, an entry point for all
    requests has the seats of the class's share.

    Args:
        launchable: the plan's replicas.
        endpoints: where they serve, by position in the plan.
        routers: endpoints of the routers of `pair_groups`.
        sides_at: address and colon at which the servers before sides listen; empty: every address.
        fronts: how many nginx share the requests.
    """
    keys = dict[str, float]()
    if launchable.engine is not Engine.SGLANG:  # whose router passes on what clients send
        keys = {endpoints[number]: 1.0 for group in pair_groups(launchable) for number in group.prefill}
    everywhere = enumerate(entry_points(launchable, endpoints, routers))
    paths = {at: f"127.0.0.1:{PATH_PORT + number}" for number, at in everywhere if "/" in at}
    parts = [_NGINX_HEAD]
    parts += [nginx_list(weighted(keys), name="hetis-keys")] if keys else []
    check, key = (_NGINX_CHECK, _NGINX_KEY) if keys else ("", "")
    for number, name in enumerate(launchable.plan.class_shares() or ("",)):
        rates, most = (entry_points(launchable, endpoints, routers, name, held=held) for held in (False, True))
        each = {paths.get(at, at): math.ceil(held / fronts) for at, held in most.items()}
        group, listen = (f"hetis-{number}", class_address(number)) if name else ("hetis", "8080")
        parts.append(nginx_list([(paths.get(at, at), share) for at, share in weighted(rates)], name=group, most=each))
        parts.append(_NGINX_FRONT.format(listen=listen, name=group, check=check, key=key, proxy=_NGINX_PROXY))
    parts += [_NGINX_SIDE.format(listen=own, name=f"{at}/", proxy=_NGINX_PROXY) for at, own in paths.items()]
    return "".join([*parts, *_nginx_sides(launchable, endpoints, sides_at)])


def class_address(number: int) -> str:
    """Return where nginx listens for the requests of a class, by its position."""
    return f"127.0.0.1:{CLASS_PORT + number}"


def _nginx_sides(launchable: Launchable, endpoints: Mapping[int, str], sides_at: str) -> Iterator[str]:
    for group, role, rates in balanced_sides(launchable):
        name = group.side_name(role)
        servers = weighted({endpoints[number]: rate for number, rate in rates.items()})
        yield nginx_list(servers, name=name, fewest=role is Role.PREFILL)
        yield _NGINX_SIDE.format(listen=f"{sides_at}{group.side_port(role)}", name=name, proxy=_NGINX_PROXY)


_NGINX_HEAD = """\
# Inside http {}. Servers take turns by weight, without those that have no free seat (max_conns) while others have; of
# several that only prefill, that with the fewest prompts by weight is next. So was the plan simulated. Streams of
# tokens must not wait for a buffer. A request without an answer goes to another replica when its own fails; where none
# may be computed twice, leave that out.
"""
_NGINX_PROXY = """
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_buffering off;
        proxy_read_timeout 600s;
        client_max_body_size 64m;
        proxy_next_upstream error timeout http_502 http_503 non_idempotent;
        proxy_next_upstream_tries 3;
"""
_NGINX_FRONT = """\
server {{
    listen {listen};
    location / {{{check}
        proxy_pass http://{name};{proxy}    }}
    location = /health {{
        proxy_pass http://{name};
    }}{key}
}}
"""
# vLLM's router replaces the client's key by its own, and checks neither: an engine does.
_NGINX_CHECK = "\n        auth_request /hetis-key;"
_NGINX_KEY = """
    location = /hetis-key {
        internal;
        proxy_pass http://hetis-keys/v1/models;
        proxy_method GET;
        proxy_pass_request_body off;
        proxy_set_header Content-Length "";
    }"""
_NGINX_SIDE = """\
server {{
    listen {listen};
    location / {{
        proxy_pass http://{name};{proxy}    }}
}}
"""


def envoy_list(servers: Sequence[tuple[str, int]]) -> str:
    """Return an Envoy cluster with weighted endpoints, as YAML."""

    def address(endpoint: str) -> dict[str, Any]:
        host, _, port = endpoint.rpartition(":")
        return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}

    endpoints = [
        {"endpoint": {"address": address(endpoint)}, "load_balancing_weight": share} for endpoint, share in servers
    ]
    cluster = {
        "name": "hetis",
        "type": "STRICT_DNS",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": {"cluster_name": "hetis", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    return yaml_text(cluster)


def litellm_list(servers: Sequence[tuple[str, int]], served: str) -> str:
    """Return the settings of LiteLLM's proxy as YAML; ``served`` is the name that clients use for the model.

    The engines' key is that of its environment, which may have none.
    """
    return _litellm(_litellm_models(servers, served, served))


def litellm_by_classes(launchable: Launchable, served: str) -> str:
    """Return settings of LiteLLM's proxy that send the requests of each class to nginx's server for it.

    Requests enter the group of the shortest class. Those whose prompts are longer than ``max_input_tokens`` fall back
    to the group of the next one (checked with 1.110: all groups need that number, because it is looked up by model).
    """
    models, names = list[dict[str, Any]](), list[str]()
    for number, one in enumerate(launchable.plan.classes):
        names.append(f"{served}-{one.name}" if names else served)
        info = {"model_info": {"max_input_tokens": one.max_prompt_tokens or launchable.model.max_position}}
        models += [each | info for each in _litellm_models([(class_address(number), 1)], served, names[-1])]
    return _litellm(models, enable_pre_call_checks=True, context_window_fallbacks=[{names[0]: names[1:]}])


def _litellm(models: Sequence[Mapping[str, Any]], **settings: Any) -> str:
    return yaml_text({"model_list": models, "router_settings": {"routing_strategy": "simple-shuffle", **settings}})


def _litellm_models(servers: Sequence[tuple[str, int]], served: str, name: str) -> list[dict[str, Any]]:
    key = {"api_key": "os.environ/VLLM_API_KEY"}
    return [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"hosted_vllm/{served}", "api_base": f"http://{endpoint}/v1", "weight": share, **key
            },
        }
        for endpoint, share in servers
    ]  # fmt: skip
